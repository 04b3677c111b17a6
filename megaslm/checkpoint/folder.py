"""The folder that holds a run's checkpoints: how one comes into it, which one is taken, and which ones go.

    checkpoints/
        step_00001000/          complete: it got this name when its last byte was on the disk
        .step_00002000.tmp/     being written, or left by a killed run: nobody reads it, the next save clears it
        .step_00001000.old/     a checkpoint whose step is being saved again, for the moment between two renames
        .step_00000500.deleted/ on its way out

All ranks must see the same folder: on several nodes it lies on a shared file system.
"""

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

import megaslm
from megaslm.checkpoint.format import (
    MANIFEST,
    WEIGHTS,
    Checkpoint,
    DamagedCheckpoint,
    find_damage,
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


def assign_writers(sizes: Mapping[tuple[str, str], int], world_size: int) -> dict[tuple[str, str], int]:
    """The rank that writes each tensor: the largest first, each to the rank with the least to write so far.

    Args:
        sizes: bytes of every (kind, name).
    """
    load = [0] * world_size
    writers = {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        writers[key] = load.index(min(load))
        load[writers[key]] += sizes[key]
    return writers


def write_checkpoint(
    directory: str | Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    *,
    step: int,
    run_config: dict[str, Any],
    global_state: dict[str, Any],
    optimizer: dict[str, Any] | None,
) -> Path:
    """Write one checkpoint from host tensors, each given by exactly one rank. Collective.

    Nothing is visible until everything is on the disk. If any rank fails, all fail, what was written is removed, and
    the checkpoints that were there stay. A checkpoint of the same step is replaced.

    Args:
        directory: where checkpoints go; made if missing.
        tensors: {kind: {name: fp32 host tensor}}, whole tensors, the part that is this rank's to write.
        step: optimizer steps made.
        run_config, global_state: plain JSON values, alike on all ranks.
        optimizer: see format.py; None for weights alone.

    Returns:
        The folder DIRECTORY/step_XXXXXXXX.

    Raises:
        UserError: disk full, no permission, ...: names the file and the newest checkpoint that is there.
    """
    directory = Path(directory)
    hidden = directory / f".{checkpoint_name(step)}.tmp"
    needed = sum(host.gather(sum(tensor.nbytes for part in tensors.values() for tensor in part.values())))
    _together(directory, step, needed, lambda: _on_rank_0(lambda: _prepare(hidden, needed)))
    files, entries = _together(directory, step, needed, lambda: _write_files(hidden, tensors), cleanup=hidden)
    manifest: dict[str, Any] = {
        "step": step,
        "code": {"megaslm": megaslm.__version__, "torch": version("torch"), "deepspeed": version("deepspeed")},
        "run_config": run_config,
        "global_state": global_state,
        "optimizer": optimizer,
        "files": {},
        "tensors": {},
    }
    for part_files, part_entries in host.gather((files, entries)):
        manifest["files"] |= part_files
        for kind, part in part_entries.items():
            manifest["tensors"].setdefault(kind, {}).update(part)
    assert WEIGHTS in manifest["tensors"], "a checkpoint holds weights at least"
    final = directory / checkpoint_name(step)
    _together(directory, step, needed, lambda: _on_rank_0(lambda: _publish(hidden, final, manifest)), cleanup=hidden)
    return final


def latest_sound(directory: str | Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint in `directory` whose every byte is what was written. Collective.

    Args:
        report: called on rank 0 with one line for every newer one that is damaged, the file at fault named.

    Returns:
        None if there are no checkpoints.

    Raises:
        UserError: there are checkpoints, but none is sound; or one has a newer format version.
    """
    directory = Path(directory)
    _, failures = host.try_together(lambda: _on_rank_0(lambda: _undo_interrupted_replacements(directory)))
    if failures:
        raise UserError(f"can't put {directory} in order: {failures[0][1]}")
    # One rank's listing for all: on a network file system they may differ for a while.
    paths = host.broadcast([path for path in list_checkpoints(directory)])
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


def apply_retention(directory: str | Path, keep_last: int, best: str | None = None) -> list[Path]:
    """Delete all checkpoints but the newest `keep_last` and the best one. Collective; rank 0 deletes.

    Newest is what was written last, not the highest step: after a fall back to an older checkpoint the damaged newer
    one must not push out those that the run writes now. At least one that looks sound (manifest and sizes) is kept.
    What can't be deleted is logged and left: no reason to end a run.

    Args:
        keep_last: at least 1.
        best: name of the best checkpoint's folder ("step_00001000").

    Returns:
        The folders deleted.
    """
    assert keep_last >= 1, "a run keeps its last checkpoint"
    deleted = []
    if host.rank() == 0:
        paths = sorted(list_checkpoints(directory), key=_time_written, reverse=True)
        keep = set(paths[:keep_last]) | {path for path in paths if path.name == best}
        if not any(_looks_sound(path) for path in keep):
            keep |= set([path for path in paths if _looks_sound(path)][:1])
        for path in paths:
            if path not in keep:
                try:
                    _delete(path)
                    deleted.append(path)
                except OSError as error:
                    logger.warning("can't delete the old checkpoint %s: %s", path, error)
    return host.broadcast(deleted)


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
        advice = f"free {_gigabytes(needed + MANIFEST_ROOM)} and run the same command again"
    elif error.errno == errno.ENOENT and rank > 0:
        advice = "this folder must be the same one on all nodes (a shared file system)"
    else:
        advice = "make the folder writable and run the same command again"
    raise UserError(f"could not save the checkpoint of step {step} in {directory}: {what}; {last}; {advice}") from error


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def _prepare(hidden: Path, needed: int) -> None:
    """Make the hidden folder, after clearing what a killed run left, and see that there is room."""
    directory = hidden.parent
    directory.mkdir(parents=True, exist_ok=True)
    _undo_interrupted_replacements(directory)
    for stale in [*directory.glob(".step_*.tmp"), *directory.glob(".step_*.deleted")]:
        shutil.rmtree(stale)
    free = shutil.disk_usage(directory).free
    if free < needed + MANIFEST_ROOM:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {_gigabytes(free)} left")
    hidden.mkdir()


def _write_files(hidden: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict, dict]:
    """Write this rank's files. Returns their entries in the manifest: files, and tensors by kind."""
    files: dict[str, Any] = {}
    entries: dict[str, dict[str, Any]] = {}
    for kind, part in tensors.items():
        if not part:
            continue
        file = f"{kind}_{host.rank():05d}.safetensors"
        files[file] = write_safetensors(hidden / file, dict(part))
        entries[kind] = {
            name: {
                "shape": list(tensor.shape),
                "dtype": "float32",
                "slices": [{"file": file, "key": name, "offset": [0] * tensor.dim()}],
            }
            for name, tensor in part.items()
        }
    return files, entries


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


def _time_written(path: Path) -> tuple[int, int]:
    """Sort key: when the manifest was written; by step where that is equal or unknown."""
    try:
        return (path / MANIFEST).stat().st_mtime_ns, checkpoint_step(path)
    except OSError:
        return 0, checkpoint_step(path)


def _looks_sound(path: Path) -> bool:
    try:
        files: Iterable = read_manifest(path)["files"].items()
    except UserError:
        return False
    return not any(find_damage(path, name, expected, read=False) for name, expected in files)
