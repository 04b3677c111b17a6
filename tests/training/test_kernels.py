"""train.kernels and train.z_loss as a user meets them: chosen, refused, recorded, the same losses under every stage."""

import contextlib
import json
from pathlib import Path

import pytest
import torch
from layout_engines import as_run, run_config

from megaslm.errors import UserError
from megaslm.training import choose_attention, device

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
# Triton's interpreter takes milliseconds for a program: one row of 16 tokens, one layer.
SMALL = (
    "data.seq_length=16", "model.num_layers=1", "train.global_batch_size=2", "train.micro_batch_size=1",
    "train.max_steps=2", "eval.max_sequences=1",
)  # fmt: skip


def test_triton_is_refused_where_it_does_not_run(command, preset, tmp_path):
    message = command("--preset", preset, "train.kernels=triton", "--run_dir", tmp_path / "run").message()
    assert "train.kernels=triton: the triton kernels do not run here" in message
    assert "use train.kernels=auto or reference" in message


def test_the_kernels_train_as_the_reference_under_every_stage(pretrain_in_turn, preset, metrics, tmp_path):
    """Triton's kernels, interpreted, inside DeepSpeed: activation checkpointing, and weights that ZeRO-3 gathers."""
    layouts = [("reference", 1), ("triton", 1), ("triton", 2), ("triton", 3)]
    commands = []
    for kernels, stage in layouts:
        options = [f"train.kernels={kernels}", "train.z_loss=0.01"]
        options.append(f"train.activation_checkpointing={'true' if stage == 3 else 'false'}")
        where = ["--ds_config", DS_CONFIGS / f"zero{stage}.json", "--run_dir", tmp_path / f"{kernels}{stage}"]
        commands.append({"arguments": ["--preset", preset, *where, *SMALL, *options]})
    finished = pretrain_in_turn(commands, ranks=2, env={"TRITON_INTERPRET": "1"})
    assert finished.out.count("kernels triton, gloo") == 3 and finished.out.count("kernels reference, gloo") == 1
    runs = {}
    for kernels, stage in layouts:
        folder = tmp_path / f"{kernels}{stage}"
        assert json.loads((folder / "environment.json").read_text())["kernels"] == kernels
        runs[kernels, stage] = [(record["loss"], record["grad_norm"]) for record in metrics(folder)]
    expected = runs.pop(("reference", 1))
    assert len(expected) == 2
    for layout, values in runs.items():
        for ours, theirs in zip(values, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), layout


def test_z_loss_is_minimised_and_not_reported(command, preset, metrics, tmp_path):
    """At the first step the reported loss is the same; what is minimised differs, and so does the second step."""
    losses = []
    for z_loss in (0, 1):
        folder = tmp_path / str(z_loss)
        command("--preset", preset, "--run_dir", folder, "train.max_steps=2", f"train.z_loss={z_loss}")
        losses.append([(record["loss"], record["grad_norm"]) for record in metrics(folder)])
    assert losses[0][0][0] == pytest.approx(losses[1][0][0], rel=1e-6)
    assert losses[0][0][1] != pytest.approx(losses[1][0][1], rel=1e-2)
    assert losses[0][1][0] != losses[1][1][0]


@pytest.mark.parametrize("attention", ["flash", "cudnn"])
def test_an_attention_that_the_device_has_not_is_a_users_mistake(command, preset, tmp_path, attention):
    message = command("--preset", preset, "--run_dir", tmp_path, f"train.attention={attention}").message()
    assert f"train.attention={attention} does not run on" in message
    assert "it needs a GPU; use train.attention=auto" in message


def test_within_documents_no_attention_is_tried_that_would_have_no_effect(monkeypatch):
    monkeypatch.setattr(device, "attention_obstacle", lambda *_: "none of it")
    monkeypatch.setattr(device, "prefer_attention", lambda name: None)
    for masked in (False, True):
        run = as_run(run_config(train={"attention": "flash"}, data={"mask_documents": masked}))
        with contextlib.nullcontext() if masked else pytest.raises(UserError, match="none of it"):
            choose_attention(run, "bf16", torch.device("cpu"), 1)
