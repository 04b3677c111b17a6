"""What a model computes on a few fixed tokens: kept in its checkpoints, and compared wherever it is put together again.

The hashes of a checkpoint's files tell that its numbers are those that were saved. The fingerprint tells that the model
made of them is the one that was trained: that every number is in its place, and that the code still computes the same.

It is computed in fp32, whatever the run's precision, from weights rounded to that precision: those of a bf16 engine as
they are, or fp32 weights that are rounded to bf16 here, which gives the same numbers. The noise of bf16 arithmetic, a
few per cent of a logit, would hide a layer whose queries and keys are mixed up.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaslm.model import LanguageModel

NUM_TOKENS = 33  # 32 inputs and the last target
NUM_LOGITS = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Tolerance:
    """Largest difference between two values, relative to the larger of 1 and their size."""

    loss: float
    logit: float


# Measured on trained models of 4 and 16 layers, 64 texts each. In the same precision the numbers are equal bit for bit
# in any layout on one machine; the rounding of fp32 arithmetic, against fp64, is 2e-7 of the loss and 2e-6 of a logit,
# and 2e-5 of a logit in a model of 24 layers with large weights. One per cent of a matrix is 1e-3 of a logit, two of
# its rows swapped as much, a layer's queries, keys and values mixed up 1e-2 and more.
SAME_PRECISION = Tolerance(loss=1e-5, logit=1e-4)
# An fp32 run that goes on in bf16: the rounding of the weights is 3e-4 of the loss and 2e-2 of a logit.
OTHER_PRECISION = Tolerance(loss=2e-3, logit=1e-1)


@dataclass(frozen=True)
class Fingerprint:
    """Of one model, on tokens that are one document.

    Attributes:
        tokens: ids; all but the last are inputs, all but the first are targets.
        precision: that the weights are rounded to, "fp32", "bf16" or "fp16".
        loss: mean over the targets, nats.
        logits: of the last position, at up to 32 ids spread evenly over the true vocabulary.
    """

    tokens: list[int]
    precision: str
    loss: float
    logits: list[float]

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: null stands for a value that is not finite."""
        return {
            **asdict(self),
            "loss": _finite_or_none(self.loss),
            "logits": [_finite_or_none(logit) for logit in self.logits],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Fingerprint":
        """Fields that are not known are left aside."""
        return cls(
            tokens=value["tokens"],
            precision=value["precision"],
            loss=_nan_for_none(value["loss"]),
            logits=[_nan_for_none(logit) for logit in value["logits"]],
        )


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _nan_for_none(value: float | None) -> float:
    return math.nan if value is None else value


@torch.no_grad()
def take_fingerprint(
    model: LanguageModel, tokens: Sequence[int], precision: str, device: torch.device | str
) -> Fingerprint:
    """One forward pass of one short sequence, in evaluation mode; the model's mode is then what it was.

    Through the model as a whole, whose hooks gather the weights under ZeRO-3: all ranks call it.

    Args:
        tokens: two or more, of which all but the last fit in the context.
        precision: round fp32 weights to this one: that of the fingerprint to compare with. Weights of another type stay
            as they are, and the result names theirs.
        device: of the model's inputs.
    """
    own = next(model.parameters()).dtype
    rounded_to = DTYPES[precision] if own == torch.float32 else own
    ids = torch.tensor(tokens, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    try:
        with _fp32_arithmetic(model, rounded_to):
            logits_SV = model(ids[None, :-1])[0]
    finally:
        model.train(was_training)
    loss = F.cross_entropy(logits_SV, ids[1:])
    size = logits_SV.size(1)
    chosen = torch.arange(min(NUM_LOGITS, size), device=device) * size // min(NUM_LOGITS, size)
    values = torch.cat([loss[None], logits_SV[-1, chosen]]).tolist()  # the host waits once
    return Fingerprint(list(map(int, tokens)), PRECISIONS[rounded_to], values[0], values[1:])


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
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in list(replaced):  # of a forward pass that failed
            put_back(module)


def compare_fingerprints(stored: Fingerprint, now: Fingerprint) -> str | None:
    """What differs by more than rounding explains, in one clause; None where nothing does.

    Both must be of the same tokens.
    """
    assert stored.tokens == now.tokens, "the fingerprints are of different tokens"
    if len(stored.logits) != len(now.logits):
        return f"the model had {len(stored.logits)} logits to look at and has {len(now.logits)}: another vocabulary"
    tolerance = SAME_PRECISION if stored.precision == now.precision else OTHER_PRECISION
    found = []
    for name, limit, before, after in (
        ("the loss in nats", tolerance.loss, [stored.loss], [now.loss]),
        ("the logit that is furthest off", tolerance.logit, stored.logits, now.logits),
    ):
        worst, x, y = max(_distances(before, after))
        if worst > limit:
            found.append(f"{name} was {x:.7g} and is {y:.7g}, {worst:.1e} apart where {limit:.0e} is allowed")
    return f"{'; '.join(found)} (weights in {stored.precision} then, {now.precision} now)" if found else None


def _distances(before: list[float], after: list[float]) -> Iterator[tuple[float, float, float]]:
    """(distance, x, y) of every pair; two values that are not finite are equal, one alone is infinitely far off."""
    for x, y in zip(before, after, strict=True):
        if math.isfinite(x) and math.isfinite(y):
            yield abs(x - y) / max(1.0, abs(x), abs(y)), x, y
        else:
            yield (math.inf if math.isfinite(x) or math.isfinite(y) else 0.0), x, y
