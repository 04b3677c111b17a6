"""From logits to the next token: penalties, filters and the draw. Definitions as transformers' logits processors.

Shapes: B rows, V vocabulary. Every function returns new logits, or those it was given where there is nothing to do.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def penalize_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make tokens that were `seen` [B, V] (bool) less likely: logits above zero divided by `penalty`, others multiplied
    by it (CTRL, arXiv:1909.05858)."""
    penalized = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, penalized, logits_BV)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """-inf for all but the `k` largest of each row, and those equal to the smallest of them."""
    if k >= logits_BV.size(-1):
        return logits_BV
    return logits_BV.masked_fill(logits_BV < logits_BV.topk(k).values[:, -1:], -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """-inf for the least probable tokens whose probabilities sum to at most 1 - `p`; one is always kept (nucleus
    sampling, arXiv:1904.09751)."""
    # What other filters have left is all that there is to sort.
    candidates = int((logits_BV > -torch.inf).sum(-1).max())
    values, ids = logits_BV.topk(candidates)
    values, ids = values.flip(-1), ids.flip(-1)
    unlikely = values.softmax(-1).cumsum(-1) <= 1 - p
    unlikely[:, -1] = False
    kept = torch.full_like(logits_BV, -torch.inf)
    return kept.scatter_(-1, ids, values.masked_fill(unlikely, -torch.inf))


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token of each row, [B], at which its cumulative probability first exceeds `uniform_B` (fp64, in [0, 1)).

    One number for a draw, and not one for every token: rows can have generators of their own at no cost.
    """
    cumulative = logits_BV.softmax(-1, dtype=torch.float64).cumsum(-1)
    # The last is made exactly 1: no rounding leads past it. A token that cannot be drawn equals the one before it.
    cumulative = cumulative / cumulative[:, -1:]
    # A row of logits that are not finite has no probabilities; what stands for its token is one of the vocabulary.
    return torch.searchsorted(cumulative, uniform_B[:, None], right=True)[:, 0].clamp(max=logits_BV.size(-1) - 1)


class RepeatedNgrams:
    """Which tokens would complete a sequence of `size` tokens that a text has already; one dictionary a text."""

    def __init__(self, size: int, texts: Sequence[Sequence[int]]):
        self.size = size
        self._texts = [[] for _ in texts]
        self._followers: list[dict[tuple[int, ...], set[int]]] = [defaultdict(set) for _ in texts]
        for row, text in enumerate(texts):
            for token in text:
                self.append(row, token)

    def append(self, row: int, token: int) -> None:
        text = self._texts[row]
        if len(text) >= self.size - 1:
            self._followers[row][self._end(text)].add(token)
        text.append(token)

    def ban(self, logits_BV: Tensor) -> Tensor:
        """-inf for these tokens, but in rows of which nothing would be left."""
        banned = [
            (row, token)
            for row, text in enumerate(self._texts)
            for token in self._followers[row].get(self._end(text), ())
        ]
        if not banned:
            return logits_BV
        rows, tokens = torch.tensor(banned, device=logits_BV.device).unbind(1)
        allowed_BV = logits_BV.index_put((rows, tokens), logits_BV.new_tensor(-torch.inf))
        return torch.where((allowed_BV > -torch.inf).any(-1, keepdim=True), allowed_BV, logits_BV)

    def _end(self, text: list[int]) -> tuple[int, ...]:
        return tuple(text[len(text) - self.size + 1 :])
