"""--resume weights --from PATH: a new run that starts from the weights of another one, and is continued as any run."""

import json
import shutil

import pytest
import torch

from megaslm.checkpoint import Piece, open_checkpoint, write_checkpoint
from megaslm.data import TextSource, build_token_file, character_tokenizer


@pytest.fixture(scope="module")
def source(preset, pretrain_in_turn, tmp_path_factory):
    """Run folder with checkpoints of steps 5 and 10."""
    folder = tmp_path_factory.mktemp("source") / "run"
    arguments = ["--preset", preset, "--run_dir", folder, "train.max_steps=10", "checkpoint.interval=5"]
    pretrain_in_turn([{"arguments": arguments}], None)
    return folder


@pytest.fixture
def start_from(command, preset, tmp_path):
    """start_from(source, override, ...) -> Finished"""

    def run(source, *overrides, run_dir=None):
        folder = run_dir or tmp_path / "new"
        arguments = ["--preset", preset, "--run_dir", folder, "--resume", "weights", "--from", source]
        return command(*arguments, "train.max_steps=6", *overrides)

    return run


def contents(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_new_run_has_the_weights_and_nothing_else_of_the_old_one(start_from, source, metrics, tmp_path):
    before = contents(source)
    result = start_from(source, "train.seed=7", "optimizer.lr=1e-30", "checkpoint.interval=2")
    assert result.code == 0, result.out + result.err
    assert f"a new run from the weights of {source}/checkpoints/step_00000010\n" in result.out
    old = open_checkpoint(source / "checkpoints" / "step_00000010")
    new = open_checkpoint(tmp_path / "new" / "checkpoints" / "step_00000002")
    # At such a rate no weight moves: what is there is what it started from, with moments of two steps.
    assert all(torch.equal(new.read(name), old.read(name)) for name in old.shapes)
    assert set(new.optimizer["steps"].values()) == {2} and set(old.optimizer["steps"].values()) == {10}
    assert new.global_state["progress"]["samples"] == 2 * 8
    assert new.global_state["progress"]["weights_from"] == {
        "from": str(source),
        "checkpoint": str(source / "checkpoints" / "step_00000010"),
        "run": old.run_config["name"],
        "step": 10,
        "imported_from": None,
        "sha256": old.manifest["sha256"],
    }
    assert [record["step"] for record in metrics(tmp_path / "new")] == [1, 2, 3, 4, 5, 6]
    assert metrics(tmp_path / "new")[0]["loss"] < 0.8 * metrics(source)[0]["loss"]
    assert contents(source) == before


def test_a_checkpoint_may_be_named_and_the_model_may_change_where_no_shape_does(start_from, source, tmp_path):
    result = start_from(source / "checkpoints" / "step_00000005", "model.rope_theta=500000")
    assert result.code == 0, result.out + result.err
    assert "step_00000005, with model.rope_theta 10000.0 -> 500000.0" in result.out
    state = open_checkpoint(tmp_path / "new" / "checkpoints" / "step_00000006").global_state
    assert state["progress"]["weights_from"]["step"] == 5


def test_weights_alone_are_enough(start_from, source, tmp_path):
    """As an import writes them: no optimizer, no state of a run."""
    old = open_checkpoint(source / "checkpoints" / "step_00000010")
    pieces = {"weights": [Piece.whole(name, old.read(name)) for name in old.shapes]}
    path = write_checkpoint(tmp_path, pieces, step=0, run_config={}, global_state={}, optimizer=None)
    result = start_from(path)
    assert result.code == 0, result.out + result.err


def test_the_same_command_continues_the_new_run(start_from, command, preset, source, metrics, tmp_path):
    options = ["checkpoint.interval=3", "schedule.horizon_steps=6"]
    assert start_from(source, *options).code == 0
    assert start_from(source, *options, "train.max_steps=3", run_dir=tmp_path / "cut").code == 0
    again = start_from(source, *options, run_dir=tmp_path / "cut")
    assert "continuing from" in again.out and "a new run from" not in again.out
    assert [r["loss"] for r in metrics(tmp_path / "cut")] == [r["loss"] for r in metrics(tmp_path / "new")]
    # Afterwards --resume weights may be left out.
    plain = command("--preset", preset, "--run_dir", tmp_path / "cut", *options, "train.max_steps=8")
    assert plain.code == 0 and "continuing from" in plain.out


def test_the_newest_sound_one_of_a_damaged_run_is_taken(start_from, source, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    (damaged / "checkpoints" / "step_00000010" / "weights_00000.safetensors").write_bytes(b"x")
    result = start_from(damaged)
    assert result.code == 0 and "weights_00000.safetensors has 1 bytes" in result.out
    assert f"a new run from the weights of {damaged}/checkpoints/step_00000005" in result.out


def test_a_link_stays_the_same_source_when_it_moves_on(start_from, source, tmp_path):
    link = source / "checkpoints" / "lm_current"
    link.symlink_to("step_00000005")
    try:
        assert "/step_00000005" in start_from(link, "train.max_steps=3", "schedule.horizon_steps=6").out
        link.unlink()
        link.symlink_to("step_00000010")
        again = start_from(link, "schedule.horizon_steps=6")
        assert again.code == 0 and "continuing from" in again.out, again.err
    finally:
        link.unlink()


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/step_00000005"])
def test_the_folder_of_the_source_is_refused(start_from, source, inside):
    before = contents(source)
    message = start_from(source / inside, run_dir=source).message()
    assert "is in the run folder itself" in message and "choose another --run_dir" in message
    assert contents(source) == before


def test_a_folder_that_holds_another_run_is_refused(start_from, command, preset, source, tmp_path):
    assert command("--preset", preset, "--run_dir", tmp_path / "new", "train.max_steps=2").code == 0
    assert "holds a run that started without given weights" in start_from(source).message()
    assert start_from(source, run_dir=tmp_path / "second").code == 0
    other = start_from(source / "checkpoints" / "step_00000005", run_dir=tmp_path / "second").message()
    assert f"holds a run that started from the weights of {source};" in other


def test_another_model_is_refused_by_the_tensors_that_differ(start_from, source, tmp_path):
    message = start_from(source, "model.ffn_hidden_size=96").message()
    assert "is of another model" in message and "[" in message
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_another_tokenizer_is_refused(start_from, source, corpus, tmp_path):
    """Of as many characters: the shapes would fit, and the embeddings mean other tokens."""
    documents = corpus.text.read_text().replace("cat", "zzt")
    (tmp_path / "text.jsonl").write_text(documents)
    tokenizer = character_tokenizer([json.loads(line)["text"] for line in documents.splitlines()])
    assert tokenizer.vocab_size == corpus.vocab_size
    tokenizer.save(tmp_path / "tokenizer")
    build_token_file(iter(TextSource([tmp_path / "text.jsonl"])), tokenizer, str(tmp_path / "tokens"))
    data = [f"data.train={tmp_path / 'tokens'}", f"tokenizer.path={tmp_path / 'tokenizer'}"]
    assert "trained with another tokenizer" in start_from(source, *data).message()


@pytest.mark.parametrize("arguments", [["--resume", "weights"], ["--from", "somewhere"]])
def test_one_option_without_the_other_is_refused(command, preset, arguments):
    assert "belong together" in command("--preset", preset, *arguments).message()


def test_a_source_that_is_none(start_from, tmp_path):
    assert "there is no checkpoint" in start_from(tmp_path / "nowhere").message()
    (tmp_path / "empty").mkdir()
    assert "is not a megaslm checkpoint" in start_from(tmp_path / "empty").message()
