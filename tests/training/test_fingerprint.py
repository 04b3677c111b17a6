"""Every save of a run says what its model computes, and no run goes on with one that computes something else."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from megaslm.checkpoint import Checkpoint, compare_fingerprints, list_checkpoints, open_checkpoint, take_fingerprint
from megaslm.checkpoint.format import read_manifest, write_manifest
from megaslm.data import TokenFile, TokenFileWriter, ValidationData, load_tokenizer
from megaslm.model import build_model
from megaslm.training import loop
from megaslm.training import run as run_module
from megaslm.training.preparation import first_tokens

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start(command, preset, tmp_path):
    """start(argument, ..., name="run") -> Finished"""

    def run(*arguments, name: str = "run"):
        options = ["train.max_steps=6", "schedule.horizon_steps=6", "checkpoint.interval=3"]
        return command("--preset", preset, "--run_dir", tmp_path / name, *options, *arguments)

    return run


@pytest.fixture
def first_three(start, tmp_path) -> Path:
    """A run that has made 3 of its 6 steps; its checkpoint."""
    assert start("train.max_steps=3").code == 0
    return tmp_path / "run" / "checkpoints" / "step_00000003"


def checkpoints(folder: Path) -> list[Checkpoint]:
    return [open_checkpoint(path) for path in list_checkpoints(folder / "checkpoints")]


def rebuilt(checkpoint: Checkpoint) -> torch.nn.Module:
    model = build_model(checkpoint.model_config, seed=9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.read(name))
    return model


def rewrite_manifest(path: Path, **changes) -> None:
    manifest = {key: value for key, value in read_manifest(path).items() if key != "sha256"}
    write_manifest(path, manifest | changes)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "bf16")])
def test_every_save_has_the_fingerprint_of_its_step_and_the_tokenizer(
    start, corpus, write_json, tmp_path, stage, precision
):
    """Also those that are written in the background, while the weights move on."""
    engine = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    if stage == 3:
        engine["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # all weights are released between uses
    options = ["--ds_config", write_json("engine.json", engine), f"train.precision={precision}"]
    finished = start(*options, "checkpoint.keep_last=9")
    assert finished.code == 0, finished.err
    saved = checkpoints(tmp_path / "run")
    assert [one.step for one in saved] == [3, 6]
    held_out = ValidationData([corpus.prefix], 32, split="95,5").parts[0].tokens[:33]
    for one in saved:
        stored = one.fingerprint
        assert stored.figures.keys() == ({"fp32", "bf16", "fp16"} if precision == "fp32" else {precision})
        assert stored.tokens == held_out.tolist() and stored.precision == precision
        now = take_fingerprint(rebuilt(one), stored.tokens, precision, "cpu")
        assert (stored.loss, *stored.logits) == pytest.approx((now.loss, *now.logits), rel=1e-6)
        assert one.tokenizer().same_files(load_tokenizer(corpus.tokenizer))
    assert compare_fingerprints(saved[0].fingerprint, saved[1].fingerprint) is not None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("resume", ["auto", "weights"])
def test_a_model_that_computes_something_else_is_refused(start, first_three, monkeypatch, tmp_path, precision, resume):
    restore = loop.restore

    def restore_mixed_up(checkpoint, engine, **options):
        state = restore(checkpoint, engine, **options)
        weight = engine.module.decoder.blocks[1].attention.qkv.weight.data
        weight.copy_(weight.roll(1, 0))
        return state

    monkeypatch.setattr(loop, "restore", restore_mixed_up)
    rewrite_manifest(first_three, code=read_manifest(first_three)["code"] | {"torch": "1.0"})
    options = ["--resume", "weights", "--from", first_three] if resume == "weights" else []
    message = start(*options, f"train.precision={precision}", name="new" if options else "run").message()
    stored = open_checkpoint(first_three).fingerprint
    for part in (
        f"the model restored from {first_three} does not compute what it did when it was saved",
        f"(weights in {precision})",
        f"torch 1.0 -> {torch.__version__}; kernels reference, precision {precision}. Try",
        "the versions that saved it, or another machine",
    ):
        assert part in message
    assert ("train.precision=fp32, as it was saved" in message) is (precision == "bf16")
    assert "train.kernels" not in message, "it is the reference already"
    before = stored.figures[precision].loss
    assert f"was {before:.7g} and is" in message or "the logit that is furthest off was" in message
    assert [path.name for path in first_three.parent.iterdir()] == [first_three.name]
    assert not (tmp_path / "run" / "before_step_00000003").exists()


def test_the_run_that_goes_on_in_another_precision_is_not(start, first_three, tmp_path):
    finished = start("train.precision=bf16")
    assert finished.code == 0 and f"continuing from {first_three}" in finished.out and "warning" not in finished.out
    assert [one.fingerprint.precision for one in checkpoints(tmp_path / "run")] == ["fp32", "bf16"]


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"precision": "fp8"}, "it is of weights in fp8, which this megaslm does not know"),
        ({"tokens": [1] * 34}, "its 33 tokens do not fit in a context of 32"),
        ({"rounded": {}}, "weights in fp32 and in bf16"),
        ({"logits": None}, "a fingerprint that this megaslm does not understand"),
    ],
)
def test_a_fingerprint_that_can_t_be_compared_is_a_warning(start, first_three, caplog, changes, warning):
    rewrite_manifest(first_three, fingerprint=read_manifest(first_three)["fingerprint"] | changes)
    finished = start("train.precision=bf16", "train.max_steps=4")
    assert finished.code == 0 and f"continuing from {first_three}" in finished.out
    assert warning in finished.out + caplog.text and "not compared" in finished.out + caplog.text


def test_a_device_without_room_for_the_fingerprint_is_no_reason_to_lose_a_save(start, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop, "take_fingerprint", fail)
    finished = start("checkpoint.keep_last=9")
    assert finished.code == 0, finished.err
    for step in (3, 6):
        assert f"rank 0 has no device memory left for the fingerprint of step {step}" in finished.out
    assert [(one.step, one.fingerprint) for one in checkpoints(tmp_path / "run")] == [(3, None), (6, None)]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not tell the open files")
def test_weights_are_read_though_their_run_deletes_them_and_are_let_go(start, first_three, monkeypatch, tmp_path):
    restore = loop.restore

    def restore_deleted(checkpoint, engine, **options):
        shutil.rmtree(first_three)
        state = restore(checkpoint, engine, **options)
        kept = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        assert not [name for name in kept if str(first_three) in name]
        return state

    monkeypatch.setattr(loop, "restore", restore_deleted)
    finished = start("--resume", "weights", "--from", first_three, "train.max_steps=1", name="new")
    assert finished.code == 0, finished.err


def test_weights_alone_are_no_run_to_continue(start, first_three):
    """An import, say, by the name of a step in a run's folder of checkpoints."""
    state = read_manifest(first_three)["global_state"]
    rewrite_manifest(first_three, optimizer=None, global_state={"identity": state["identity"], "imported_from": {}})
    message = start().message()
    assert f"{first_three} holds weights alone" in message and f"--resume weights --from {first_three}" in message


@pytest.mark.parametrize("compiled", [False, True])
def test_its_one_sequence_compiles_nothing(start, monkeypatch, tmp_path, compiled):
    """Its length is not that of training: every block would be compiled anew."""
    stances = []
    for name in ("take_fingerprint", "check_fingerprint"):
        function = getattr(loop, name)

        def watched(*arguments, function=function, **options):
            stances.append(torch._dynamo.eval_frame._stance.stance)
            return function(*arguments, **options)

        monkeypatch.setattr(loop, name, watched)
    monkeypatch.setattr(run_module, "compile_blocks", lambda *arguments: None)
    for steps in (1, 2):
        assert start(f"train.compile={json.dumps(compiled)}", f"train.max_steps={steps}").code == 0
    assert stances == ["force_eager" if compiled else "default"] * 3


def test_a_checkpoint_from_before_all_this_goes_on(start, first_three, metrics, tmp_path):
    """Without a fingerprint, a tokenizer and the fields that came into the model's config since.

    And the saves of a run, with all that is computed for them, leave no trace in its losses.
    """
    assert start("checkpoint.interval=0", name="whole").code == 0
    manifest = read_manifest(first_three)
    state, run = manifest["global_state"], manifest["run_config"]
    assert state["identity"].pop("model.rope_original_context") is None
    del run["model"]["rope_original_context"]
    files = {name: entry for name, entry in manifest["files"].items() if not name.startswith("tokenizer")}
    rewrite_manifest(first_three, files=files, global_state=state, run_config=run, fingerprint=None)
    finished = start()
    assert finished.code == 0 and f"continuing from {first_three}" in finished.out
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("run", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_weights_that_are_not_finite_are_saved_and_continued(start, tmp_path):
    options = ["train.precision=fp32", "schedule.warmup_steps=0", "optimizer.lr=3e38"]
    finished = start(*options, "train.max_steps=3")
    assert finished.code == 0, finished.err
    assert np.isnan(checkpoints(tmp_path / "run")[0].fingerprint.loss)
    finished = start(*options)
    assert finished.code == 0 and "continuing from" in finished.out


def test_a_short_context_and_no_tokenizer(start, corpus, tmp_path):
    file = TokenFile(corpus.prefix)
    prefix = str(tmp_path / "tokens")
    with TokenFileWriter(prefix, corpus.vocab_size, None) as writer:
        writer.extend(np.array_split(file.tokens, 100))
        writer.finish()
    lengths = ["model.context_length=16", "data.seq_length=16", f"model.vocab_size={corpus.vocab_size}"]
    finished = start(*lengths, f"data.train={prefix}", "tokenizer.path=null")
    assert finished.code == 0, finished.err
    (one,) = checkpoints(tmp_path / "run")[-1:]
    assert one.tokenizer() is None and not (one.path / "tokenizer").exists()
    assert len(one.fingerprint.tokens) == 17


def test_few_held_out_tokens_are_taken_over_again(tmp_path):
    prefix = str(tmp_path / "tokens")
    with TokenFileWriter(prefix, 10, None) as writer:
        writer.extend([np.array([7, 8, 9])])
        writer.finish()
    assert first_tokens({"held out": ValidationData([prefix], 8)}, 7) == [7, 8, 9, 7, 8, 9, 7]


def test_held_out_tokens_outside_the_vocabulary_are_told_before_the_engine_is_built(start, monkeypatch, tmp_path):
    """Nobody has looked at a file without a manifest; on a GPU such an id ends the process without a word."""
    prefix = str(tmp_path / "tokens")
    with TokenFileWriter(prefix, 10_000, None) as writer:
        writer.extend([np.full(100, 9_999)])
        writer.finish()
    Path(f"{prefix}.json").unlink()
    monkeypatch.setattr(run_module, "TrainingEngine", lambda *arguments: 1 / 0)
    assert "token 0 has id 9999, outside the model's vocabulary" in start(f"data.validation={prefix}").message()
