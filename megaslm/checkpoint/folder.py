"""The folder that holds a run's checkpoints: how one comes into it, which one is taken, and which ones go.

    checkpoints/
        step_00001000/          complete: it got this name when its last byte was on the disk
        .step_00002000.0.tmp/   being written, or left by a killed run: nobody reads it, the next save clears it
        .step_00001000.old/     a checkpoint whose step is being saved again, for the moment between two renames
        .step_00000500.deleted/ on its way out
        lm_current, lm_prev ... links to the newest, on request: names for people and scripts, which nothing here reads

All ranks must see the same folder: on several nodes it lies on a shared file system.
"""

import contextlib
import errno
import hashlib
import itertools
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megaslm
from megaslm.checkpoint.fingerprint import Fingerprint
from megaslm.checkpoint.format import (
    FILE_NAME,
    TOKENIZER,
    Checkpoint,
    DamagedCheckpoint,
    Piece,
    by_key,
    find_damages,
    find_tensor_fault,
    open_checkpoint,
    read_manifest,
    write_manifest,
)
from megaslm.checkpoint.safetensors_file import write_safetensors
from megaslm.errors import UserError
from megaslm.files import flush_to_disk, side_by_side, sync_folder
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
class Summary:
    """A checkpoint as retention sees it: by names, sizes and manifest alone."""

    path: Path
    step: int
    serial: int
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
    pieces: Mapping[str, Sequence[Piece]],
    *,
    step: int,
    run_config: dict[str, Any],
    global_state: dict[str, Any],
    optimizer: dict[str, Any] | None,
    marks: dict[str, Any] | None = None,
    fingerprint: Fingerprint | None = None,
    tokenizer_files: Mapping[str, str] | None = None,
    name: str | None = None,
) -> Path:
    """Write one checkpoint from what each rank has of its tensors. Collective.

    Nothing is visible until everything is on the disk. If any rank fails, all fail, what was written is removed, and
    the checkpoints that were there stay. A checkpoint of the same step is replaced, but nothing that has `name`.

    Args:
        directory: where checkpoints go; made if missing.
        pieces: by kind, this rank's; those of all ranks make up every tensor, without an overlap.
        step: optimizer steps made.
        run_config, global_state, marks: plain JSON values, alike on all ranks.
        optimizer: see format.py; None for weights alone.
        fingerprint: of the model whose weights these are.
        tokenizer_files: `Tokenizer.files` of the run's.
        name: of the folder, for a checkpoint that is none of a run's; None: that of its step.

    Returns:
        The folder DIRECTORY/step_XXXXXXXX, or DIRECTORY/`name`.

    Raises:
        SaveFailed: disk full, no permission, ...: names the file and the newest checkpoint that is there.
        UserError: there is something under `name`.
    """
    for text_name in tokenizer_files or ():
        assert FILE_NAME.fullmatch(f"{TOKENIZER}/{text_name}"), f"{text_name!r} is no name of a file"
    assert name is None or FILE_NAME.fullmatch(name) and "/" not in name, f"{name!r} is no name of a folder"
    tokenizer_files = tokenizer_files if tokenizer_files and host.rank() == 0 else {}  # one rank writes it
    mine = sum(piece.nbytes for of_kind in pieces.values() for piece in of_kind)
    mine += sum(len(text.encode()) for text in tokenizer_files.values())
    save = _Save(Path(directory), step, name, needed=sum(host.gather(mine)))
    hidden = host.broadcast(save.together(lambda: _prepare(save) if host.rank() == 0 else None))
    files, entries = save.together(lambda: _write_files(hidden, pieces, tokenizer_files), cleanup=hidden)
    manifest: dict[str, Any] = {
        "written": datetime.now(UTC).isoformat(timespec="microseconds"),
        "step": step,
        "code": code_versions(),
        "run_config": run_config,
        "global_state": global_state,
        "marks": {"validation_loss": None, "epoch": None, **(marks or {})},
        "optimizer": optimizer,
        "fingerprint": fingerprint.to_json() if fingerprint is not None else None,
        "files": {},
        "tensors": {},
    }
    for files_there, entries_there in host.gather((files, entries)):
        manifest["files"] |= files_there
        for kind, of_kind in entries_there.items():
            tensors = manifest["tensors"].setdefault(kind, {})
            for parameter, shape, piece in of_kind:
                tensors.setdefault(parameter, {"shape": shape, "pieces": []})["pieces"].append(piece)
    fault = find_tensor_fault(manifest["tensors"])
    assert fault is None, f"our own invariant, looked at before the checkpoint gets its name: {fault}"
    save.together(lambda: _publish(hidden, save, manifest) if host.rank() == 0 else None, cleanup=hidden)
    return save.final


def code_versions() -> dict[str, str]:
    """Of the packages whose versions a checkpoint records."""
    code = {"megaslm": megaslm.__version__}
    for package in ("torch", "deepspeed"):
        with contextlib.suppress(PackageNotFoundError):  # who converts checkpoints needs no DeepSpeed
            code[package] = version(package)
    return code


@dataclass(frozen=True)
class _Save:
    """What a message about a save needs to know. needed: bytes, over all ranks; name: None for a run's own."""

    directory: Path
    step: int
    name: str | None
    needed: int

    @property
    def final(self) -> Path:
        return self.directory / (self.name or checkpoint_name(self.step))

    def together(self, work: Callable[[], Any], cleanup: Path | None = None) -> Any:
        """Do a part of the save on every rank; if it fails on any, raise the SaveFailed that says so on all."""
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
        if error.errno in NO_ROOM:
            advice = f"free {_gigabytes(self.needed + MANIFEST_ROOM)}"
        elif error.errno == errno.ENOENT and rank > 0:
            advice = "this folder must be the same one on all nodes (a shared file system)"
        else:
            advice = "make the folder writable"
        if self.name is not None:
            raise SaveFailed(f"could not write the checkpoint {self.final}: {what}; {advice}") from error
        last = host.broadcast(self._last_sound() if host.rank() == 0 else None)
        raise SaveFailed(
            f"could not save the checkpoint of step {self.step} in {self.directory}: {what}; {last}; {advice}"
        ) from error

    def _last_sound(self) -> str:
        try:
            sound = [one for one in summaries(self.directory) if one.sound]
        except OSError as error:
            return f"which checkpoints are there can't be seen ({error.strerror})"
        return f"the last sound checkpoint is {sound[-1].path.name}" if sound else "there is no earlier checkpoint"


def latest_sound(
    directory: str | Path, report: Callable[[str], None], repair: bool = True, kinds: Sequence[str] | None = None
) -> Checkpoint | None:
    """The newest checkpoint in `directory` whose every byte is what was written. Collective.

    Newest is what was saved last (its serial number). That is the highest step, unless a run fell back to an older one
    and went on from there: what lies beyond, damaged or only out of reach then, is not on the way of this run any more.

    Args:
        report: called on rank 0 with one line for every newer one that is damaged, the file at fault named.
        repair: give a checkpoint its name back whose replacement was interrupted; not in the folder of another run,
            which may be writing there.
        kinds: of tensors that will be read, see `open_checkpoint`.

    Returns:
        None if there are no checkpoints.

    Raises:
        UserError: there are checkpoints, but none is sound; or one has a newer format version.
    """
    directory = Path(directory)

    def look() -> list[Path]:
        try:
            if repair:
                _undo_interrupted_replacements(directory)
            return sorted(list_checkpoints(directory), key=_order)
        except OSError as error:
            raise UserError(f"can't put the checkpoints of {directory} in order: {error}") from error

    # One rank's listing for all: on a network file system they may differ for a while.
    paths = host.on_first(look)
    damage = []
    for path in reversed(paths):
        try:
            return open_checkpoint(path, kinds=kinds)
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


def _order(path: Path) -> tuple[float, int]:
    """Sort key: by serial number. One that does not tell it comes last: it is to be named as damaged."""
    try:
        return read_manifest(path)["serial"], checkpoint_step(path)
    except UserError:
        return math.inf, checkpoint_step(path)


def summaries(directory: Path) -> list[Summary]:
    """The checkpoints of a folder that say what they are, in the order of their saves. Local.

    Left out are manifests that can't be read now, or are not ours. Nobody knows what these are, so nobody deletes them.
    """
    found = []
    for path in list_checkpoints(directory):
        try:
            manifest = read_manifest(path)
        except UserError as error:
            logger.info("%s", error)  # the start has named it
            continue
        sound = not find_damages(path, manifest, list(manifest["files"]), read=False)
        marks = manifest["marks"]
        found.append(
            Summary(path, manifest["step"], manifest["serial"], marks["validation_loss"], marks["epoch"], sound)
        )
    return sorted(found, key=lambda one: (one.serial, one.step))


def choose_kept(found: list[Summary], policy: Retention) -> dict[Path, list[str]]:
    """The checkpoints that stay, each with the reasons: "last", "every", "epoch", "best", "the only sound one".

    Args:
        found: in the order of their saves. After a fall back to an older checkpoint that is not the order of steps: the
            newer one, damaged, must neither push out those that the run saves now nor pass for the best of them.
    """
    assert policy.keep_last >= 1, "a run keeps its last checkpoint"
    kept: dict[Path, list[str]] = {one.path: ["last"] for one in found[-policy.keep_last :]}
    for one in found:
        if policy.keep_every and one.step % policy.keep_every == 0:
            kept.setdefault(one.path, []).append("every")
        if one.epoch is not None:
            kept.setdefault(one.path, []).append("epoch")
    sound = [one for one in found if one.sound]
    on_the_way = [one for i, one in enumerate(found) if all(one.step < later.step for later in found[i + 1 :])]
    evaluated = [one for one in on_the_way if one.sound and one.validation_loss is not None]
    if policy.keep_best and evaluated:
        # From what is there, not from the run's record of its best: that save may have failed.
        best = min(evaluated, key=lambda one: (one.validation_loss, one.step))
        kept.setdefault(best.path, []).append("best")
    if sound and not any(one.path in kept for one in sound):
        kept[sound[-1].path] = ["the only sound one"]
    return kept


def apply_retention(directory: str | Path, policy: Retention) -> list[Path]:
    """Delete the checkpoints that the policy does not keep, and set the rolling names. Rank 0 does it, and waits for
    nobody.

    What can't be read, deleted or named is logged and left: no reason to end a run.

    Returns:
        The folders deleted, on rank 0.
    """
    deleted: list[Path] = []
    if host.rank() > 0:
        return deleted
    directory = Path(directory)
    try:
        found = summaries(directory)
    except OSError as error:
        logger.warning("can't look at the checkpoints of %s: %s", directory, error)
        return deleted
    kept = choose_kept(found, policy)
    newest = [one.path.name for one in reversed(found) if one.path in kept]
    # Before the deletions: a name must not point to what is gone, not even after a kill.
    _set_rolling_names(directory, newest if policy.rolling_names else [])
    for one in found:
        if one.path not in kept:
            try:
                _delete(one.path)
                deleted.append(one.path)
            except OSError as error:
                logger.warning("can't delete the old checkpoint %s: %s", one.path, error)
    return deleted


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


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def _prepare(save: _Save) -> Path:
    """Make the hidden folder, after clearing what a killed run left, and see that there is room."""
    directory, final = save.directory, save.final
    directory.mkdir(parents=True, exist_ok=True)
    if save.name is None:
        _undo_interrupted_replacements(directory)
        clear_leftovers(directory)
    else:  # the folder is not a run's: what else is in it is none of our business
        # Nor is a hidden folder of the same name, which another process may be writing.
        _check_free(final)
    free = shutil.disk_usage(directory).free
    if free < save.needed + MANIFEST_ROOM:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {_gigabytes(free)} left")
    for i in itertools.count():  # a leftover that can't be deleted is no reason never to save again
        hidden = directory / f".{final.name}.{i}.tmp"
        with contextlib.suppress(FileExistsError):
            hidden.mkdir()
            return hidden


def _check_free(final: Path) -> None:
    """UserError unless nothing, or an empty folder, has the name of a checkpoint that replaces none."""
    if final.is_symlink() or (final.exists() and not (final.is_dir() and not any(final.iterdir()))):
        raise UserError(f"{final} exists and is not an empty folder; choose another name, or move it away")


def clear_leftovers(directory: Path) -> None:
    """Delete what a killed run left of saves and deletions. Local; nobody else may be saving there.

    What can't be deleted is logged and left: a reader on a network file system may hold a file for a while.
    """
    for stale in [*directory.glob(".step_*.tmp"), *directory.glob(".step_*.deleted")]:
        _remove(stale)
    for name in ROLLING_NAMES:
        _remove(directory / f".{name}.tmp")


def _remove(path: Path) -> None:
    """Delete a folder, or a link and not what it points to; log what can't be deleted."""
    try:
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
    except OSError as error:
        logger.warning("can't delete %s: %s", path, error)


def _write_files(
    hidden: Path, pieces: Mapping[str, Sequence[Piece]], tokenizer_files: Mapping[str, str]
) -> tuple[dict, dict]:
    """Write this rank's files, side by side: a thread each hashes and writes, both outside of the interpreter's lock.

    Returns:
        Their entries in the manifest: {file: ...}, and {kind: [(parameter, shape, piece), ...]}.
    """
    files = {kind: f"{kind}_{host.rank():05d}.safetensors" for kind, of_kind in pieces.items() if of_kind}
    named = {kind: by_key(pieces[kind]) for kind in files}

    def write(kind: str) -> dict[str, Any]:
        return write_safetensors(hidden / files[kind], {key: piece.stored for key, piece in named[kind].items()})

    written = dict(zip(files.values(), side_by_side(write, files), strict=True))
    if tokenizer_files:
        written |= _write_texts(hidden, TOKENIZER, tokenizer_files)
    entries = {
        kind: [(piece.parameter, list(piece.shape), piece.entry(key, file)) for key, piece in named[kind].items()]
        for kind, file in files.items()
    }
    return written, entries


def _write_texts(hidden: Path, folder: str, texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Write texts, by file name, to a folder of the checkpoint; returns their entries in the manifest."""
    (hidden / folder).mkdir()
    entries = {}
    for name, text in texts.items():
        data = text.encode()
        with open(hidden / folder / name, "wb") as file:
            file.write(data)
            flush_to_disk(file)
        entries[f"{folder}/{name}"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    sync_folder(hidden / folder)
    return entries


def _publish(hidden: Path, save: _Save, manifest: dict[str, Any]) -> None:
    """Write the manifest and give the folder its name, every step of it on the disk before the next."""
    final = save.final
    serial = 1 + max((one.serial for one in summaries(final.parent)), default=0)
    write_manifest(hidden, {"serial": serial, **manifest})
    sync_folder(hidden)
    old = final.parent / f".{final.name}.old"
    if save.name is not None:
        _check_free(final)  # somebody may have been faster; a rename over a folder that is not empty would fail
    elif final.exists():
        final.rename(old)
    hidden.rename(final)
    # From here on the checkpoint is there, whatever else fails.
    try:
        sync_folder(final.parent)
    except OSError as error:
        logger.warning("can't wait for the name of %s to be on the disk: %s", final, error)
    _remove(old)


def _undo_interrupted_replacements(directory: Path) -> None:
    """Give a checkpoint its name back whose replacement was cut off between the two renames."""
    for old in directory.glob(".step_*.old"):
        final = directory / old.name.removeprefix(".").removesuffix(".old")
        if final.exists():
            _remove(old)
        else:
            old.rename(final)
            sync_folder(directory)


def _delete(path: Path) -> None:
    """Delete a checkpoint that is at no moment half there."""
    doomed = path.parent / f".{path.name}.deleted"
    path.rename(doomed)
    _remove(doomed)
