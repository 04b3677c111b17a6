"""An output folder that is there as a whole or not at all, whoever is in the way."""

import errno
import json
import os
from pathlib import Path

import pytest

from megaslm.checkpoint.huggingface.new_folder import MARK, new_folder, output_path
from megaslm.checkpoint.huggingface.record import EXPORT_RECORD, RECORD_FORMAT, RECORD_VERSION, read_record
from megaslm.errors import UserError


def fill(folder: Path, content: str = "weights") -> None:
    """As an export with one file."""
    (folder / "model.safetensors").write_text(content)
    files = {"model.safetensors": {"bytes": len(content), "sha256": ""}}
    record = {"format": RECORD_FORMAT, "version": RECORD_VERSION, "files": files}
    (folder / EXPORT_RECORD).write_text(json.dumps(record))


def write(final: Path, content: str = "weights", overwrite: bool = False) -> None:
    with new_folder(final, overwrite, needed=1) as folder:
        fill(folder, content)


def content_of(final: Path) -> str:
    assert sorted(path.name for path in final.iterdir()) == [EXPORT_RECORD, "model.safetensors"]
    return (final / "model.safetensors").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_at_once(tmp_path):
    """The second is refused, and the first is whole."""
    out = tmp_path / "out"
    with new_folder(out, False, needed=1) as folder:
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .* is writing {out}: wait until it has ended"):
            write(out)
        fill(folder)
    assert content_of(out) == "weights" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["notes.txt", "run/step_00000001/manifest.json"])
def test_what_is_the_users_own_stays(tmp_path, name):
    out = tmp_path / "out"
    write(out)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    with pytest.raises(UserError, match=rf"holds {name.split('/')[0]} beside an export, which --overwrite would"):
        write(out, "new", overwrite=True)
    assert (out / name).read_text() == "mine" and names(tmp_path) == ["out"]


def test_a_hidden_folder_that_is_not_ours_stays(tmp_path):
    mine = tmp_path / ".out.export"
    (mine / "old").mkdir(parents=True)
    for name in (".out.tmp", ".out.old"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"\.out\.export is in the way, and not of megaslm: move it"):
        write(tmp_path / "out")
    mine.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / MARK).touch()
    mine.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="in the way"):
        write(tmp_path / "out")
    mine.unlink()
    write(tmp_path / "out")
    assert names(tmp_path) == [".out.old", ".out.tmp", "elsewhere", "out"] and (tmp_path / "elsewhere/old").is_dir()


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_failure_at_any_rename_leaves_what_was_there(tmp_path, monkeypatch, failure, at):
    """Two renames see that the old one can be moved, two replace it; an interrupt comes before or after one."""
    out, rename, calls = tmp_path / "out", Path.rename, []
    write(out, "old")

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == at and isinstance(failure, OSError):
            raise failure
        result = rename(self, target)
        if len(calls) == at:
            raise failure
        return result

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises((UserError, KeyboardInterrupt)):
        write(out, "new", overwrite=True)
    published = at == 4 and not isinstance(failure, OSError)
    assert content_of(out) == ("new" if published else "old") and names(tmp_path) == ["out"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_kill_between_the_two_renames_is_made_good(tmp_path, finished):
    out, staging = tmp_path / "out", tmp_path / ".out.export"
    for part in ("old", "new") if finished else ("old",):
        (staging / part).mkdir(parents=True)
        fill(staging / part, part)
    (staging / MARK).touch()
    with pytest.raises(UserError, match="--overwrite"):
        write(out)
    assert content_of(out) == ("new" if finished else "old") and names(tmp_path) == ["out"]


def test_what_a_killed_one_left_is_cleared(tmp_path):
    staging = tmp_path / ".out.export"
    (staging / "new").mkdir(parents=True)
    (staging / "new" / "model.safetensors").write_text("half")
    (staging / MARK).touch()
    write(tmp_path / "out")
    assert content_of(tmp_path / "out") == "weights" and names(tmp_path) == ["out"]


def test_a_mount_point_is_told_before_the_work(tmp_path, monkeypatch):
    out, worked = tmp_path / "out", []
    out.mkdir()

    def busy(self, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(UserError, match="where it is a mount point, give a folder in it"):
        with new_folder(out, False, needed=1):
            worked.append(1)
    assert not worked and names(tmp_path) == ["out"]


def test_outputs_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    for output in ("", "/", "a\0b", "loop", "fifo", "fifo/out", "n" * 300):
        with pytest.raises(UserError, match="give another folder|give the name of one|choose another folder|is a file"):
            write(output_path(output))
    assert names(tmp_path) == ["fifo", "loop"]
    with pytest.raises(RuntimeError), new_folder(output_path("a/b/out"), False, needed=1):
        raise RuntimeError
    assert names(tmp_path) == ["fifo", "loop"]  # nor the parents


def test_a_record_that_is_damaged(tmp_path):
    fill(tmp_path)
    whole = json.loads((tmp_path / EXPORT_RECORD).read_text())
    entry = whole["files"]["model.safetensors"]
    for change, message in (
        ({"version": None}, "version None"),
        ({"files": None}, "lists no weights"),
        ({"files": {}}, "lists no weights"),
        ({"files": {"model.safetensors": {"sha256": ""}}}, "entry 'model.safetensors'"),
        ({"files": {"model.safetensors": {"bytes": True, "sha256": ""}}}, "entry 'model.safetensors'"),
        ({"files": {"model.safetensors": entry, "../x": entry}}, r"entry '\.\./x'"),
        ({"files": {"model.safetensors": entry, "/etc/passwd": entry}}, "entry '/etc/passwd'"),
    ):
        (tmp_path / EXPORT_RECORD).write_text(json.dumps({**whole, **change}))
        with pytest.raises(UserError, match=message):
            read_record(tmp_path)
    (tmp_path / EXPORT_RECORD).write_text(json.dumps({key: whole[key] for key in ("format", "files")}))
    with pytest.raises(UserError, match="version None"):
        read_record(tmp_path)
