"""The folder on the disk: round trip, damage, foreign folders, interrupted saves, retention. No engine, one rank."""

import errno
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megaslm.checkpoint import (
    DamagedCheckpoint,
    Part,
    Piece,
    Retention,
    SaveFailed,
    apply_retention,
    check_compatible,
    latest_sound,
    list_checkpoints,
    open_checkpoint,
    write_checkpoint,
)
from megaslm.checkpoint import folder as folder_module
from megaslm.checkpoint.folder import assign_writers
from megaslm.checkpoint.format import Checkpoint, read_manifest, write_manifest
from megaslm.checkpoint.safetensors_file import write_safetensors
from megaslm.errors import UserError
from megaslm.parallel import Block

OPTIMIZER = {
    "type": "adam",
    "moments": ["exp_avg", "exp_avg_sq"],
    "steps": {"a": 3, "b": 3, "c": 3},
    "loss_scaler": None,
}


def make_tensors() -> dict[str, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    shapes = {"a": (5, 3), "b": (7,), "c": (), "d": (2, 3, 4)}
    return {kind: {n: torch.randn(s) for n, s in shapes.items()} for kind in ("weights", "exp_avg", "exp_avg_sq")}


def as_pieces(tensors: dict[str, dict[str, torch.Tensor]]) -> dict[str, list[Piece]]:
    return {kind: [Piece.whole(name, tensor) for name, tensor in part.items()] for kind, part in tensors.items()}


def read_flat(checkpoint: Checkpoint, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of the flattened tensor."""
    return checkpoint.read_part(kind, name, Part(Block.whole(checkpoint.shapes[name]), start, stop))


def write(directory: Path, step: int, **changes) -> Path:
    arguments = {"run_config": {"name": "x"}, "global_state": {"samples": 8}, "optimizer": OPTIMIZER} | changes
    return write_checkpoint(directory, as_pieces(make_tensors()), step=step, **arguments)


def test_round_trip(tmp_path):
    tensors = make_tensors()
    path = write(tmp_path, 1000)
    assert path.name == "step_00001000"
    assert [p.name for p in tmp_path.iterdir()] == ["step_00001000"]
    checkpoint = open_checkpoint(path)
    assert checkpoint.step == 1000 and checkpoint.run_config == {"name": "x"}
    assert checkpoint.global_state == {"samples": 8} and checkpoint.optimizer == OPTIMIZER
    assert checkpoint.shapes == {"a": (5, 3), "b": (7,), "c": (), "d": (2, 3, 4)}
    for kind, part in tensors.items():
        for name, tensor in part.items():
            assert torch.equal(checkpoint.read(name, kind), tensor)
            flat = tensor.reshape(-1)
            for start, stop in [(0, flat.numel()), (0, 1), (flat.numel() // 3, flat.numel() // 2 + 1)]:
                assert torch.equal(read_flat(checkpoint, kind, name, start, stop), flat[start:stop])
    # The files are plain safetensors for everyone else.
    assert torch.equal(load_file(path / "exp_avg_00000.safetensors")["a"], tensors["exp_avg"]["a"])


def test_bits_survive(tmp_path):
    odd = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45])
    pieces = as_pieces({"weights": {"odd": odd}})
    path = write_checkpoint(tmp_path, pieces, step=0, run_config={}, global_state={}, optimizer=None)
    assert torch.equal(open_checkpoint(path).read("odd").view(torch.int32), odd.view(torch.int32))


def open_pieces(folder: Path, shape: list[int], pieces: list[dict]) -> Checkpoint:
    tensors = {"weights": {"w": {"shape": shape, "pieces": pieces}}}
    return Checkpoint(folder, {"step": 1, "run_config": {}, "global_state": {}, "optimizer": None, "tensors": tensors})


def test_tensor_in_pieces(tmp_path):
    """As the ranks of ZeRO hold it: cut anywhere in the flattened tensor, in the middle of a row too."""
    whole = torch.arange(35.0).view(7, 5)
    cuts, pieces = [0, 3, 4, 17, 35], []
    for file, (start, stop) in enumerate(itertools.pairwise(cuts)):
        write_safetensors(tmp_path / str(file), {"w": whole.view(-1)[start:stop]})
        pieces.append({"file": str(file), "start": start, "numel": stop - start})
    checkpoint = open_pieces(tmp_path, [7, 5], pieces[::-1])
    assert torch.equal(checkpoint.read("w"), whole)
    for start, stop in itertools.combinations(range(36), 2):
        assert torch.equal(read_flat(checkpoint, "weights", "w", start, stop), whole.reshape(-1)[start:stop])


def test_tensor_in_blocks(tmp_path):
    """The place for tensor-parallel slices: cut along both dimensions, and each slice flat over two ranks of ZeRO."""
    whole = torch.arange(35.0).view(7, 5)
    pieces = []
    for top, low, left, right in ((0, 4, 0, 2), (0, 4, 2, 5), (4, 7, 0, 2), (4, 7, 2, 5)):
        block = whole[top:low, left:right].reshape(-1)
        for start, stop in ((0, 5), (5, block.numel())):
            file = f"{top}.{left}.{start}"
            write_safetensors(tmp_path / file, {"w": block[start:stop]})
            place = {"offset": [top, left], "shape": [low - top, right - left]}
            pieces.append({"file": file, "start": start, "numel": stop - start, "block": place})
    checkpoint = open_pieces(tmp_path, [7, 5], pieces)
    assert torch.equal(checkpoint.read("w"), whole)
    assert torch.equal(read_flat(checkpoint, "weights", "w", 4, 23), whole.reshape(-1)[4:23])


@pytest.mark.parametrize("cut", [[(0, 10)], [(0, 10), (11, 15)], [(0, 10), (9, 15)]], ids=["end", "gap", "overlap"])
def test_a_tensor_that_is_not_whole_gets_no_name(tmp_path, cut):
    """An invariant of ours: the pieces of all ranks make up every tensor."""
    for start, stop in cut:
        piece = Piece("w", (5, 3), Part(Block.whole((5, 3)), start, stop), torch.zeros(stop - start))
        with pytest.raises(AssertionError, match="weights of w is not whole"):
            write_checkpoint(tmp_path, {"weights": [piece]}, step=1, run_config={}, global_state={}, optimizer=None)
    assert list_checkpoints(tmp_path) == []


def test_every_flipped_byte_is_named(tmp_path):
    """Every byte of every file, one after the other."""
    path = write(tmp_path, 1)
    for file in sorted(path.iterdir()):
        sound = file.read_bytes()
        for place in range(len(sound)):
            damaged = bytearray(sound)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            with pytest.raises(DamagedCheckpoint, match=file.name):
                open_checkpoint(path)
        file.write_bytes(sound)
    open_checkpoint(path)


@pytest.mark.parametrize("name", ["manifest.json", "weights_00000.safetensors", "exp_avg_sq_00000.safetensors"])
def test_truncated_and_missing_files_are_named(tmp_path, name):
    path = write(tmp_path, 1)
    file = path / name
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(DamagedCheckpoint, match=name):
        open_checkpoint(path, verify=False)
    file.unlink()
    with pytest.raises(DamagedCheckpoint, match=f"{name} is missing"):
        open_checkpoint(path, verify=False)


def test_newer_version_is_refused(tmp_path):
    path = write(tmp_path, 1)
    manifest = {key: value for key, value in read_manifest(path).items() if key != "sha256"}
    write_manifest(path, manifest | {"version": 4})
    with pytest.raises(UserError, match="format version 4, this megaslm reads 2 and 3.*a newer one"):
        open_checkpoint(path)
    with pytest.raises(UserError, match="format version 4"):  # not passed over for an older one
        latest_sound(tmp_path, print)
    write_manifest(path, manifest | {"version": 1})
    with pytest.raises(UserError, match="format version 1, this megaslm reads 2 and 3.*start anew"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("files", "looks"),
    [
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], "a DeepSpeed checkpoint"),
        (["config.json", "model.safetensors"], "a Hugging Face model"),
        (["latest_checkpointed_iteration.txt"], "Megatron-LM"),
        ([".metadata", "__0_0.distcp"], "PyTorch distributed"),
        (["ckpt.pt"], "pickled"),
        (["notes.txt"], "it holds notes.txt"),
    ],
)
def test_foreign_folders_are_recognised(tmp_path, files, looks):
    for file in files:
        (tmp_path / file).write_text("x")
    with pytest.raises(UserError, match=looks) as caught:
        open_checkpoint(tmp_path)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        open_checkpoint(tmp_path / "nowhere")
    write(tmp_path, 7)
    with pytest.raises(UserError, match="holds checkpoints but is none itself.*step_00000007"):
        open_checkpoint(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        open_checkpoint(tmp_path / "file")
    (tmp_path / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(UserError, match="not the manifest of a megaslm checkpoint"):
        open_checkpoint(tmp_path)


def test_latest_sound_falls_back(tmp_path):
    assert latest_sound(tmp_path / "nowhere", print) is None
    for step in (1, 2, 3):
        write(tmp_path, step)
    reports = []
    (tmp_path / "step_00000003" / "manifest.json").unlink()
    file = tmp_path / "step_00000002" / "weights_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert latest_sound(tmp_path, reports.append).step == 1
    assert ["step_00000003" in reports[0], "step_00000002" in reports[1], len(reports)] == [True, True, 2]
    assert "weights_00000.safetensors" in reports[1]
    shutil.rmtree(tmp_path / "step_00000001")
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        latest_sound(tmp_path, reports.append)


def test_after_a_fall_back_the_run_is_what_it_wrote_since(tmp_path):
    """Step 9 could not be read for a while (its disk was away): the run went on from 3, and that is where it is."""
    for step in (3, 9, 4):
        write(tmp_path, step)
    assert latest_sound(tmp_path, print).step == 4


def test_killed_saves_leave_nothing_behind(tmp_path):
    write(tmp_path, 1)
    # Killed while writing, while deleting, and between the two renames of a replacement.
    (tmp_path / ".step_00000002.tmp").mkdir()
    (tmp_path / ".step_00000002.tmp" / "weights_00000.safetensors").write_text("half")
    (tmp_path / ".step_00000000.deleted").mkdir()
    (tmp_path / "step_00000001").rename(tmp_path / ".step_00000001.old")
    assert list_checkpoints(tmp_path) == []
    assert latest_sound(tmp_path, print).step == 1
    write(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002"]


def test_what_cannot_be_deleted_stops_no_save(tmp_path):
    """A checkpoint that was moved to another disk, with a link left in its place: the link goes, and nothing else."""
    elsewhere = write(tmp_path / "elsewhere", 1)
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    (directory / "step_00000001").symlink_to(elsewhere)
    (directory / ".step_00000002.0.tmp").write_text("a file, which is no folder")
    write(directory, 2)
    write(directory, 3)
    assert kept(directory, keep_last=1) == [3]
    assert open_checkpoint(elsewhere).step == 1
    write(directory, 4)
    assert latest_sound(directory, print).step == 4


def test_what_cannot_be_read_or_is_not_ours_is_never_deleted(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, marks={"epoch": 1} if step == 1 else None)
    (tmp_path / "step_00000001" / "manifest.json").write_bytes(b"{}")  # as of a disk that is away for a while
    (tmp_path / "step_00000150").mkdir()
    (tmp_path / "step_00000150" / "notes.txt").write_text("mine")
    assert kept(tmp_path, keep_last=1) == [1, 4, 150]


def test_a_checkpoint_that_has_its_name_is_saved_whatever_fails_then(tmp_path, monkeypatch):
    """A file system that can't sync folders."""

    def refuse(folder):
        if folder == tmp_path:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(folder_module, "sync_folder", refuse)
    assert open_checkpoint(write(tmp_path, 1)).step == 1


def test_a_folder_that_is_gone_is_a_save_that_failed(tmp_path, monkeypatch):
    def gone(directory):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr(folder_module, "_undo_interrupted_replacements", gone)
    monkeypatch.setattr(folder_module, "list_checkpoints", gone)
    with pytest.raises(SaveFailed, match="Transport endpoint.*which checkpoints are there can't be seen"):
        write(tmp_path, 1)


def test_a_message_names_the_last_one_that_is_sound(tmp_path, monkeypatch):
    for step in (1, 9, 2):  # after a fall back from step 9
        write(tmp_path, step)
    monkeypatch.setattr(folder_module, "_publish", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(SaveFailed, match="the last sound checkpoint is step_00000002"):
        write(tmp_path, 3)


def test_same_step_is_replaced(tmp_path):
    write(tmp_path, 1)
    path = write(tmp_path, 1, global_state={"samples": 9})
    assert open_checkpoint(path).global_state == {"samples": 9}
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_no_room_is_told_before_writing(tmp_path, monkeypatch):
    write(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError) as caught:
        write(tmp_path, 2)
    for part in ("step 2", "No space left on device", "last sound checkpoint is step_00000001", "free 17 MB"):
        assert part in str(caught.value)
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_failure_in_the_last_moment(tmp_path, monkeypatch):
    """A manifest that can't be written leaves no folder, hidden or visible."""

    def fail(*arguments):
        raise PermissionError(13, "Permission denied", "manifest.json")

    monkeypatch.setattr(folder_module, "write_manifest", fail)
    with pytest.raises(UserError, match="Permission denied.*no earlier checkpoint.*make the folder writable"):
        write(tmp_path, 1)
    assert os.listdir(tmp_path) == []


def kept(directory: Path, **policy) -> list[int]:
    apply_retention(directory, Retention(**policy))
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(directory)]


def test_retention_keeps_the_last(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    deleted = apply_retention(tmp_path, Retention(keep_last=2))
    assert [path.name for path in deleted] == ["step_00000001", "step_00000002", "step_00000003"]
    # After a fall back to step 3, step 4 is written anew: it is the newest, the damaged step 5 is not.
    write(tmp_path, 4)
    assert kept(tmp_path, keep_last=1) == [4]


def test_retention_does_not_go_by_the_clock_of_the_files(tmp_path):
    """A run folder that was copied: its files are all new, in any order."""
    for step in (1, 2, 3):
        os.utime(write(tmp_path, step) / "manifest.json", (10 - step, 10 - step))
    assert kept(tmp_path, keep_last=1) == [3]


def test_retention_keeps_every_kth_and_epochs_for_good(tmp_path):
    for step in range(1, 13):
        write(tmp_path, step, marks={"epoch": 1} if step == 5 else None)
        kept(tmp_path, keep_last=2, keep_every=4)
    assert kept(tmp_path, keep_last=2, keep_every=4) == [4, 5, 8, 11, 12]


def test_retention_keeps_the_best_that_was_written(tmp_path):
    """By what the checkpoints say: a run's record may name one whose save failed."""
    for step, loss in enumerate([3.0, 1.5, 2.0, None, 1.5, 4.0], 1):
        write(tmp_path, step, marks={"validation_loss": loss})
    assert kept(tmp_path, keep_last=1, keep_best=True) == [2, 6]
    (tmp_path / "step_00000002" / "weights_00000.safetensors").unlink()
    write(tmp_path, 7, marks={"validation_loss": 2.5})
    assert kept(tmp_path, keep_last=1, keep_best=True) == [7]


def test_retention_keeps_a_sound_one(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "step_00000003" / "weights_00000.safetensors").write_text("cut")
    assert kept(tmp_path, keep_last=1) == [2, 3]


def test_rolling_names(tmp_path):
    def names() -> dict[str, int]:
        return {link.name: open_checkpoint(link).step for link in sorted(tmp_path.glob("lm_*"))}

    policy = {"keep_last": 3, "rolling_names": True}
    seen = []
    for step in range(1, 6):
        write(tmp_path, step)
        kept(tmp_path, **policy)
        seen.append(names())
    assert seen[0] == {"lm_current": 1} and seen[1] == {"lm_current": 2, "lm_prev": 1}
    assert seen[4] == {"lm_current": 5, "lm_prev": 4, "lm_prev2": 3}
    assert sorted(os.listdir(tmp_path)) == [*seen[4], "step_00000003", "step_00000004", "step_00000005"]
    # A reader that opened a name keeps the folder that it meant then.
    opened = open_checkpoint(tmp_path / "lm_current")
    write(tmp_path, 6)
    kept(tmp_path, **policy)
    assert opened.step == 5 and opened.path.name == "step_00000005" and torch.equal(opened.read("b"), opened.read("b"))
    assert latest_sound(tmp_path, print).step == 6
    kept(tmp_path, keep_last=3)
    assert names() == {}


def test_writers_are_balanced():
    sizes = {str(i): size for i, size in enumerate([100, 7, 7, 50, 30, 20, 1])}
    writers = assign_writers(sizes, 3)
    load = [sum(size for key, size in sizes.items() if writers[key] == rank) for rank in range(3)]
    assert load == [100, 58, 57]
    assert writers == assign_writers(dict(reversed(sizes.items())), 3)


def test_check_compatible():
    check_compatible({"a": (1, 2), "b": 0.1}, json.loads(json.dumps({"a": (1, 2), "b": 0.1})))
    with pytest.raises(UserError) as caught:
        check_compatible({"model.num_layers": 4, "train.seed": 1, "gone": 1}, {"model.num_layers": 6, "train.seed": 1})
    assert "model.num_layers was 4 and is 6" in str(caught.value)
    assert "gone was 1 and is not set" in str(caught.value)
    assert "seed" not in str(caught.value)
