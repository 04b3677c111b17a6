"""Look at checkpoints and change nothing: what one holds, whether it is sound, how two differ.

Needs neither a device nor DeepSpeed. Tensors are read one at a time, or one of each of two checkpoints: memory is
bounded by the largest. Reports are plain dataclasses; tools/inspect_checkpoint.py prints them.
"""

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from megaslm.checkpoint.folder import checkpoint_step, list_checkpoints
from megaslm.checkpoint.format import MANIFEST, Checkpoint, DamagedCheckpoint, find_damages, follow_link, read_manifest
from megaslm.errors import UserError

CHUNK = 2**22  # elements that are looked at in fp64 at a time
MISSING = object()
PER_PARAMETER = ("steps", "weight_decay")  # of the optimizer: {parameter: value}


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


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs between A and B.

    Attributes:
        elements, differing: all, and those whose bits differ.
        largest: largest |a - b| over the elements that are finite in both.
        relative: norm of a - b over the norm of a, over the same elements; infinite where a is zero and b is not.
        nonfinite_a, nonfinite_b: number of NaN and infinite elements.
        differing_nonfinite: elements that differ and are not finite in A or B: `largest` and `relative` leave them out.
    """

    name: str
    elements: int
    differing: int
    largest: float
    relative: float
    nonfinite_a: int
    nonfinite_b: int
    differing_nonfinite: int


@dataclass(frozen=True)
class KindComparison:
    """The tensors of one kind that A and B both have, in the same shape.

    Attributes:
        compared, identical: number of tensors that were read, and of those that are equal bit for bit.
        largest, relative: the largest of any tensor and that tensor's name, {value, name}; None if all are identical.
        differing: those that differ most, most first: differing non-finite elements first, then by `relative`.
        nonfinite: all tensors with NaN or infinite elements, {name, a, b}: their number in each.
        unreadable: tensors that could not be read in A or B.
    """

    kind: str
    compared: int
    identical: int
    largest: dict[str, Any] | None
    relative: dict[str, Any] | None
    differing: list[TensorDifference]
    nonfinite: list[dict[str, Any]]
    unreadable: list[str]


@dataclass(frozen=True)
class Comparison:
    """How checkpoint B differs from checkpoint A.

    Left out, since two runs of the same command differ in them: `written`, `code`, progress.seconds, and how the
    tensors are cut into pieces and files.

    Attributes:
        a, b: what each is, and whether it is sound.
        equal: nothing differs. False where a manifest or a tensor can't be read.
        values: {"step" | "run_config" | "global_state" | "marks" | "optimizer" | "optimizer.steps" |
            "optimizer.weight_decay": [{name, a, b}]}; `a` or `b` is absent where there is no such name.
        only_in_a, only_in_b: parameters.
        shapes: parameters of different shapes, {name, a, b}.
        tensors: one entry for every kind that both have.
        show: number of tensors of each kind that are listed.
    """

    KIND: ClassVar[str] = "comparison"
    a: CheckpointReport
    b: CheckpointReport
    equal: bool
    values: dict[str, list[dict[str, Any]]]
    only_in_a: list[str]
    only_in_b: list[str]
    shapes: list[dict[str, Any]]
    tensors: list[KindComparison]
    show: int

    @property
    def passed(self) -> bool:
        """Both are sound, and nothing differs."""
        return self.equal and self.a.passed and self.b.passed


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
    with _readable(path):
        directory = _find_directory(path)
        if directory is None:
            return _look(path, quick, tensors)[0]
        if tensors:
            example = list_checkpoints(directory)[-1]
            raise UserError(f"{path} holds checkpoints; to list the tensors of one, name it, such as {example}")
        return _inspect_directory(directory, quick)


def compare_checkpoints(a: str | Path, b: str | Path, *, quick: bool = False, show: int = 10) -> Comparison:
    """Compare checkpoint B with checkpoint A. Local; changes nothing; holds one tensor of each in memory.

    Args:
        a, b: checkpoints, or links to them.
        quick: compare the sizes of the files with their manifests, not the hashes; the tensors are read all the same.
        show: number of tensors to list of each kind, those that differ most.

    Raises:
        UserError: see `inspect_path`; or a folder of several checkpoints. A damaged one is reported, and what can be
            read of it compared.
    """
    opened = []
    for path in map(Path, (a, b)):
        with _readable(path):
            directory = _find_directory(path)
            if directory is not None:
                example = list_checkpoints(directory)[-1]
                raise UserError(f"{path} holds checkpoints; to compare one, name it, such as {example}")
            opened.append(_look(path, quick))
    (report_a, one), (report_b, other) = opened
    if one is None or other is None:
        return Comparison(report_a, report_b, False, {}, [], [], [], [], show)
    values = _compare_values(one, other)
    both = one.shapes.keys() & other.shapes.keys()
    shapes = [
        {"name": name, "a": list(one.shapes[name]), "b": list(other.shapes[name])}
        for name in sorted(both)
        if one.shapes[name] != other.shapes[name]
    ]
    names = sorted(both - {entry["name"] for entry in shapes})
    kinds = [kind for kind in one.manifest["tensors"] if kind in other.manifest["tensors"]]
    tensors = [_compare_kind(one, other, kind, names, show) for kind in kinds]
    only_in_a, only_in_b = (sorted(x.shapes.keys() - y.shapes.keys()) for x, y in ((one, other), (other, one)))
    equal = not (any(values.values()) or only_in_a or only_in_b or shapes)
    equal = equal and all(part.identical == len(names) for part in tensors)
    return Comparison(report_a, report_b, equal, values, only_in_a, only_in_b, shapes, tensors, show)


def report_json(report: CheckpointReport | FolderReport | Comparison) -> str:
    """A report as one JSON object: its attributes, `report` (which kind) and `passed`.

    Strict JSON: numbers that are not finite are the strings "NaN", "Infinity" and "-Infinity".
    """
    whole = {"report": report.KIND, "passed": report.passed, **asdict(report)}
    return json.dumps(_strict(whole), indent=1, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strict(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A folder that the system won't let us read is the user's to mend."""
    try:
        yield
    except OSError as error:
        raise UserError(f"can't read {path}: {error}") from error


def _find_directory(path: Path) -> Path | None:
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
            report = _look(path, quick)[0]
        except (UserError, OSError) as error:  # of another format version, say: no reason to hide the others
            report = CheckpointReport(str(path), checkpoint_step(path), _bytes_in(path), quick, [str(error)])
        if path.exists():  # a run that goes on deletes its old ones
            reports.append(report)
    links = {path.name: os.readlink(path) for path in sorted(directory.iterdir()) if path.is_symlink()}
    links = {name: Path(target).name for name, target in links.items() if checkpoint_step(target) is not None}
    return FolderReport(str(directory), reports, links, _leftovers(directory))


def _look(path: Path, quick: bool, tensors: bool = False) -> tuple[CheckpointReport, Checkpoint | None]:
    """A report, and the checkpoint for reading, damaged or not; None if the manifest can't be read."""
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
        for kind, part in manifest["tensors"].items():
            for name in sorted(part):
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
        contents=_contents(checkpoint),
        files=files,
        other_files=sorted({file.name for file in path.iterdir()} - {file.name for file in files}),
        tensors=statistics,
    )
    return report, checkpoint


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) if folder.is_dir() else 0


def _check_files(checkpoint: Checkpoint, quick: bool) -> list[FileReport]:
    """Every file, the manifest first: that one was read, and is sound."""
    manifest, folder = checkpoint.manifest, checkpoint.path
    names = sorted(manifest["files"])
    damage = find_damages(folder, manifest, names, read=not quick)
    sizes = {name: path.stat().st_size if (path := folder / name).exists() else 0 for name in [MANIFEST, *names]}
    return [FileReport(name, size, damage.get(name)) for name, size in sizes.items()]


def _contents(checkpoint: Checkpoint) -> Contents:
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
        ranks=len({Path(name).stem.rpartition("_")[2] for name in manifest["files"]}),  # weights_00003.safetensors
    )


def _read(checkpoint: Checkpoint, kind: str, name: str) -> Tensor | None:
    """One tensor, flattened, (numel,); None if it can't be read.

    A file may be a sound safetensors file, and yet not the one that the manifest means: of other shapes, or types.
    """
    try:
        tensor = checkpoint.read(name, kind)
    except (DamagedCheckpoint, RuntimeError):
        return None
    finally:
        checkpoint.close()  # open files stay mapped, and in the end the whole checkpoint would count as our memory
    return tensor.reshape(-1) if tensor.dtype == torch.float32 else None


def _describe(checkpoint: Checkpoint, kind: str, name: str) -> TensorStatistics | None:
    """Statistics of the finite elements, summed up in fp64; None if the tensor can't be read."""
    tensor, entry = _read(checkpoint, kind, name), checkpoint.manifest["tensors"][kind][name]
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


def _compare_values(a: Checkpoint, b: Checkpoint) -> dict[str, list[dict[str, Any]]]:
    """What differs in the two manifests, but for files and tensors; see `Comparison.values`."""

    def timeless(state: dict[str, Any]) -> dict[str, Any]:
        progress = state.get("progress")
        if not isinstance(progress, dict):
            return state
        return state | {"progress": {name: value for name, value in progress.items() if name != "seconds"}}

    values = {
        "step": _differences(a.step, b.step, "step"),
        "run_config": _differences(a.run_config, b.run_config),
        "global_state": _differences(timeless(a.global_state), timeless(b.global_state)),
        "marks": _differences(a.manifest["marks"], b.manifest["marks"]),
    }
    if a.optimizer is None or b.optimizer is None:
        holds = [" and ".join(["weights", *(["optimizer"] if x.optimizer else [])]) for x in (a, b)]
        return values | {"optimizer": _differences(*holds, "holds")}
    whole = [{name: value for name, value in x.optimizer.items() if name not in PER_PARAMETER} for x in (a, b)]
    values["optimizer"] = _differences(*whole)
    one_sided = a.shapes.keys() ^ b.shapes.keys()  # named as parameters already
    for part in PER_PARAMETER:
        found = _differences(*(x.optimizer.get(part, {}) for x in (a, b)))
        values[f"optimizer.{part}"] = [entry for entry in found if entry["name"] not in one_sided]
    return values


def _differences(a: Any, b: Any, name: str = "") -> list[dict[str, Any]]:
    """What differs between two JSON values, {name, a, b} by dotted name; compared as the text that is saved."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            found
            for key in sorted(a.keys() | b.keys())
            for found in _differences(a.get(key, MISSING), b.get(key, MISSING), f"{name}.{key}" if name else key)
        ]
    if a is not MISSING and b is not MISSING and json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True):
        return []
    return [{"name": name, **{side: value for side, value in (("a", a), ("b", b)) if value is not MISSING}}]


def _compare_kind(a: Checkpoint, b: Checkpoint, kind: str, names: list[str], show: int) -> KindComparison:
    found, unreadable = [], []
    for name in names:
        one = _compare_stored(a, b, kind, name)
        if one is None:
            unreadable.append(name)
        else:
            found.append(one)
    differing = [one for one in found if one.differing]

    def most(attribute: str) -> dict[str, Any] | None:
        top = max(differing, key=lambda one: getattr(one, attribute), default=None)
        return top and {"value": getattr(top, attribute), "name": top.name}

    differing.sort(key=lambda one: (-one.differing_nonfinite, -one.relative, -one.largest, -one.differing, one.name))
    return KindComparison(
        kind=kind,
        compared=len(found),
        identical=len(found) - len(differing),
        largest=most("largest"),
        relative=most("relative"),
        differing=differing[:show],
        nonfinite=[
            {"name": one.name, "a": one.nonfinite_a, "b": one.nonfinite_b}
            for one in found
            if one.nonfinite_a or one.nonfinite_b
        ],
        unreadable=unreadable,
    )


def _compare_stored(a: Checkpoint, b: Checkpoint, kind: str, name: str) -> TensorDifference | None:
    """A function of its own so that both tensors are let go before the next are read."""
    x, y = _read(a, kind, name), _read(b, kind, name)
    return None if x is None or y is None else _compare_tensors(name, x, y)


def _compare_tensors(name: str, a: Tensor, b: Tensor) -> TensorDifference:
    """Compare two fp32 tensors (numel,): their bits, and their values in fp64."""
    differing = differing_nonfinite = nonfinite_a = nonfinite_b = 0
    largest = squares = squares_a = 0.0
    for x, y in zip(a.split(CHUNK), b.split(CHUNK), strict=True):
        changed = x.view(torch.int32) != y.view(torch.int32)  # tells 0.0 from -0.0, and a NaN equals itself
        finite_x, finite_y = x.isfinite(), y.isfinite()
        finite = finite_x & finite_y
        differing += int(changed.sum())
        differing_nonfinite += int((changed & ~finite).sum())
        nonfinite_a += int((~finite_x).sum())
        nonfinite_b += int((~finite_y).sum())
        x, y = (torch.where(finite, part, 0.0).double() for part in (x, y))
        squares_a += x.square().sum().item()
        difference = x.sub_(y)
        largest = max(largest, difference.abs().max().item())
        squares += difference.square_().sum().item()
    relative = 0.0 if squares == 0 else math.sqrt(squares / squares_a) if squares_a else math.inf
    return TensorDifference(
        name, a.numel(), differing, largest, relative, nonfinite_a, nonfinite_b, differing_nonfinite
    )
