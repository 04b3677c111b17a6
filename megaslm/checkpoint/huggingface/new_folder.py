"""A folder that is there as a whole or not at all, and replaces an export of ours in one step.

DIR                     what everyone sees
.DIR.lock               while one process writes it
.DIR.export/            beside it, and in the same file system
    megaslm_export_in_progress      says that it is ours
    new/                what becomes DIR
    old/                what DIR was, between the two renames of a replacement
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megaslm.checkpoint.folder import NO_ROOM
from megaslm.checkpoint.huggingface.record import EXPORT_RECORD, read_record
from megaslm.errors import UserError
from megaslm.files import sole_writer, sync_folder

MARK = "megaslm_export_in_progress"
MAX_NAMES = 3  # that a message lists


def output_path(output: str | os.PathLike) -> Path:
    """The absolute path of an output folder, links followed.

    Raises:
        UserError: it names no folder that could be made.
    """
    try:
        path = Path(output).resolve()
        named = bool(os.fspath(output)) and bool(path.name)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is the second until Python 3.13
        raise UserError(f"{os.fspath(output)!r} can't be the output: {error}; give another folder") from None
    if not named:
        raise UserError(f"{os.fspath(output)!r} is no folder that could be made: give the name of one")
    return path


@contextlib.contextmanager
def new_folder(final: Path, overwrite: bool, needed: int) -> Iterator[Path]:
    """Gives a hidden folder to fill, which becomes `final` at the end; or nothing, if the block raises.

    What a killed one left is finished or cleared by the next of that name.

    Args:
        final: as `output_path` gives it; not there, empty, or with `overwrite` an export of ours and nothing else.
        needed: bytes that must be free.

    Raises:
        UserError: something else is there, another process writes it, a full disk, no permission, ...
    """
    staging = final.with_name(f".{final.name}.export")
    new, old = staging / "new", staging / "old"
    with _explained(final, needed), _parents(final.parent), sole_writer(final):
        if staging.is_symlink() or staging.exists():
            if not (staging / MARK).is_file() or staging.is_symlink():
                raise UserError(f"{staging} is in the way, and not of megaslm: move it, or give another output folder")
            if old.exists() and not final.exists():
                (new if new.exists() else old).rename(final)  # a replacement was cut off between its two renames
            shutil.rmtree(staging)
        _check_final(final, overwrite)
        staging.mkdir()
        try:
            (staging / MARK).touch()
            if final.exists():  # see that it can be moved before the work: a mount point can't
                final.rename(old)
                old.rename(final)
            _check_room(final.parent, needed)
            new.mkdir()
            yield new
            sync_folder(new)
            if final.exists():
                final.rename(old)
            new.rename(final)
            sync_folder(final.parent)
        finally:
            if old.exists() and not final.exists():  # interrupted between two renames
                old.rename(final)
            _remove(staging)


def _remove(staging: Path) -> None:
    """The mark goes last: what is left of an interrupted removal is still ours."""
    for part in ("new", "old"):
        shutil.rmtree(staging / part, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)


def _check_final(final: Path, overwrite: bool) -> None:
    if not final.exists():
        return
    if not final.is_dir():
        raise UserError(f"{final} is a file; give a folder that is not there, or empty")
    names = sorted(path.name for path in final.iterdir())
    if not names:
        return
    if EXPORT_RECORD not in names:
        raise UserError(f"{final} is not empty, and not an export of megaslm: give another folder")
    if not overwrite:
        raise UserError(f"{final} holds an export: give another folder, or replace it with --overwrite")
    files = {*read_record(final)["files"], EXPORT_RECORD}
    if others := [name for name in names if name not in files or (final / name).is_dir()]:
        more = f" and {len(others) - MAX_NAMES} more" if len(others) > MAX_NAMES else ""
        raise UserError(
            f"{final} holds {', '.join(others[:MAX_NAMES])}{more} beside an export, which --overwrite would delete: "
            "move that away, or give another folder"
        )


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no room for the export in {folder}: it takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"
        )


@contextlib.contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; on failure those that were made go again, if nothing is in them."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _explained(final: Path, needed: int) -> Iterator[None]:
    """What the system refuses, as the user's to mend."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # transformers raises some that are none of the system
            raise
        advice = "choose another folder"
        if error.errno in NO_ROOM:
            advice = f"free {needed / 1e9:.2f} GB"
        elif error.errno == errno.EBUSY:
            advice = "where it is a mount point, give a folder in it"
        raise UserError(
            f"could not write the export {final}: {error.strerror}; nothing of it is left; {advice}"
        ) from error
