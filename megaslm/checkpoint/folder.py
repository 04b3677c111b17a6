"""The folder that holds a run's checkpoints: how one comes into it, which one is taken, and which ones go.

    checkpoints/
        step_00001000/          complete: it got this name when its last byte was on the disk
        .step_00002000.tmp/     being written, or left by a killed run: nobody reads it, the next save clears it
        .step_00001000.old/     a checkpoint whose step is being saved again, for the moment between two renames
        .step_00000500.deleted/ on its way out
        lm_current, lm_prev ... links to the newest, on request: names for people and scripts, which nothing here reads

All ranks must see the same folder: on several nodes it lies on a shared file system.
"""

import errno
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megaslm
from megaslm.checkpoint.format import (
    WEIGHTS,
    Checkpoint,
    DamagedCheckpoint,
    Piece,
    find_damages,
    open_checkpoint,
    read_manifest,
    write_manifest,
    write_safetensors,
)
from megaslm.errors import UserError
from megaslm.files import sync_folder
from megaslm.parallel import host

logger = logging.getLogger(__name__)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MANIFEST_ROOM = 16 * 2**20  # bytes set apart for the manifest and the file system's own needs
ROLLING_NAMES = ("lm_current", "lm_prev", "lm_prev2")


class SaveFailed(UserError):
    """A checkpoint could not be written: a full disk, a folder that is not writable. What was there is untouched."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay; the others are deleted after each save.

    keep_last: the newest so many, at least 1.
    keep_every: those whose step is a multiple of this, for good; 0: none.
    keep_best: the one with the lowest validation loss.
    rolling_names: give the newest three the names lm_current, lm_prev and lm_prev2.

    Those written at the end of an epoch on request (marks.epoch) stay for good.
    """

    keep_last: int
    keep_every: int = 0
    keep_best: bool = False
    rolling_names: bool = False


@dataclass(frozen=True)
class Found:
    """A checkpoint as retention sees it: by names, sizes and manifest alone."""

    path: Path
    step: int
    written: str
    validation_loss: float | None
    epoch: int | None
    sound: bool


def checkpoint_name(step: int) -> str:
    """Name of the folder of a step, "step_00001000"."""
    return f"step_{step:08d}"


def checkpoint_step(path: str | Path) -> int | None:
    """Step in a checkpoint folder's name, None if it is not such a name."""
    match = re.fullmatch(r"step_(\d{8,})", Path(path).name)
    return int(match[1]) if match else None


def list_checkpoints(directory: str | Path) -> list[Path]:
    """Checkpoint folders in `directory`, by step, the oldest first; none where there is no such directory.

    Local: looks at names alone. All of them are complete, but a disk may have damaged one since.
    """
    directory = Path(directory)
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in found if checkpoint_step(path) is not None and path.is_dir()), key=checkpoint_step)


def assign_writers(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """The rank that writes each tensor: the largest first, each to the rank with the least to write so far.

    Args:
        sizes: number of elements, or bytes, by name.
    """
    load = [0] * world_size
    writers = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        writers[name] = load.index(min(load))
        load[writers[name]] += sizes[name]
    return writers


def write_checkpoint(
    directory: str | Path,
    pieces: Mapping[str, Mapping[str, Piece]],
    *,
    step: int,
    run_config: dict[str, Any],
    global_state: dict[str, Any],
    optimizer: dict[str, Any] | None,
    marks: dict[str, Any] | None = None,
) -> Path:
    """Write one checkpoint from what each rank has of its tensors. Collective.

    Nothing is visible until everything is on the disk. If any rank fails, all fail, what was written is removed, and
    the checkpoints that were there stay. A checkpoint of the same step is replaced.

    Args:
        directory: where checkpoints go; made if missing.
        pieces: {kind: {name: piece}}, this rank's; those of all ranks make up every tensor, without an overlap.
        step: optimizer steps made.
        run_config, global_state, marks: plain JSON values, alike on all ranks.
        optimizer: see format.py; None for weights alone.

    Returns:
        The folder DIRECTORY/step_XXXXXXXX.

    Raises:
        SaveFailed: disk full, no permission, ...: names the file and the newest checkpoint that is there.
    """
    directory = Path(directory)
    hidden = directory / f".{checkpoint_name(step)}.tmp"
    needed = sum(host.gather(sum(piece.nbytes for part in pieces.values() for piece in part.values())))
    _together(directory, step, needed, lambda: _on_rank_0(lambda: _prepare(hidden, needed)))
    files, entries = _together(directory, step, needed, lambda: _write_files(hidden, pieces), cleanup=hidden)
    manifest: dict[str, Any] = {
        "written": datetime.now(UTC).isoformat(timespec="microseconds"),
        "step": step,
        "code": {"megaslm": megaslm.__version__, "torch": version("torch"), "deepspeed": version("deepspeed")},
        "run_config": run_config,
        "global_state": global_state,
        "marks": {"validation_loss": None, "epoch": None, **(marks or {})},
        "optimizer": optimizer,
        "files": {},
        "tensors": {},
    }
    for part_files, part_entries in host.gather((files, entries)):
        manifest["files"] |= part_files
        for kind, part in part_entries.items():
            tensors = manifest["tensors"].setdefault(kind, {})
            for name, (shape, piece) in part.items():
                tensors.setdefault(name, {"shape": shape, "pieces": []})["pieces"].append(piece)
    _check_pieces(manifest["tensors"])
    final = directory / checkpoint_name(step)
    _together(directory, step, needed, lambda: _on_rank_0(lambda: _publish(hidden, final, manifest)), cleanup=hidden)
    return final


def _check_pieces(tensors: dict[str, dict[str, Any]]) -> None:
    """Our own invariant, looked at before a checkpoint gets its name: all tensors, without a gap or an overlap."""
    assert WEIGHTS in tensors, "a checkpoint holds weights at least"
    for kind, part in tensors.items():
        assert part.keys() == tensors[WEIGHTS].keys(), f"{kind} of some parameters is missing"
        for name, entry in part.items():
            pieces = sorted(entry["pieces"], key=lambda piece: piece["start"])
            ends = [0, *(piece["start"] + piece["numel"] for piece in pieces)]
            assert [piece["start"] for piece in pieces] == ends[:-1], f"{kind} of {name} has gaps"
            assert ends[-1] == math.prod(entry["shape"]), f"{kind} of {name} is not whole"


def latest_sound(directory: str | Path, report: Callable[[str], None], repair: bool = True) -> Checkpoint | None:
    """The newest checkpoint in `directory` whose every byte is what was written. Collective.

    Newest is what was written last. That is the highest step, unless a run fell back to an older one and went on from
    there: what lies beyond, damaged or only out of reach at that time, is not on the way of this run any more.

    Args:
        report: called on rank 0 with one line for every newer one that is damaged, the file at fault named.
        repair: give a checkpoint its name back whose replacement was interrupted; not in the folder of another run,
            which may be writing there.

    Returns:
        None if there are no checkpoints.

    Raises:
        UserError: there are checkpoints, but none is sound; or one has a newer format version.
    """
    directory = Path(directory)
    if repair:
        _, failures = host.try_together(lambda: _on_rank_0(lambda: _undo_interrupted_replacements(directory)))
        if failures:
            raise UserError(f"can't put {directory} in order: {failures[0][1]}")
    # One rank's listing for all: on a network file system they may differ for a while.
    paths = host.broadcast(sorted(list_checkpoints(directory), key=_written))
    damage = []
    for path in reversed(paths):
        try:
            return open_checkpoint(path)
        except DamagedCheckpoint as error:
            damage.append(str(error))
            if host.rank() == 0 and path != paths[0]:
                report(f"{error}; trying the one before")
    if damage:
        raise UserError(
            f"none of the {len(paths)} checkpoints in {directory} is sound: {'; '.join(damage)}. "
            "Restore one from a backup, or move the folder away to start anew"
        )
    return None


def _written(path: Path) -> tuple[str, int]:
    """Sort key: when a checkpoint was written. One that does not say so comes last: it is to be named as damaged."""
    try:
        return read_manifest(path)["written"], checkpoint_step(path)
    except UserError:
        return "unknown", checkpoint_step(path)  # after every date


def look_at(path: Path) -> Found:
    """What retention needs to know of a checkpoint; a manifest that can't be read makes it an unsound one. Local."""
    try:
        manifest = read_manifest(path)
    except UserError:
        return Found(path, checkpoint_step(path), "", None, None, False)
    sound = not find_damages(path, manifest, list(manifest["files"]), read=False)
    marks = manifest["marks"]
    return Found(path, manifest["step"], manifest["written"], marks["validation_loss"], marks["epoch"], sound)


def choose_kept(found: list[Found], policy: Retention) -> dict[Path, list[str]]:
    """The checkpoints that stay, each with the reasons: "last", "every", "epoch", "best", "the only sound one".

    Newest is what was written last, not the highest step: after a fall back to an older checkpoint the damaged newer
    one must not push out those that the run writes now. At least one that looks sound is kept.
    """
    assert policy.keep_last >= 1, "a run keeps its last checkpoint"
    newest = sorted(found, key=lambda one: (one.written, one.step), reverse=True)
    kept: dict[Path, list[str]] = {one.path: ["last"] for one in newest[: policy.keep_last]}
    for one in found:
        if policy.keep_every and one.step % policy.keep_every == 0:
            kept.setdefault(one.path, []).append("every")
        if one.epoch is not None:
            kept.setdefault(one.path, []).append("epoch")
    sound = [one for one in newest if one.sound]
    evaluated = [one for one in sound if one.validation_loss is not None]
    if policy.keep_best and evaluated:
        # From what is there, not from the run's record of its best: that save may have failed.
        best = min(evaluated, key=lambda one: (one.validation_loss, one.step))
        kept.setdefault(best.path, []).append("best")
    if sound and not any(one.path in kept for one in sound):
        kept[sound[0].path] = ["the only sound one"]
    return kept


def apply_retention(directory: str | Path, policy: Retention) -> list[Path]:
    """Delete the checkpoints that the policy does not keep, and set the rolling names. Collective; rank 0 does it.

    What can't be deleted or named is logged and left: no reason to end a run.

    Returns:
        The folders deleted.
    """
    deleted = []
    if host.rank() == 0:
        directory = Path(directory)
        found = [look_at(path) for path in list_checkpoints(directory)]
        kept = choose_kept(found, policy)
        newest = sorted((one for one in found if one.path in kept), key=lambda one: (one.written, one.step))
        # Before the deletions: a name must not point to what is gone, not even after a kill.
        _set_rolling_names(directory, [one.path.name for one in reversed(newest)] if policy.rolling_names else [])
        for one in found:
            if one.path not in kept:
                try:
                    _delete(one.path)
                    deleted.append(one.path)
                except OSError as error:
                    logger.warning("can't delete the old checkpoint %s: %s", one.path, error)
    return host.broadcast(deleted)


def _set_rolling_names(directory: Path, newest: list[str]) -> None:
    """Point lm_current, lm_prev and lm_prev2 to the folders named, the newest first; take away what is left over.

    Each link is replaced in one move: a reader finds the old one or the new one.
    """
    for i, name in enumerate(ROLLING_NAMES):
        link = directory / name
        try:
            if i < len(newest):
                temporary = directory / f".{name}.tmp"
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(newest[i], target_is_directory=True)
                os.replace(temporary, link)
            elif link.is_symlink():
                link.unlink()
        except OSError as error:
            logger.warning("can't set the name %s: %s", link, error)


def _on_rank_0(work: Callable[[], None]) -> None:
    if host.rank() == 0:
        work()


def _together(directory: Path, step: int, needed: int, work: Callable[[], Any], cleanup: Path | None = None) -> Any:
    """Do a part of the save on every rank; if it fails on any, raise the UserError that says so on all."""
    result, failures = host.try_together(work)
    if not failures:
        return result
    if host.rank() == 0 and cleanup is not None:
        shutil.rmtree(cleanup, ignore_errors=True)
    rank, error = failures[0]
    if isinstance(error, UserError) or not isinstance(error, OSError):
        raise error
    what = error.strerror or str(error)
    if error.filename:
        what += f" ({error.filename})"
    if host.world_size() > 1:
        what += f" on rank {rank}"
    sound = list_checkpoints(directory)
    last = f"the last sound checkpoint is {sound[-1].name}" if sound else "there is no earlier checkpoint"
    if error.errno in NO_ROOM:
        advice = f"free {_gigabytes(needed + MANIFEST_ROOM)}"
    elif error.errno == errno.ENOENT and rank > 0:
        advice = "this folder must be the same one on all nodes (a shared file system)"
    else:
        advice = "make the folder writable"
    raise SaveFailed(
        f"could not save the checkpoint of step {step} in {directory}: {what}; {last}; {advice}"
    ) from error


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def _prepare(hidden: Path, needed: int) -> None:
    """Make the hidden folder, after clearing what a killed run left, and see that there is room."""
    directory = hidden.parent
    directory.mkdir(parents=True, exist_ok=True)
    _undo_interrupted_replacements(directory)
    clear_leftovers(directory)
    free = shutil.disk_usage(directory).free
    if free < needed + MANIFEST_ROOM:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {_gigabytes(free)} left")
    hidden.mkdir()


def clear_leftovers(directory: Path) -> None:
    """Delete what a killed run left of saves and deletions. Local; nobody else may be saving there.

    Raises:
        OSError: something can't be deleted.
    """
    for stale in [*directory.glob(".step_*.tmp"), *directory.glob(".step_*.deleted")]:
        shutil.rmtree(stale)
    for name in ROLLING_NAMES:
        (directory / f".{name}.tmp").unlink(missing_ok=True)


def _write_files(hidden: Path, pieces: Mapping[str, Mapping[str, Piece]]) -> tuple[dict, dict]:
    """Write this rank's files, side by side: a thread each hashes and writes, both outside of the interpreter's lock.

    Returns:
        Their entries in the manifest: {file: ...}, and {kind: {name: (shape, piece)}}.
    """

    def write(kind: str) -> dict[str, Any]:
        # A whole tensor keeps its shape: the files are then plain safetensors for everyone else.
        tensors = {
            name: piece.data.reshape(piece.shape) if piece.data.numel() == math.prod(piece.shape) else piece.data
            for name, piece in pieces[kind].items()
        }
        return write_safetensors(hidden / files[kind], tensors)

    files = {kind: f"{kind}_{host.rank():05d}.safetensors" for kind, part in pieces.items() if part}
    with ThreadPoolExecutor(max_workers=max(len(files), 1)) as threads:
        written = dict(zip(files.values(), threads.map(write, files), strict=True))
    entries = {
        kind: {
            name: (list(piece.shape), {"file": file, "start": piece.start, "numel": piece.data.numel()})
            for name, piece in pieces[kind].items()
        }
        for kind, file in files.items()
    }
    return written, entries


def _publish(hidden: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest and give the folder its name, every step of it on the disk before the next."""
    write_manifest(hidden, manifest)
    sync_folder(hidden)
    old = final.parent / f".{final.name}.old"
    if final.exists():
        final.rename(old)
    hidden.rename(final)
    sync_folder(final.parent)
    if old.exists():
        shutil.rmtree(old)


def _undo_interrupted_replacements(directory: Path) -> None:
    """Give a checkpoint its name back whose replacement was cut off between the two renames."""
    for old in directory.glob(".step_*.old"):
        final = directory / old.name.removeprefix(".").removesuffix(".old")
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)
            sync_folder(directory)


def _delete(path: Path) -> None:
    """Delete a checkpoint that is at no moment half there."""
    doomed = path.parent / f".{path.name}.deleted"
    path.rename(doomed)
    shutil.rmtree(doomed)
