"""How two checkpoints differ. Tensors are read one of each at a time: memory is bounded by the largest."""

import json
import math
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from megaslm.checkpoint.fingerprint import Fingerprint, compare_fingerprints, why_not_comparable
from megaslm.checkpoint.folder import list_checkpoints
from megaslm.checkpoint.format import TOKENIZER, Checkpoint
from megaslm.checkpoint.inspection import CHUNK, CheckpointReport, find_directory, look, read_flattened, readable
from megaslm.errors import UserError

MISSING = object()
PER_PARAMETER = ("steps", "weight_decay")  # of the optimizer: {parameter: value}


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

    Left out, since two runs of the same command differ in them: `written`, `code`, progress.seconds, how the tensors
    are cut into pieces and files; fingerprints within their tolerance, or not comparable; and what older checkpoints
    do not have, a fingerprint and a tokenizer.

    Attributes:
        a, b: what each is, and whether it is sound.
        equal: nothing differs. False where a manifest or a tensor can't be read.
        values: {"step" | "run_config" | "global_state" | "marks" | "fingerprint" | "tokenizer" | "optimizer" |
            "optimizer.steps" | "optimizer.weight_decay": [{name, a, b}]}; `a` or `b` is absent where there is no such
            name. "fingerprint" and "tokenizer" (the hashes of its files) where both have one.
        not_comparable: {"fingerprint": why} where both have one, and they say nothing of each other.
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
    not_comparable: dict[str, str]
    only_in_a: list[str]
    only_in_b: list[str]
    shapes: list[dict[str, Any]]
    tensors: list[KindComparison]
    show: int

    @property
    def passed(self) -> bool:
        """Both are sound, and nothing differs."""
        return self.equal and self.a.passed and self.b.passed


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
        with readable(path):
            directory = find_directory(path)
            if directory is not None:
                example = list_checkpoints(directory)[-1]
                raise UserError(f"{path} holds checkpoints; to compare one, name it, such as {example}")
            opened.append(look(path, quick))
    (report_a, one), (report_b, other) = opened
    if one is None or other is None:
        return Comparison(report_a, report_b, False, {}, {}, [], [], [], [], show)
    obstacle = None
    if one.fingerprint and other.fingerprint:
        obstacle = why_not_comparable(one.fingerprint, other.fingerprint)
    not_comparable = {"fingerprint": obstacle} if obstacle else {}
    values = _compare_values(one, other, leave_out=not_comparable)
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
    return Comparison(report_a, report_b, equal, values, not_comparable, only_in_a, only_in_b, shapes, tensors, show)


def _compare_values(a: Checkpoint, b: Checkpoint, leave_out: Container[str]) -> dict[str, list[dict[str, Any]]]:
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
    if a.fingerprint and b.fingerprint and "fingerprint" not in leave_out:
        values["fingerprint"] = _compare_fingerprints(a.fingerprint, b.fingerprint)
    tokenizers = [_tokenizer_hashes(x) for x in (a, b)]
    if all(tokenizers):
        values["tokenizer"] = _differences(*tokenizers)
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


def _compare_fingerprints(a: Fingerprint, b: Fingerprint) -> list[dict[str, Any]]:
    if compare_fingerprints(a, b) is None:
        return []
    both = a.figures.keys() & b.figures.keys()
    return _differences(*({name: asdict(x.figures[name]) for name in both} for x in (a, b)))


def _tokenizer_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Of its files, by name; none in older checkpoints."""
    files = checkpoint.manifest["files"].items()
    return {name: entry["sha256"] for name, entry in files if name.startswith(f"{TOKENIZER}/")}


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
    x, y = read_flattened(a, kind, name), read_flattened(b, kind, name)
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
