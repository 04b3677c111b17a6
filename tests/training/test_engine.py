"""The engine against a bare PyTorch loop, and what it does with gradients that are not finite."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator

from megaslm.config import load_engine_config, load_run_config, resolve_batch, resolve_engine_config
from megaslm.data import TrainingData, load_tokenizer
from megaslm.model import LanguageModel, initialize_parameters
from megaslm.training.batches import MicroBatch, StepBatches
from megaslm.training.engine import TrainingEngine, parameter_groups
from megaslm.training.run import out_of_memory

ROOT = Path(__file__).resolve().parents[2]
STAGES = (0, 1, 2, 3)
SIZE_2, ALONG_SEQUENCE = ["parallel.tensor_parallel_size=2"], "parallel.sequence_parallel=true"


class Setting:
    """A model, its data and an engine on them, on one rank."""

    def __init__(self, preset: str, ranks, stage: int, *overrides: str, masked_targets: bool = False):
        run = load_run_config(preset, overrides)
        vocab_size = load_tokenizer(run.tokenizer.path).vocab_size
        self.run = run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": vocab_size})})
        self.ranks, self.samples = ranks, 0
        self.layout = resolve_batch(run.train.global_batch_size, run.train.micro_batch_size, 1)
        self.data = TrainingData(
            [(run.data.train[0].prefix, 1.0)], run.seq_length, run.train.seed, run.data.split,
            mask_documents=run.data.mask_documents,
        )  # fmt: skip
        self.bare = LanguageModel(self.run.model)
        initialize_parameters(self.bare, self.run.model, run.train.seed)
        engine_config = resolve_engine_config(
            load_engine_config(ROOT / "ds_configs" / f"zero{stage}.json"),
            precision="fp32",
            run=self.run,
            batch=self.layout,
            data_parallel_size=1,
        )
        self.engine = TrainingEngine(copy.deepcopy(self.bare), self.run, engine_config, ranks, masked_targets)

    def step(self, lr: float = 1e-3) -> float:
        """One step of the engine; its mean loss."""
        with StepBatches(self.data, self.layout, self.ranks, self.samples, steps=1) as batches:
            losses, targets = self.engine.train_step(batches.next(), lr).tolist()
        assert targets == self.run.tokens_per_step
        self.samples += self.run.train.global_batch_size
        return losses / targets

    def weights(self) -> dict[str, torch.Tensor]:
        model = self.engine.model
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_the_gradient_is_that_of_the_mean_over_the_global_batch(preset, ranks, stage, micro_batch_size):
    """Accumulation 1 and 4. eps is large, so that the rounding of a gradient near zero does not decide an update."""
    setting = Setting(preset, ranks, stage, f"train.micro_batch_size={micro_batch_size}", "optimizer.eps=1e-3")
    run, bare = setting.run, setting.bare
    options = {"betas": run.optimizer.betas, "eps": run.optimizer.eps}
    optimizer = torch.optim.AdamW(parameter_groups(bare, run.optimizer.weight_decay), lr=1e-3, **options)
    for step in range(3):
        windows = torch.from_numpy(setting.data.batch(step * 8, 8).tokens.astype("int64"))
        loss = F.cross_entropy(bare(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(bare.parameters(), run.optimizer.gradient_clipping)
        optimizer.step()
        assert setting.step() == pytest.approx(loss.item(), rel=1e-6)
        assert setting.engine.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        assert norm > run.optimizer.gradient_clipping, "clipping is not active"
    for name, parameter in bare.named_parameters():
        torch.testing.assert_close(setting.weights()[name], parameter.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("micro_batch_size", [8, 4, 2])
def test_masked_targets_count_neither_in_the_loss_nor_in_its_divisor(preset, ranks, stage, micro_batch_size):
    """Padding is unevenly spread over the micro-batches: a mean of means would be another gradient."""
    options = f"train.micro_batch_size={micro_batch_size}", "optimizer.eps=1e-3", "optimizer.gradient_clipping=0"
    setting = Setting(preset, ranks, stage, *options, masked_targets=True)
    windows = torch.from_numpy(setting.data.batch(0, 8).tokens.astype("int64"))
    tokens, targets = windows[:, :-1], windows[:, 1:].clone()
    for row in range(8):
        targets[row, 32 - row**2 // 2 :] = -100
    F.cross_entropy(setting.bare(tokens).flatten(0, 1), targets.flatten()).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in setting.bare.parameters()])
    _, expected = setting.bare(tokens, targets)
    batches = zip(tokens.split(micro_batch_size), targets.split(micro_batch_size), strict=True)
    losses, count = setting.engine.train_step([MicroBatch(*batch, None, None) for batch in batches], 1e-3).tolist()
    assert count == (targets != -100).sum()
    assert losses == pytest.approx(expected.item(), rel=1e-6)
    assert setting.engine.grad_norm == pytest.approx(norm.item(), rel=1e-6)


@pytest.mark.parametrize("stage", [0, 3])
def test_documents_reach_the_model_through_the_engine(preset, ranks, stage):
    setting = Setting(preset, ranks, stage, "data.mask_documents=true")
    setting.engine.model.decoder.activation_checkpointing = True
    windows, positions = setting.data.batch(0, 8)
    windows, positions = torch.from_numpy(windows.astype("int64")), torch.from_numpy(positions)
    assert (positions == 0).sum() > 8, "no document ends inside of a window"
    _, loss = setting.bare(windows[:, :-1], windows[:, 1:], positions)
    found = setting.step()
    assert found == pytest.approx(loss.item() / (8 * 32), rel=1e-6)
    _, unmasked = setting.bare(windows[:, :-1], windows[:, 1:])
    assert found != pytest.approx(unmasked.item() / (8 * 32), rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_clipping_zero_is_off(preset, ranks, stage):
    """AdamW's first update does not depend on the gradient's size, its second does: only without clipping are they
    those of the bare loop, whose norms lie above 1, DeepSpeed's own default."""
    setting = Setting(preset, ranks, stage, "optimizer.gradient_clipping=0", "optimizer.eps=1e-3", "model.init_std=0.2")
    bare, optimizer = setting.bare, None
    options = {"betas": setting.run.optimizer.betas, "eps": 1e-3}
    optimizer = torch.optim.AdamW(parameter_groups(bare, setting.run.optimizer.weight_decay), lr=1e-3, **options)
    for step in range(2):
        windows = torch.from_numpy(setting.data.batch(step * 8, 8).tokens.astype("int64"))
        optimizer.zero_grad()
        F.cross_entropy(bare(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).backward()
        assert torch.nn.utils.get_total_norm([p.grad for p in bare.parameters()]) > 1.5
        optimizer.step()
        setting.step()
    for name, parameter in bare.named_parameters():
        torch.testing.assert_close(setting.weights()[name], parameter.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted(preset, ranks, stage, poison):
    setting = Setting(preset, ranks, stage)
    twin = Setting(preset, ranks, stage)
    for _ in range(2):
        setting.step()
        twin.step()
    before, scale = setting.weights(), setting.engine._gradient_scale
    setting.engine._gradient_scale = poison
    setting.step()
    setting.engine._gradient_scale = scale
    assert setting.engine.skipped_steps == 1
    assert not math.isfinite(setting.engine.grad_norm)
    after = setting.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)

    # Moments and step counts are untouched too: the next step is that of a run which never saw the bad batch.
    twin.samples = setting.samples
    assert setting.step() == twin.step()
    assert setting.engine.skipped_steps == 1
    after, expected = setting.weights(), twin.weights()
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert any(not torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_run_with_a_skipped_step_goes_on_and_says_so(command, preset, metrics, monkeypatch, tmp_path, stage):
    train_step, seen = TrainingEngine.train_step, []

    def poisoned(engine, *batch):
        seen.append(engine)
        scale = engine._gradient_scale
        engine._gradient_scale = math.nan if len(seen) == 4 else scale
        loss = train_step(engine, *batch)
        engine._gradient_scale = scale
        return loss

    monkeypatch.setattr(TrainingEngine, "train_step", poisoned)
    engine = ["--ds_config", ROOT / "ds_configs" / f"zero{stage}.json"]
    arguments = ["--preset", preset, *engine, "--run_dir", tmp_path, "checkpoint.interval=5"]
    assert command(*arguments, "train.max_steps=6").code == 0
    assert command(*arguments, "train.max_steps=8").code == 0
    records = metrics(tmp_path)
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["skipped_steps"] for record in records] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [record["step"] for record in records if record["grad_norm"] is None] == [4]
    assert records[-1]["loss"] < records[2]["loss"]


FP16 = {
    "fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 4, "hysteresis": 1},
    "zero_optimization": {"stage": 1},
}


def test_fp16_scales_the_loss_and_resumes_bit_for_bit(
    command, preset, metrics, monkeypatch, stopped_at_step, tmp_path, write_json
):
    # DeepSpeed asks for AVX512-FP16, since torch is slow without; it computes all the same.
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    engine = write_json("fp16.json", FP16)
    arguments = ["--preset", preset, "--ds_config", engine, "train.precision=auto", "train.max_steps=24", "--run_dir"]
    whole = command(*arguments, tmp_path / "whole")
    assert whole.code == 0, whole.err

    with stopped_at_step(13):
        assert "stopped by SIGTERM at step 13 of 24" in command(*arguments, tmp_path / "cut").out
    assert "at step 13" in command(*arguments, tmp_path / "cut").out

    records = metrics(tmp_path / "whole")
    scales = [record["loss_scale"] for record in records]
    assert min(scales) < scales[0], "no step overflowed"
    assert any(later > earlier for earlier, later in zip(scales, scales[1:], strict=False)), "the scale never grew"
    assert records[-1]["skipped_steps"] > 0
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    keys = ("step", "loss", "grad_norm", "lr", "loss_scale", "skipped_steps")
    cut = metrics(tmp_path / "cut")
    assert [[r[key] for key in keys] for r in cut] == [[r[key] for key in keys] for r in records]


@pytest.mark.skipif(get_accelerator().is_fp16_supported(), reason="this processor computes in fp16")
def test_fp16_where_the_device_has_none_is_a_users_mistake(command, preset, tmp_path):
    message = command("--preset", preset, "--run_dir", tmp_path, "train.precision=fp16").message()
    assert "fp16 is not supported" in message
    assert "train.precision=" in message


@pytest.mark.parametrize("where", ["__init__", "train_step"])
def test_out_of_memory_says_what_to_lower(command, preset, monkeypatch, tmp_path, where):
    arguments = ["--preset", preset, "--run_dir", tmp_path]
    assert command(*arguments, "train.max_steps=2").code == 0

    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(TrainingEngine, where, exhausted)
    message = command(*arguments, "train.max_steps=4").message()
    assert "out of memory" in message
    for advice in ("train.micro_batch_size=1", "train.activation_checkpointing=true", "zero3", "data.seq_length=16"):
        assert advice in message
    assert "parallel" not in message, "there is one rank"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize(
    ("overrides", "world_size", "on_a_node", "zero", "advised"),
    [
        ([], 4, 4, {}, "parallel.tensor_parallel_size=2 parallel.sequence_parallel=true"),
        ([], 3, 3, {}, None),  # of four heads
        ([*SIZE_2, ALONG_SEQUENCE], 8, 8, {}, "parallel.tensor_parallel_size=4"),
        ([*SIZE_2, ALONG_SEQUENCE], 8, 2, {}, None),  # over nodes
        ([*SIZE_2, ALONG_SEQUENCE], 12, 6, {}, None),
        (SIZE_2, 2, 2, {}, "parallel.sequence_parallel=true"),
        (["parallel.tensor_parallel_size=4", ALONG_SEQUENCE], 8, 8, {}, None),
        ([], 4, 4, {"stage": 3, "zero_hpz_partition_size": 2}, None),  # refused with it
    ],
)
def test_out_of_memory_advises_tensor_parallelism_that_fits(
    ranks_of, preset, overrides, world_size, on_a_node, zero, advised
):
    run = load_run_config(preset, [*overrides, "model.vocab_size=90"])
    plan = SimpleNamespace(
        run=run, engine_config={"zero_optimization": zero}, layout=SimpleNamespace(micro_batch_size=1),
        ranks=ranks_of(world_size=world_size, local_world_size=on_a_node),
    )  # fmt: skip
    message = str(out_of_memory(plan, torch.OutOfMemoryError("out of memory")))
    assert ("parallel." in message) == (advised is not None)
    assert advised is None or advised in message
