"""What a run will put on the disk."""

import pytest

from megaslm.checkpoint import list_checkpoints
from megaslm.cluster.storage import existing_parent, free_for_run, model_of, uncounted_settings
from megaslm.config import load_run_config
from megaslm.planning import checkpoint_bytes


def test_settings_that_keep_more_than_is_counted(preset):
    def uncounted(*overrides: str) -> list[str]:
        return uncounted_settings(load_run_config(preset, ["checkpoint.interval=10", *overrides]))

    assert uncounted("train.max_epochs=3") == uncounted("checkpoint.keep_every=20") == []
    assert uncounted("train.max_epochs=3", "checkpoint.keep_every=20") == ["checkpoint.keep_every"]
    assert uncounted("checkpoint.every_epoch=true") == ["checkpoint.every_epoch"]


def test_the_size_is_that_of_a_real_checkpoint(command, preset, tmp_path):
    """Its manifest and the tokenizer are some kB."""
    assert command("--preset", preset, "--run_dir", tmp_path / "run", "train.max_steps=2").code == 0
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    real = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert checkpoint_bytes(model_of(load_run_config(preset))) == pytest.approx(real, rel=0.05)
    free, taken = free_for_run(tmp_path / "run")
    assert free > 0 and taken >= real


def test_the_vocabulary_may_not_be_known_yet(preset, corpus):
    run = load_run_config(preset, [f"data.input={corpus.text}", "tokenizer.path=null", "tokenizer.type=char"])
    assert model_of(run) is None


def test_the_folder_that_is_there(tmp_path):
    assert existing_parent(tmp_path / "runs" / "new") == tmp_path
