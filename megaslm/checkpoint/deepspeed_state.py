"""The training state inside a DeepSpeed engine, parameter by parameter and free of its layout.

The only file of megaslm that reaches below DeepSpeed's public interface; hence the check of the version, and the parity
tests in tests/checkpoint that run it through every layout.

Whatever the ZeRO stage, the engine's inner optimizer updates flat fp32 tensors, and every trained parameter lies in one
of them, as a whole or in part (a `Shard`):

    stage 0             the parameter itself; every rank holds all of it
    ZeRO-1, ZeRO-2      one flat tensor per parameter group: this rank's contiguous part of all its parameters in a row
    (and BF16_Optimizer, which is ZeRO-1 with fp32 accumulation of bf16 gradients)
    ZeRO-3              one flat tensor per sub-group: this rank's part of each parameter, one after the other,
                        every parameter padded to a multiple of the rank count

Master weights are read from and written to the flat tensor, moments (`exp_avg`, `exp_avg_sq`) to the tensors of the
same shape in the inner optimizer's state. Before its first step an Adam has no state: it reads as zeros, and is created
when written. DeepSpeed links it to the parameters after the next step by itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
from megaslm.errors import UserError
from megaslm.parallel import host

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
    """The fp32 master weights, Adam moments and step counts of an engine, by parameter name.

    Names are those of `engine.module.named_parameters()`, tied parameters once, without the prefixes that
    torch.compile puts in. All ranks make one at the same time and call its methods alike.

    Raises:
        UserError: another DeepSpeed version, an optimizer that is not a kind of Adam, or an unsupported layout.
    """

    def __init__(self, engine) -> None:
        _refuse_unsupported(engine)
        # Tensor-parallel slices are to come; until then every rank is a data-parallel one.
        assert engine.seq_dp_world_size == host.world_size(), "data-parallel ranks are all ranks"
        self._device = engine.device
        self._adam = engine.basic_optimizer
        self._outer = engine.optimizer
        self._replicated = self._outer is self._adam
        shards = {id(parameter): shard for parameter, shard in self._find_shards()}
        self._shards: dict[str, Shard | None] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in engine.module.named_parameters():
            name = name.replace("_orig_mod.", "")
            assert id(parameter) in shards, f"parameter {name} is not in the optimizer"
            self._shards[name] = shards[id(parameter)]
            # Under ZeRO-3 the parameter itself is empty between its uses.
            self.shapes[name] = tuple(getattr(parameter, "ds_shape", parameter.shape))

    def pieces(self, kind: str, buffers: HostBuffers | None = None) -> dict[str, Piece]:
        """What this rank writes of all weights, or of a moment: its shards, bit for bit. No word between the ranks.

        Args:
            kind: "weights" for the fp32 master weights, else a moment's key in the optimizer's state.
            buffers: copy the state there, see `HostBuffers`; else the pieces are views of the engine's own tensors,
                good until the next step.

        Raises:
            MemoryError, RuntimeError: no room for the copy.
        """
        if self._replicated:  # every rank has everything
            writers = assign_writers({name: shard.numel for name, shard in self._local_shards()}, host.world_size())
            mine = {name for name, writer in writers.items() if writer == host.rank()}
        else:
            mine = {name for name, _ in self._local_shards()}
        copies: dict[int, Tensor] = {}
        found = {}
        for name, shard in self._local_shards():
            if name not in mine:
                continue
            source = self._source(shard.flat, kind)
            if source is None:
                data = torch.zeros(shard.numel)
            else:
                if buffers is not None:
                    if id(shard.flat) not in copies:
                        copies[id(shard.flat)] = buffers.copy((kind, len(copies)), source)
                    source = copies[id(shard.flat)]
                data = source.view(-1).narrow(0, shard.offset, shard.numel)
            found[name] = Piece(self.shapes[name], shard.start, data)
        return found

    def steps(self) -> dict[str, int]:
        """Adam's step count of every parameter, 0 before the first step. Collective."""
        local = [self._step(shard) if shard is not None else 0 for shard in self._shards.values()]
        counts = torch.tensor(local, dtype=torch.int64, device=self._device)
        if host.world_size() > 1:
            dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        return dict(zip(self._shards, counts.tolist(), strict=True))

    @torch.no_grad()
    def load(self, kind: str, read: Callable[[str, int, int], Tensor]) -> None:
        """Overwrite this rank's part of the weights, or of a moment, of all parameters.

        Args:
            read: (name, start, stop) -> fp32 tensor (stop - start,), that part of the flattened parameter.
        """
        for name, shard in self._local_shards():
            if kind != WEIGHTS:
                self._create_state(shard.flat)
            self._values(shard, kind).copy_(read(name, shard.start, shard.start + shard.numel))

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
        local = {name: rates[id(shard.flat)] for name, shard in self._local_shards()}
        found = {name: rate for part in host.gather(local) for name, rate in part.items()}
        return {name: found[name] for name in self._shards}

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
        return ((name, shard) for name, shard in self._shards.items() if shard is not None)

    def _values(self, shard: Shard, kind: str) -> Tensor:
        """View (numel,) of the shard's master weights, or of moments that exist."""
        return self._source(shard.flat, kind).view(-1).narrow(0, shard.offset, shard.numel)

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
                yield from _cut(group, offsets[:-1], flat)
        else:
            # With round_robin_gradients the flat order is another than the group's.
            groups, offsets = outer.round_robin_bit16_groups, outer.round_robin_bit16_offsets
            for group, starts, flat in zip(groups, offsets, outer.single_partition_of_fp32_groups, strict=True):
                yield from _cut(group, starts, flat)


def _cut(group: list[Tensor], offsets: list[int], flat: Tensor) -> Iterator[tuple[Tensor, Shard | None]]:
    """This rank's parts of parameters that start at `offsets` in a row, of which `flat` is this rank's equal part."""
    low = flat.numel() * host.rank()
    high = low + flat.numel()
    for parameter, offset in zip(group, offsets, strict=True):
        start, stop = max(offset, low), min(offset + parameter.numel(), high)
        yield parameter, Shard(flat, start - low, start - offset, stop - start) if start < stop else None
