"""The peers compute what the engine computes: a benchmark of them compares like with like."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megaslm_kernels import REFERENCE

from megaslm.checkpoint import as_transformers
from megaslm.config import RunConfig
from megaslm.errors import UserError
from megaslm.model import LanguageModel
from megaslm.throughput.peers import build_ddp, build_transformers, check_peer, check_peer_precision, within_autocast
from megaslm.training import MicroBatch, StepClock

WORKER = Path(__file__).with_name("peers_worker.py")
LENGTH = 8


@pytest.fixture(scope="module")
def compared(fork_ranks, tmp_path_factory) -> dict[int, dict]:
    """What peers_worker.py finds on one rank and on two."""
    found = {}
    for world_size in (1, 2):
        path = tmp_path_factory.mktemp("peers") / "losses.json"
        finished = fork_ranks(WORKER, [path], world_size)
        assert finished.code == 0, f"{finished.out}\n{finished.err}"
        found[world_size] = json.loads(path.read_text())
    return found


@pytest.fixture
def run() -> RunConfig:
    model = {
        "vocab_size": 90, "context_length": LENGTH, "num_layers": 2, "hidden_size": 16, "num_heads": 2,
        "ffn_hidden_size": 32, "qk_norm": True,
    }  # fmt: skip
    train = {"global_batch_size": 2, "micro_batch_size": 1, "max_steps": 10}
    return RunConfig.model_validate({"name": "tiny", "model": model, "train": train})


@pytest.fixture(scope="module")
def batches() -> list[MicroBatch]:
    """A step of two micro-batches, views of their windows, as the loader gives them."""
    windows = torch.randint(90, (2, 1, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return [MicroBatch(window[:, :-1], window[:, 1:], None, None) for window in windows]


def changed(run: RunConfig, **sections) -> RunConfig:
    values = run.model_dump(mode="json")
    return RunConfig.model_validate({**values, **{name: values[name] | part for name, part in sections.items()}})


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", ["llama", "qwen3", "gpt2", "gpt_neox", "masked targets", "documents, z-loss"])
def test_losses_of_three_steps_are_those_of_the_engine(compared, case, world_size):
    """In fp32, with accumulation, clipping, weight decay of matrices alone, and another learning rate each step."""
    found = compared[world_size][case]
    ours = found["megaslm"]
    assert ours == pytest.approx(compared[1][case]["megaslm"], rel=1e-5)
    assert len({round(loss, 3) for loss in ours}) == 3, "steps that change nothing compare nothing"
    assert len(found) == (2 if case == "documents, z-loss" else 3)
    for losses in found.values():
        assert losses == pytest.approx(ours, rel=1e-5)


def test_gradients_are_reduced_once_a_step(compared):
    """Three steps of two micro-batches; the first step of a DDP is of one message, and so are those after it."""
    assert compared[2]["reductions"] == 3


class Phases(StepClock):
    def __init__(self):
        self.entered = []

    def enter(self, phase: str) -> None:
        self.entered.append(phase)


def build(peer: str, run: RunConfig, ranks, precision: str = "fp32", ops=REFERENCE):
    if peer == "hf":
        return build_transformers(run, ranks, precision, False, False)
    return build_ddp(run, ranks, ops, precision, 1, False)


@pytest.mark.parametrize("peer", ["hf", "ddp"])
def test_a_step_tells_its_phases(peer, run, ranks, batches):
    clock = Phases()
    build(peer, run, ranks).step(batches, 1e-3, clock)
    passes = clock.entered[clock.entered.index("backward") - 1 :]
    assert passes == ["forward", "backward", "forward", "backward", "optimizer"]
    assert set(clock.entered[: -len(passes)]) <= {"forward"}


@pytest.mark.parametrize("peer", ["hf", "ddp"])
def test_bf16_is_an_autocast_of_fp32_weights(peer, run, ranks, batches):
    steppers = {precision: build(peer, run, ranks, precision) for precision in ("fp32", "bf16")}
    fp32, bf16 = ((sums[0] / sums[1]).item() for sums in (one.step(batches, 1e-3) for one in steppers.values()))
    assert fp32 != bf16 and bf16 == pytest.approx(fp32, rel=5e-3)
    network = steppers["bf16"]._network
    state = steppers["bf16"]._optimizer.state
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert {state[parameter]["exp_avg"].dtype for parameter in network.parameters()} == {torch.float32}


def test_our_ops_get_bf16_alone_within_an_autocast(run, ranks, batches):
    """As the Triton kernels want it, which take no mixture of types; and cosines in fp32."""
    seen = {}

    def recording(name):
        def op(*inputs):
            assert not torch.is_autocast_enabled("cpu"), name
            floats = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
            seen.setdefault(name, set()).add(tuple(x.dtype for x in floats))
            return getattr(REFERENCE, name)(*inputs)

        return op

    names = ("rms_norm", "add_rms_norm", "qk_norm_rotary", "linear_cross_entropy")
    ops = replace(REFERENCE, **{name: recording(name) for name in names})
    stepper = build("ddp", run, ranks, "bf16", ops)
    stream = []
    stepper._network.decoder.blocks[0].register_forward_pre_hook(lambda block, inputs: stream.append(inputs[0].dtype))
    stepper.step(batches, 1e-3)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert seen == {
        "rms_norm": {(bf16, bf16)},
        "add_rms_norm": {(bf16, bf16, bf16)},
        "qk_norm_rotary": {(bf16, bf16, bf16, bf16, fp32, fp32)},
        "linear_cross_entropy": {(bf16, bf16)},
    }
    assert set(stream) == {bf16}
    # Without it autocast leaves them a mixture.
    x, weight = torch.ones(2, 4, dtype=bf16), torch.ones(4)
    assert within_autocast(REFERENCE, bf16, "cpu").rms_norm(x, weight, 1e-5).dtype == bf16


@pytest.mark.parametrize("peer", ["hf", "ddp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_are_recomputed_where_the_run_recomputes_them(peer, precision, run, ranks, batches):
    sums, calls = {}, {}
    for recompute in (False, True):
        stepper = build(peer, changed(run, train={"activation_checkpointing": recompute}), ranks, precision)
        network = stepper._network
        attention = network.decoder.blocks[0].attention if peer == "ddp" else network.model.model.layers[0].self_attn
        calls[recompute] = 0

        def count(*_, recompute=recompute):
            calls[recompute] += 1

        attention.register_forward_pre_hook(count)
        sums[recompute] = [stepper.step(batches, 1e-2)[0].item() for _ in range(2)]
    assert calls == {False: 4, True: 8}
    assert sums[True] == pytest.approx(sums[False], rel=1e-5)


@pytest.mark.parametrize(
    "peer, sections, says",
    [
        ("ddp", {"parallel": {"tensor_parallel_size": 2}}, "parallel.tensor_parallel_size is 2"),
        ("hf", {"parallel": {"tensor_parallel_size": 2}}, "parallel.tensor_parallel_size is 2"),
        ("hf", {"model": {"bias": True}}, "no architecture of transformers can hold this model"),
        ("hf", {"data": {"mask_documents": True}}, "data.mask_documents=false"),
        ("hf", {"train": {"z_loss": 1e-4}}, "train.z_loss is 0.0001"),
    ],
)
def test_a_peer_that_can_not_take_the_steps_is_refused(peer, sections, says, run):
    check_peer(peer, run)
    with pytest.raises(UserError, match=says):
        check_peer(peer, changed(run, **sections))


def test_peers_know_two_precisions():
    for precision in ("fp32", "bf16"):
        check_peer_precision("ddp", precision)
    with pytest.raises(UserError, match="--compare ddp computes in fp32 or bf16, not in fp16"):
        check_peer_precision("ddp", "fp16")


def test_ddp_takes_what_transformers_does_not(run):
    check_peer("ddp", changed(run, model={"bias": True}, data={"mask_documents": True}, train={"z_loss": 1e-4}))


def test_a_missing_package_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        check_peer("hf", run)


def test_train_attention_is_the_peers_too(run, ranks):
    for peer in ("hf", "ddp"):
        with pytest.raises(UserError, match="train.attention=flash does not run on"):
            build(peer, changed(run, train={"attention": "flash"}), ranks)


def test_transformers_model_is_made_where_ours_is(run):
    """The host has no weights of it."""
    with torch.device("meta"):
        ours = LanguageModel(run.model)
    assert {parameter.device.type for parameter in as_transformers(ours).parameters()} == {"meta"}
