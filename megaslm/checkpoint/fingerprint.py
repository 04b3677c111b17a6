"""What a model computes on a few fixed tokens: kept in its checkpoints, and compared wherever it is put together again.

The hashes of a checkpoint's files tell that its numbers are those that were saved. The fingerprint tells that the model
made of them is the one that was trained: that every number that took part is in its place, and that the code still
computes the same. What takes no part is not seen: rows of the embedding and of the head for ids that are neither among
its tokens nor among its logits (the loss sees those of the head, though hardly), learned positions beyond its tokens,
and the rotary angles of larger distances than theirs.

It is computed in fp32, whatever the run's precision, from weights rounded to that precision: those of a bf16 engine as
they are, or fp32 weights that are rounded to bf16 here, which gives the same numbers. The noise of bf16 arithmetic, a
few per cent of a logit, would hide a layer whose queries and keys are mixed up. Only equal roundings are compared: that
of a sound model to bf16 may change its loss by more than such damage does. So one of fp32 weights has the figures of
their roundings beside its own: the run may go on in any precision.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaslm.model import DTYPES, LanguageModel

NUM_TOKENS = 33  # 32 inputs and the last target
NUM_LOGITS = 32
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}
ROUNDINGS = ("bf16", "fp16")  # of fp32 weights, that a checkpoint of them may go on in

# Largest difference between two values, relative to the larger of 1 and their size. Measured on trained models of 4 and
# 16 layers, 64 texts each. On one machine the numbers are equal bit for bit in any layout; the rounding of fp32
# arithmetic, against fp64, is 2e-7 of the loss and 2e-6 of a logit, and 2e-5 of a logit in a model of 24 layers with
# large weights. That is IEEE fp32: TF32 moves a logit by 1e-3. One per cent of a matrix is 1e-3 of a logit, two of its
# rows swapped as much, a layer's queries, keys and values mixed up 1e-2 and more.
LOSS_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Figures:
    """Of a model whose weights are in one precision.

    loss: mean over the targets, nats.
    logits: of the last position, at up to 32 ids spread evenly over the true vocabulary.
    """

    loss: float
    logits: list[float]

    def to_json(self) -> dict[str, Any]:
        return {"loss": _finite_or_none(self.loss), "logits": [_finite_or_none(logit) for logit in self.logits]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Figures":
        if not value["logits"]:
            raise ValueError("it has no logits")
        return cls(_nan_for_none(value["loss"]), [_nan_for_none(logit) for logit in value["logits"]])


@dataclass(frozen=True)
class Fingerprint:
    """Of one model, on tokens that are one document.

    Attributes:
        tokens: ids; all but the last are inputs, all but the first are targets.
        precision: of the weights, "fp32", "bf16" or "fp16".
        loss, logits: see `Figures`.
        rounded: the figures of fp32 weights rounded to other precisions, by their names; may be empty.
    """

    tokens: list[int]
    precision: str
    loss: float
    logits: list[float]
    rounded: dict[str, Figures] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, Figures]:
        """By the precision of the weights."""
        return {self.precision: Figures(self.loss, self.logits), **self.rounded}

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: null stands for a value that is not finite."""
        return {
            **asdict(self),
            **Figures(self.loss, self.logits).to_json(),
            "rounded": {precision: figures.to_json() for precision, figures in self.rounded.items()},
        }

    @classmethod
    def from_json(cls, value: Any) -> "Fingerprint":
        """Fields that are not known are left aside.

        Raises:
            ValueError: it is of another layout than ours.
        """
        try:
            own = Figures.from_json(value)
            rounded = {str(name): Figures.from_json(one) for name, one in value.get("rounded", {}).items()}
            tokens = [index(token) for token in value["tokens"]]
            if len(tokens) < 2:
                raise ValueError("it has no target")
            return cls(tokens, str(value["precision"]), own.loss, own.logits, rounded)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"a fingerprint that this megaslm does not understand ({error!r})") from error


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nan_for_none(value: float | None) -> float:
    return math.nan if value is None else float(value)


@torch.no_grad()
def take_fingerprint(
    model: LanguageModel,
    tokens: Sequence[int],
    precision: str,
    device: torch.device | str,
    *,
    with_roundings: bool = False,
) -> Fingerprint:
    """One forward pass of one short sequence, in evaluation mode; the model's mode is then what it was.

    Through the model as a whole, whose hooks gather the weights under ZeRO-3, and whose layers talk to the other ranks
    under tensor parallelism: all ranks call it.

    Args:
        tokens: two or more, of which all but the last fit in the context.
        precision: round fp32 weights to this one: that of the fingerprint to compare with. Weights of another type stay
            as they are, and the result names theirs.
        device: of the model's inputs.
        with_roundings: of fp32 weights that stay fp32, take the figures of ROUNDINGS too, for a fingerprint that is to
            be kept: a forward pass more for each.
    """
    own = next(model.parameters()).dtype
    first = DTYPES[precision] if own == torch.float32 else own
    types = [first]
    if with_roundings and first == torch.float32:
        types += [DTYPES[name] for name in ROUNDINGS]
    ids = torch.tensor(tokens, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    try:
        rows = torch.stack([_compute(model, ids, dtype) for dtype in types]).tolist()  # the host waits once
    finally:
        model.train(was_training)
    figures = {PRECISIONS[dtype]: Figures(row[0], row[1:]) for dtype, row in zip(types, rows, strict=True)}
    one = figures.pop(PRECISIONS[first])
    return Fingerprint(list(map(int, tokens)), PRECISIONS[first], one.loss, one.logits, figures)


def _compute(model: LanguageModel, ids: Tensor, rounded_to: torch.dtype) -> Tensor:
    """The loss and the chosen logits, (1 + NUM_LOGITS,) or fewer, fp32."""
    with _fp32_arithmetic(model, rounded_to):
        logits_SV = model(ids[None, :-1])[0]
    size = logits_SV.size(1)
    chosen = torch.arange(min(NUM_LOGITS, size), device=ids.device) * size // min(NUM_LOGITS, size)
    return torch.cat([F.cross_entropy(logits_SV, ids[1:])[None], logits_SV[-1, chosen]])


@contextlib.contextmanager
def _fp32_arithmetic(model: nn.Module, rounded_to: torch.dtype) -> Iterator[None]:
    """Let every module compute with fp32 copies of its own weights, rounded before, for as long as it runs.

    Module by module, so that one such copy exists at a time, and under ZeRO-3 of weights that were just gathered: this
    hook comes after the engine's, and on the way out before it. The parameters are left alone, since the engine's hooks
    hang on them: another tensor stands in their place.
    """
    replaced: dict[nn.Module, dict[str, Tensor]] = {}

    def widen(module: nn.Module, _) -> None:
        replaced[module] = dict(module.named_parameters(recurse=False))
        for name, parameter in replaced[module].items():
            module._parameters[name] = parameter.detach().to(rounded_to).float()

    def put_back(module: nn.Module, *_) -> None:
        module._parameters.update(replaced.pop(module))

    handles = []
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(put_back, prepend=True))
    try:
        with _ieee_matmuls():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(replaced):  # of a forward pass that failed
            put_back(module)


@contextlib.contextmanager
def _ieee_matmuls() -> Iterator[None]:
    """Neither TF32 nor bf16 inside fp32 matmuls, whatever the process or its environment asks for.

    Theirs alone: of what else has such a mode, convolutions and recurrences, the network has none.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class FingerprintCheck:
    """What came of comparing a model with a stored fingerprint.

    equal: to within the rounding of fp32; None: nothing could be compared.
    text: one clause: the loss that is equal, what differs, or why nothing was compared.
    """

    equal: bool | None
    text: str


def check_fingerprint(
    model: LanguageModel, stored: Fingerprint, device: torch.device | str, is_rounded: bool = False
) -> FingerprintCheck:
    """See whether a model computes what it did when its fingerprint was taken. All ranks call it.

    Args:
        device: of the model's inputs.
        is_rounded: the weights are fp32 and were rounded to the fingerprint's precision: they are used as they are.
    """
    now = obstacle = None
    if stored.precision not in DTYPES:
        obstacle = f"it is of weights in {stored.precision}, which this megaslm does not know"
    elif len(stored.tokens) - 1 > model.config.context_length:
        obstacle = f"its {len(stored.tokens) - 1} tokens do not fit in a context of {model.config.context_length}"
    elif not all(0 <= token < model.config.vocab_size for token in stored.tokens):
        obstacle = f"its tokens are not all in a vocabulary of {model.config.vocab_size:,}"
    else:
        now = take_fingerprint(model, stored.tokens, "fp32" if is_rounded else stored.precision, device)
        now = replace(now, precision=stored.precision) if is_rounded else now
        obstacle = why_not_comparable(stored, now)
    if obstacle is not None:
        return FingerprintCheck(None, obstacle)
    difference = compare_fingerprints(stored, now)
    if difference is not None:
        return FingerprintCheck(False, difference)
    loss = f"a loss of {now.loss:.6f} nats, as when it was saved"
    return FingerprintCheck(True, f"{loss} (weights in {now.precision}, arithmetic in IEEE fp32)")


def why_not_comparable(a: Fingerprint, b: Fingerprint) -> str | None:
    """Why two fingerprints say nothing of each other, in one clause; None where they do."""
    if a.tokens != b.tokens:
        return "other tokens"
    if not a.figures.keys() & b.figures.keys():
        return f"weights in {a.precision} and in {b.precision}"
    for precision in a.figures.keys() & b.figures.keys():
        counts = [len(one.figures[precision].logits) for one in (a, b)]
        if counts[0] != counts[1]:
            return f"{counts[0]} logits and {counts[1]}"
    return None


def compare_fingerprints(stored: Fingerprint, now: Fingerprint) -> str | None:
    """What differs by more than rounding explains, in one clause; None where nothing does.

    In every precision that both have figures of; they are comparable, see `why_not_comparable`.
    """
    assert why_not_comparable(stored, now) is None, "the fingerprints are not comparable"
    for precision, before in stored.figures.items():
        after = now.figures.get(precision)
        found = [] if after is None else _differences(before, after)
        if found:
            return f"{'; '.join(found)} (weights in {precision})"
    return None


def _differences(before: Figures, after: Figures) -> list[str]:
    found = []
    for name, limit, befores, afters in (
        ("the loss in nats", LOSS_TOLERANCE, [before.loss], [after.loss]),
        ("the logit that is furthest off", LOGIT_TOLERANCE, before.logits, after.logits),
    ):
        worst, x, y = max(_distances(befores, afters))
        if worst > limit:
            found.append(f"{name} was {x:.7g} and is {y:.7g}, {worst:.1e} apart where {limit:.0e} is allowed")
    return found


def _distances(before: list[float], after: list[float]) -> Iterator[tuple[float, float, float]]:
    """(distance, x, y) of every pair; two values that are not finite are equal, one alone is infinitely far off."""
    for x, y in zip(before, after, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            yield abs(x - y) / max(1.0, abs(x), abs(y)), x, y
        else:
            yield (math.inf if math.isfinite(x) or math.isfinite(y) else 0.0), x, y
