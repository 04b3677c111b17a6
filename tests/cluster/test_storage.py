"""What a run will put on the disk."""

import pytest

from megaslm.checkpoint import list_checkpoints
from megaslm.cluster.storage import existing_parent, free_for_run, model_of, planned_checkpoints
from megaslm.config import load_run_config
from megaslm.planning import checkpoint_bytes


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # 100 saves; the newest two, the best, and one in flight.
        (["train.max_steps=1000", "checkpoint.interval=10", "checkpoint.keep_last=2"], 4),
        (["train.max_steps=1000", "checkpoint.interval=10", "checkpoint.keep_last=2", "checkpoint.keep_best=false"], 3),
        # And every 200th for good.
        (["train.max_steps=1000", "checkpoint.interval=10", "checkpoint.keep_last=2", "checkpoint.keep_every=200"], 9),
        # At the end alone, and the best.
        (["train.max_steps=1000", "checkpoint.interval=0"], 2),
        (["train.max_steps=1000", "checkpoint.interval=0", "checkpoint.keep_best=false"], 1),
        # 8 sequences of 32 tokens a step: 4 steps, of which 2 save, as does the end.
        (["train.max_tokens=1000", "checkpoint.interval=2", "checkpoint.keep_best=false"], 3),
    ],
)
def test_how_many_checkpoints(preset, overrides, expected):
    assert planned_checkpoints(load_run_config(preset, overrides)) == expected


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
