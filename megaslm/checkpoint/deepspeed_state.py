"""The training state inside a DeepSpeed engine, parameter by parameter and free of its layout.

One of two files of megaslm that reach below DeepSpeed's public interface (megaslm/training/device_step.py is the other
one); hence the check of the version, and the parity tests in tests/checkpoint that run it through every layout.

Whatever the ZeRO stage, the engine's inner optimizer updates flat fp32 tensors, and every trained parameter lies in one
of them, as a whole or in part (a `Shard`):

    stage 0             the parameter itself; every rank holds all of it
    ZeRO-1, ZeRO-2      one flat tensor per parameter group: this rank's contiguous part of all its parameters in a row
    (and BF16_Optimizer, which is ZeRO-1 with fp32 accumulation of bf16 gradients)
    ZeRO-3              one flat tensor per sub-group: this rank's part of each parameter, one after the other,
                        every parameter padded to a multiple of the rank count

Under tensor parallelism a parameter of this rank is some blocks of the whole model's, or all of it: its placement says
which (megaslm/parallel/placement.py). Names and shapes that leave this file are those of the whole model.

Master weights are read from and written to the flat tensor, moments (`exp_avg`, `exp_avg_sq`) to the tensors of the
same shape in the inner optimizer's state. Before its first step an Adam has no state: it reads as zeros, and is created
when written. DeepSpeed links it to the parameters after the next step by itself.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from megaslm.checkpoint.buffers import HostBuffers
from megaslm.checkpoint.folder import assign_writers
from megaslm.checkpoint.format import ADAM_MOMENTS, WEIGHTS, Piece
from megaslm.checkpoint.slices import Part, parts_between
from megaslm.errors import UserError
from megaslm.parallel import ALONE, Group, Placement, host, placement_of

Value = TypeVar("Value")
DEEPSPEED_VERSION = "0.19.8"
# By name, since apex is optional: torch.optim, deepspeed.ops.adam and apex.optimizers.
ADAM_CLASSES = ("Adam", "AdamW", "DeepSpeedCPUAdam", "FusedAdam")
ZERO_CLASSES = (BF16_Optimizer, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Shard:
    """The elements [start, start + numel) of a flattened parameter, which lie at `offset` in `flat` on this rank."""

    flat: Tensor
    offset: int
    start: int
    numel: int


@dataclass(frozen=True)
class Local:
    """A parameter of this rank's model: what it is of the whole model's, and where this rank's part of it lies."""

    placement: Placement
    shard: Shard | None

    @property
    def name(self) -> str:
        """Of the whole model's parameter. Two of this rank's may be parts of one: queries, and keys and values."""
        return self.placement.name

    def parts(self) -> Iterator[tuple[Part, int]]:
        """This rank's parts of the whole model's parameter, and the offset in `shard.flat` where each begins."""
        if self.shard is not None:
            shard, shape = self.shard, self.placement.shape
            for place, part in parts_between(shard.start, shard.start + shard.numel, self.placement.blocks):
                yield part.flattened(shape), shard.offset + place


def _refuse_unsupported(engine) -> None:
    if deepspeed.__version__ != DEEPSPEED_VERSION:
        raise UserError(
            f"deepspeed {deepspeed.__version__} is installed, but checkpoints reach into the engine and are proven "
            f"with {DEEPSPEED_VERSION} only: pip install deepspeed=={DEEPSPEED_VERSION}"
        )
    inner, outer = engine.basic_optimizer, engine.optimizer
    if type(inner).__name__ not in ADAM_CLASSES or inner.defaults.get("amsgrad"):
        raise UserError(
            f"the optimizer {type(inner).__name__} can't be saved; checkpoints hold the state of Adam and AdamW "
            "(without amsgrad), of torch, DeepSpeed or apex"
        )
    problem = None
    if outer is not inner and type(outer) not in ZERO_CLASSES:
        # Stage 0 in bf16 or fp16 among them, whose Adam starts at step 1.
        problem = (
            f"ZeRO stage {engine.zero_optimization_stage()} with {type(outer).__name__}; take ZeRO-1, 2 or 3, or fp32"
        )
    elif getattr(outer, "swap_optimizer", False) or getattr(outer, "params_in_nvme_and_cpu", False):
        problem = "offload to NVMe; offload to the CPU instead"
    elif hasattr(outer, "backup_optimizer"):
        problem = "offload of a part of the optimizer; leave offload_optimizer.ratio out"
    elif getattr(outer, "torch_autocast_gradscaler", None) is not None:
        problem = "torch_autocast in fp16; take bf16 there, or the fp16 section"
    if problem:
        raise UserError(f"an engine config that checkpoints do not cover: {problem}")


class EngineState:
    """The fp32 master weights, Adam moments and step counts of an engine, by the whole model's parameter.

    Names and shapes are those of `named_parameters()` of the model before it was sharded: tied parameters once, without
    the prefixes that torch.compile puts in. All ranks make one at the same time and call its methods alike.

    Raises:
        UserError: another DeepSpeed version, an optimizer that is not a kind of Adam, or an unsupported layout.
    """

    def __init__(self, engine) -> None:
        _refuse_unsupported(engine)
        self._everyone = Group(dist.get_rank(), tuple(range(dist.get_world_size())), dist.group.WORLD)
        self._tensor_parallel = engine.mpu.tensor_parallel if engine.mpu else ALONE
        self._data_parallel = engine.mpu.data_parallel if engine.mpu else self._everyone
        assert self._data_parallel.size == engine.seq_dp_world_size, "DeepSpeed shards over the data-parallel group"
        assert self._data_parallel.size * self._tensor_parallel.size == self._everyone.size
        self._adam = engine.basic_optimizer
        self._outer = engine.optimizer
        self._replicated = self._outer is self._adam
        shards = {id(parameter): shard for parameter, shard in self._find_shards()}
        self._locals: dict[str, Local] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in engine.module.named_parameters():
            name = name.replace("_orig_mod.", "")
            assert id(parameter) in shards, f"parameter {name} is not in the optimizer"
            placement = placement_of(name, parameter)
            self._locals[name] = Local(placement, shards[id(parameter)])
            self.shapes[placement.name] = placement.shape

    def pieces(self, kind: str, buffers: HostBuffers | None = None) -> list[Piece]:
        """What this rank writes of all weights, or of a moment: its shards, bit for bit. No word between the ranks.

        Args:
            kind: "weights" for the fp32 master weights, else a moment's key in the optimizer's state.
            buffers: copy the state there, see `HostBuffers`; else the pieces are views of the engine's own tensors,
                good until the next step.

        Raises:
            MemoryError, RuntimeError: no room for the copy.
        """
        written = self._written_here()
        copies: dict[int, Tensor] = {}
        pieces = []
        for local in (local for name, local in self._locals.items() if name in written):
            for part, offset in local.parts():
                flat = local.shard.flat
                source = self._source(flat, kind)
                if source is None:
                    data = torch.zeros(part.numel)
                else:
                    if buffers is not None:
                        if id(flat) not in copies:
                            copies[id(flat)] = buffers.copy((kind, len(copies)), source)
                        source = copies[id(flat)]
                    data = source.view(-1).narrow(0, offset, part.numel)
                pieces.append(Piece(local.name, local.placement.shape, part, data))
        return pieces

    def _written_here(self) -> set[str]:
        """The parameters, by the names that they have on this rank, whose part here is this rank's to write.

        Ranks that have the same elements share them out: in stage 0 the data-parallel ones, and of what is not sliced
        the tensor-parallel ones.
        """
        if self._replicated:
            of_sliced, of_others = self._data_parallel, self._everyone
        else:
            of_sliced, of_others = ALONE, self._tensor_parallel
        written = set()
        for sliced, holders in ((True, of_sliced), (False, of_others)):
            sizes = {
                name: sum(math.prod(block.shape) for block in local.placement.blocks)
                for name, local in self._locals.items()
                if local.placement.sliced == sliced
            }
            writers = assign_writers(sizes, holders.size)
            written |= {name for name, writer in writers.items() if writer == holders.rank}
        return written

    def differing_copies(self) -> list[str]:
        """The whole model's parameters, not sliced, of which two ranks of a tensor-parallel group hold other master
        weights at the same place. No rank may, but nothing but the same arithmetic keeps them alike. Collective."""
        if self._tensor_parallel.size == 1:
            return []
        sums = {}
        for local in self._locals.values():
            if local.shard is not None and not local.placement.sliced:
                part = local.shard.flat.data.view(-1).narrow(0, local.shard.offset, local.shard.numel)
                sums[local.name] = part.view(torch.int32).sum(dtype=torch.int64)  # its bits; waited for once, below
        values = torch.stack(list(sums.values())).tolist() if sums else []
        of_ranks = host.gather((self._tensor_parallel.ranks[0], dict(zip(sums, values, strict=True))))
        differing = {
            name for first, found in of_ranks for name, value in found.items() if of_ranks[first][1].get(name) != value
        }
        return sorted(differing)

    def steps(self) -> dict[str, int]:
        """Adam's step count of every parameter, 0 before the first step. Collective."""
        return self._of_all_ranks([(name, self._step(shard)) for name, shard in self._local_shards()])

    @torch.no_grad()
    def load(self, kind: str, read: Callable[[str, Part], Tensor]) -> None:
        """Overwrite this rank's part of the weights, or of a moment, of all parameters.

        Args:
            read: (name, part) -> fp32 tensor (part.numel,), that part of the parameter.
        """
        for local in self._locals.values():
            for part, offset in local.parts():
                if kind != WEIGHTS:
                    self._create_state(local.shard.flat)
                values = self._source(local.shard.flat, kind).view(-1).narrow(0, offset, part.numel)
                values.copy_(read(local.name, part))

    def weight_decay(self) -> dict[str, float]:
        """Adam's weight decay of every parameter, as the engine applies it. Collective."""
        rates = {}
        outer = self._outer
        for i, group in enumerate(self._adam.param_groups):
            flats = group["params"]
            if isinstance(outer, DeepSpeedZeroOptimizer_Stage3):  # which puts them in for the moment of the step
                flats = [
                    f for j, f in enumerate(outer.fp32_partitioned_groups_flat) if outer.sub_group_to_group_id[j] == i
                ]
            rates |= {id(flat): float(group["weight_decay"]) for flat in flats}
        return self._of_all_ranks([(name, rates[id(shard.flat)]) for name, shard in self._local_shards()])

    def load_steps(self, steps: dict[str, int]) -> None:
        """Set Adam's step counts. Parameters that share a flat tensor share the count, which is their largest."""
        counts: dict[int, tuple[Tensor, int]] = {}
        for name, shard in self._local_shards():
            counts[id(shard.flat)] = (shard.flat, max(steps[name], counts.get(id(shard.flat), (None, 0))[1]))
        for flat, count in counts.values():
            state = self._create_state(flat)
            # DeepSpeed's Adams count in an integer, torch's in a tensor.
            state["step"] = torch.full_like(state["step"], count) if torch.is_tensor(state["step"]) else count
        if type(self._adam).__module__.startswith("apex."):  # which counts per group
            for group in self._adam.param_groups:
                group["step"] = max(steps.values())

    def clear_moments(self) -> None:
        """Back to an Adam that has not made a step: it makes its state anew at the next one."""
        self._adam.state.clear()
        for group in self._adam.param_groups:
            group.pop("step", None)
        if hasattr(self._outer, "_hp_optimizer_states_linked"):
            self._outer._hp_optimizer_states_linked = False

    @torch.no_grad()
    def refresh_model_weights(self) -> None:
        """Give the model's own (bf16, fp16) weights the values of the master weights. Collective.

        Without it the first step after a restore would run on the weights of the initialization.
        """
        if isinstance(self._outer, DeepSpeedZeroOptimizer_Stage3):
            # As its step() does: release what was gathered, copy, gather the small parameters that stay gathered.
            self._outer._partition_all_parameters()
            for i in range(len(self._outer.fp32_partitioned_groups_flat)):
                self._outer._reassign_or_swap_out_partitioned_parameters(i)
            if self._outer.persistent_parameters:
                self._outer.persistent_parameters[0].all_gather(self._outer.persistent_parameters)
        elif not self._replicated:
            self._outer.update_lp_params()

    def loss_scaler(self) -> dict[str, float] | None:
        """The counters of fp16's dynamic loss scaling, None without it."""
        scaler = getattr(self._outer, "loss_scaler", None)
        if not isinstance(scaler, DynamicLossScaler):
            return None
        return {field: getattr(scaler, field) for field in LOSS_SCALER_FIELDS}

    def load_loss_scaler(self, saved: dict[str, float] | None) -> None:
        """Go on with saved counters, if both the saved run and this one scale the loss dynamically."""
        if saved is not None and self.loss_scaler() is not None:
            for field in LOSS_SCALER_FIELDS:
                setattr(self._outer.loss_scaler, field, saved[field])

    def _local_shards(self) -> Iterator[tuple[str, Shard]]:
        """This rank's shards, with the name of the whole model's parameter."""
        return ((local.name, local.shard) for local in self._locals.values() if local.shard is not None)

    def _of_all_ranks(self, here: list[tuple[str, Value]]) -> dict[str, Value]:
        """The value of every parameter, from those of this rank's shards of it. Collective."""
        found: dict[str, Value] = {}
        for there in host.gather(here):
            for name, value in there:
                assert found.setdefault(name, value) == value, f"parts of {name} have {found[name]} and {value}"
        return {name: found[name] for name in self.shapes}

    def _source(self, flat: Tensor, kind: str) -> Tensor | None:
        """The master weights or moments that belong to a flat tensor; None for a moment that does not exist yet."""
        return flat.data if kind == WEIGHTS else self._adam.state.get(flat, {}).get(kind)

    def _step(self, shard: Shard) -> int:
        state = self._adam.state.get(shard.flat, {})
        if "step" in state:
            return int(state["step"])
        # apex counts per group, and all groups alike.
        return int(self._adam.param_groups[0].get("step", 0)) if state else 0

    def _create_state(self, flat: Tensor) -> dict:
        """The inner optimizer's state of a flat tensor, as its first step would have made it."""
        state = self._adam.state[flat]
        if not state:
            for key in ADAM_MOMENTS:
                state[key] = torch.zeros_like(flat.data)
        if "step" not in state:
            state["step"] = 0
            if isinstance(self._adam, torch.optim.Adam):
                on_device = self._adam.defaults.get("fused") or self._adam.defaults.get("capturable")
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")
        return state

    def _find_shards(self) -> Iterator[tuple[Tensor, Shard | None]]:
        """Every parameter of the optimizer and this rank's part of it, None where it has none."""
        outer = self._outer
        if self._replicated:
            for group in outer.param_groups:
                for parameter in group["params"]:
                    yield parameter, Shard(parameter, 0, 0, parameter.numel())
        elif isinstance(outer, DeepSpeedZeroOptimizer_Stage3):
            for group, flat in zip(outer.fp16_groups, outer.fp32_partitioned_groups_flat, strict=True):
                offset = 0
                for parameter in group:
                    part = parameter.partition_numel()
                    start = part * outer._get_param_partition_rank(parameter)
                    # The last ranks' parts may reach into the padding, or lie in it as a whole.
                    numel = min(part, parameter.ds_numel - start)
                    yield parameter, Shard(flat, offset, start, numel) if numel > 0 else None
                    offset += part
        elif isinstance(outer, BF16_Optimizer):
            for group, flat in zip(outer.bf16_groups, outer.fp32_groups_flat_partition, strict=True):
                offsets = [0]
                for parameter in group:
                    offsets.append(offsets[-1] + parameter.numel())
                yield from _shards_in_row(group, offsets[:-1], flat, self._data_parallel.rank)
        else:
            # With round_robin_gradients the flat order is another than the group's.
            groups, offsets = outer.round_robin_bit16_groups, outer.round_robin_bit16_offsets
            for group, starts, flat in zip(groups, offsets, outer.single_partition_of_fp32_groups, strict=True):
                yield from _shards_in_row(group, starts, flat, self._data_parallel.rank)


def _shards_in_row(
    group: list[Tensor], offsets: list[int], flat: Tensor, rank: int
) -> Iterator[tuple[Tensor, Shard | None]]:
    """This rank's parts of parameters that start at `offsets` in a row, of which `flat` is its equal part.

    rank: among those that share the row.
    """
    low = flat.numel() * rank
    high = low + flat.numel()
    for parameter, offset in zip(group, offsets, strict=True):
        start, stop = max(offset, low), min(offset + parameter.numel(), high)
        yield parameter, Shard(flat, start - low, start - offset, stop - start) if start < stop else None
