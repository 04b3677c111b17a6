"""Look at checkpoints and change nothing: what one holds, and whether it is sound.

Needs neither a device nor DeepSpeed. Tensors are read one at a time: memory is bounded by the largest. Reports are
plain dataclasses; tools/inspect_checkpoint.py prints them.
"""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from megaslm.checkpoint.fingerprint import Fingerprint
from megaslm.checkpoint.folder import checkpoint_step, list_checkpoints
from megaslm.checkpoint.format import (
    MANIFEST,
    Checkpoint,
    DamagedCheckpoint,
    find_damages,
    follow_link,
    read_manifest,
)
from megaslm.errors import UserError
from megaslm.reports import strict_json

if TYPE_CHECKING:
    from megaslm.checkpoint.comparison import Comparison

CHUNK = 2**22  # elements that are looked at in fp64 at a time


@dataclass(frozen=True)
class FileReport:
    """One file of a checkpoint: bytes on the disk (0 if it is missing), what is wrong with it (None: nothing)."""

    name: str
    bytes: int
    damage: str | None


@dataclass(frozen=True)
class Contents:
    """What the manifest of a checkpoint says.

    Attributes:
        format_version, code: of the format, and of the packages that wrote it.
        written: UTC, ISO 8601.
        run_name: None where the run config has none.
        samples, tokens, skipped_steps, seconds: of training up to here; None where the global state has no progress.
        validation_loss: of this step, nats; None if it was not evaluated.
        epoch: the number of the epoch of training data that ended here, or None.
        parameters: elements of all weights together, which are so many `parameter_tensors`.
        kinds: of tensors: "weights", and the moments where the optimizer was saved.
        optimizer: None for weights alone, else {type, loss_scaler, steps: [{count, tensors}],
            weight_decay: [{rate, tensors, elements}]}.
        fingerprint: {precision, loss (nats), tokens (how many), rounded (which other precisions it has figures of)} of
            what the model computes, or {fault}: why it can't be understood; None in older ones.
        tokenizer: {type, tokens, fingerprint} of the one in it, or {fault}: why it can't be opened; None where there is
            none, or where all checkpoints of a run are looked at.
        ranks: number of ranks that wrote files.
    """

    format_version: int
    code: dict[str, str]
    written: str
    run_name: str | None
    samples: int | None
    tokens: int | None
    skipped_steps: int | None
    seconds: float | None
    validation_loss: float | None
    epoch: int | None
    parameters: int
    parameter_tensors: int
    kinds: list[str]
    optimizer: dict[str, Any] | None
    fingerprint: dict[str, Any] | None
    tokenizer: dict[str, Any] | None
    ranks: int


@dataclass(frozen=True)
class TensorStatistics:
    """One tensor: mean, standard deviation (of all elements, not of a sample), min and max of its finite elements.

    They are None where no element is finite. nonfinite: number of NaN and infinite elements.
    """

    kind: str
    name: str
    shape: list[int]
    pieces: int
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    nonfinite: int


@dataclass(frozen=True)
class CheckpointReport:
    """One checkpoint.

    Attributes:
        path: its folder; a link such as lm_current is followed.
        step: optimizer steps made; where the manifest can't be read, what the folder's name says.
        bytes: of all its files on the disk.
        quick: only the sizes of the files were compared, not their hashes.
        damage: a line for every file at fault and every tensor that can't be read; none in a sound checkpoint.
        contents: None if the manifest can't be read.
        files: the manifest first; none if it can't be read.
        other_files: in the folder, but not of the checkpoint.
        tensors: None if they were not asked for.
    """

    KIND: ClassVar[str] = "checkpoint"
    path: str
    step: int | None
    bytes: int
    quick: bool
    damage: list[str]
    contents: Contents | None = None
    files: list[FileReport] = field(default_factory=list)
    other_files: list[str] = field(default_factory=list)
    tensors: list[TensorStatistics] | None = None

    @property
    def passed(self) -> bool:
        """Nothing is wrong with it."""
        return not self.damage


@dataclass(frozen=True)
class FolderReport:
    """All checkpoints of a run, by step.

    Attributes:
        path: the folder that they lie in.
        links: names such as lm_current, and the folder that each points to.
        leftovers: hidden folders of saves that are going on or were cut off.
    """

    KIND: ClassVar[str] = "folder"
    path: str
    checkpoints: list[CheckpointReport]
    links: dict[str, str]
    leftovers: list[str]

    @property
    def passed(self) -> bool:
        """Every checkpoint is sound."""
        return all(report.passed for report in self.checkpoints)


def inspect_path(path: str | Path, *, quick: bool = False, tensors: bool = False) -> CheckpointReport | FolderReport:
    """Look at a checkpoint, or at all checkpoints of a run. Local; changes nothing.

    Args:
        path: a checkpoint or a link to one; a run folder; or the folder with its checkpoints.
        quick: compare the sizes of the files, not their hashes.
        tensors: read every tensor for its statistics; of one checkpoint only.

    Raises:
        UserError: there is no checkpoint (says what is there), or it has another format version. A damaged one is
            reported, not raised.
    """
    path = Path(path)
    with readable(path):
        directory = find_directory(path)
        if directory is None:
            return look(path, quick, tensors)[0]
        if tensors:
            example = list_checkpoints(directory)[-1]
            raise UserError(f"{path} holds checkpoints; to list the tensors of one, name it, such as {example}")
        return _inspect_directory(directory, quick)


def report_json(report: "CheckpointReport | FolderReport | Comparison") -> str:
    """A report as one JSON object: its attributes, `report` (which kind) and `passed`.

    Strict JSON: numbers that are not finite are the strings "NaN", "Infinity" and "-Infinity".
    """
    whole = {"report": report.KIND, "passed": report.passed, **asdict(report)}
    return strict_json(whole)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """A folder that the system won't let us read is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"can't read {path}: {error}") from error


def find_directory(path: Path) -> Path | None:
    """The folder with the checkpoints of a run, if that is what `path` means; None if it may be a checkpoint itself."""
    if not path.is_dir():
        return None
    for directory in (path / "checkpoints", path):
        if list_checkpoints(directory):
            return directory
        if leftovers := _leftovers(directory):
            raise UserError(f"{directory} holds no checkpoint under its name, only {', '.join(leftovers)}")
    if (path / "checkpoints").is_dir() or (checkpoint_step(path) is None and not any(path.iterdir())):
        raise UserError(f"{path} holds no checkpoints")
    return None


def _leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob(".step_*"))


def _inspect_directory(directory: Path, quick: bool) -> FolderReport:
    reports = []
    for path in list_checkpoints(directory):
        try:
            report = look(path, quick, tokenizer=False)[0]
        except (UserError, OSError) as error:  # of another format version, say: no reason to hide the others
            report = CheckpointReport(str(path), checkpoint_step(path), _bytes_in(path), quick, [str(error)])
        if path.exists():  # a run that goes on deletes its old ones
            reports.append(report)
    links = {path.name: os.readlink(path) for path in sorted(directory.iterdir()) if path.is_symlink()}
    links = {name: Path(target).name for name, target in links.items() if checkpoint_step(target) is not None}
    return FolderReport(str(directory), reports, links, _leftovers(directory))


def look(
    path: Path, quick: bool, tensors: bool = False, tokenizer: bool = True
) -> tuple[CheckpointReport, Checkpoint | None]:
    """A report, and the checkpoint for reading, damaged or not; None if the manifest can't be read.

    tokenizer: open the one in it, which takes long beside the rest.
    """
    path = follow_link(path)
    try:
        manifest = read_manifest(path)
    except DamagedCheckpoint as error:
        damage = [str(error).removeprefix(f"checkpoint {path} is damaged: ")]
        return CheckpointReport(str(path), checkpoint_step(path), _bytes_in(path), quick, damage), None
    checkpoint = Checkpoint(path, manifest)
    files = _check_files(checkpoint, quick)
    damage = [file.damage for file in files if file.damage]
    statistics = None
    if tensors:
        statistics = []
        for kind, entries in manifest["tensors"].items():
            for name in sorted(entries):
                one = _describe(checkpoint, kind, name)
                if one is None:
                    damage.append(f"{kind} of {name} can't be read")
                else:
                    statistics.append(one)
    report = CheckpointReport(
        path=str(path),
        step=checkpoint.step,
        bytes=sum(file.bytes for file in files),
        quick=quick,
        damage=damage,
        contents=_contents(checkpoint, tokenizer),
        files=files,
        other_files=sorted(_names_in(path) - {file.name for file in files}),
        tensors=statistics,
    )
    return report, checkpoint


def _names_in(folder: Path) -> set[str]:
    """Of all files, those of deeper folders with these, as in the manifest."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def _bytes_in(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in _names_in(folder))


def _check_files(checkpoint: Checkpoint, quick: bool) -> list[FileReport]:
    """Every file, the manifest first: that one was read, and is sound."""
    manifest, folder = checkpoint.manifest, checkpoint.path
    names = sorted(manifest["files"])
    damage = find_damages(folder, manifest, names, read=not quick)
    sizes = {name: path.stat().st_size if (path := folder / name).exists() else 0 for name in [MANIFEST, *names]}
    return [FileReport(name, size, damage.get(name)) for name, size in sizes.items()]


def _contents(checkpoint: Checkpoint, tokenizer: bool) -> Contents:
    manifest, elements = checkpoint.manifest, {name: math.prod(shape) for name, shape in checkpoint.shapes.items()}
    progress = checkpoint.global_state.get("progress") or {}
    optimizer = checkpoint.optimizer
    if optimizer is not None:
        rates = {name: rate for name, rate in optimizer.get("weight_decay", {}).items() if name in elements}
        tensors = Counter(rates.values())
        optimizer = {
            "type": optimizer["type"],
            "loss_scaler": optimizer["loss_scaler"],
            "steps": [{"count": n, "tensors": k} for n, k in sorted(Counter(optimizer["steps"].values()).items())],
            "weight_decay": [
                {
                    "rate": rate,
                    "tensors": tensors[rate],
                    "elements": sum(elements[n] for n in rates if rates[n] == rate),
                }
                for rate in sorted(tensors, reverse=True)
            ],
        }
    return Contents(
        format_version=manifest["version"],
        code=manifest["code"],
        written=manifest["written"],
        run_name=checkpoint.run_config.get("name"),
        **{name: progress.get(name) for name in ("samples", "tokens", "skipped_steps", "seconds")},
        **{name: manifest["marks"][name] for name in ("validation_loss", "epoch")},
        parameters=sum(elements.values()),
        parameter_tensors=len(elements),
        kinds=list(manifest["tensors"]),
        optimizer=optimizer,
        fingerprint=_describe_fingerprint(manifest.get("fingerprint")),
        tokenizer=_describe_tokenizer(checkpoint) if tokenizer else None,
        ranks=len({Path(n).stem.rpartition("_")[2] for n in manifest["files"] if n.endswith(".safetensors")}),
    )


def _describe_fingerprint(stored: dict[str, Any] | None) -> dict[str, Any] | None:
    if stored is None:
        return None
    try:
        one = Fingerprint.from_json(stored)
    except ValueError as error:
        return {"fault": str(error)}
    return {"precision": one.precision, "loss": one.loss, "tokens": len(one.tokens), "rounded": list(one.rounded)}


def _describe_tokenizer(checkpoint: Checkpoint) -> dict[str, Any] | None:
    try:
        one = checkpoint.tokenizer()
    except UserError as error:  # where a file of it is damaged, that is listed with the files
        return {"fault": str(error).removeprefix(f"checkpoint {checkpoint.path} is damaged: ")}
    return None if one is None else {"type": one.kind, "tokens": one.vocab_size, "fingerprint": one.fingerprint}


def read_flattened(checkpoint: Checkpoint, kind: str, name: str) -> Tensor | None:
    """One tensor, flattened, (numel,); None if it can't be read.

    A file may be a sound safetensors file, and yet not the one that the manifest means: of other shapes, or types.
    """
    try:
        return checkpoint.read(name, kind).view(-1)
    except DamagedCheckpoint:
        return None


def _describe(checkpoint: Checkpoint, kind: str, name: str) -> TensorStatistics | None:
    """Statistics of the finite elements, summed up in fp64; None if the tensor can't be read."""
    tensor, entry = read_flattened(checkpoint, kind, name), checkpoint.manifest["tensors"][kind][name]
    if tensor is None:
        return None
    count, total, squares, low, high = 0, 0.0, 0.0, math.inf, -math.inf
    for chunk in _finite_chunks(tensor):
        count, total = count + chunk.numel(), total + chunk.sum().item()
        low, high = min(low, chunk.min().item()), max(high, chunk.max().item())
    mean = total / count if count else None
    for chunk in _finite_chunks(tensor):  # a second time: sums of squares would cancel where the mean is large
        squares += (chunk - mean).square_().sum().item()
    return TensorStatistics(
        kind=kind,
        name=name,
        shape=entry["shape"],
        pieces=len(entry["pieces"]),
        mean=mean,
        std=math.sqrt(squares / count) if count else None,
        min=low if count else None,
        max=high if count else None,
        nonfinite=tensor.numel() - count,
    )


def _finite_chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The finite elements, fp64, a part at a time; no part is empty."""
    for chunk in tensor.split(CHUNK):
        finite = chunk[chunk.isfinite()].double()
        if finite.numel():
            yield finite
