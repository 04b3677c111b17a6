"""Log-likelihoods of continuations: what the tasks of an evaluation harness ask of a model.

Shapes: B windows, S tokens of the longest of them, E width, V vocabulary, N scored tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from megaslm.model import LanguageModel

LOGITS_BYTES = 256 << 20  # of the scored tokens that are turned into probabilities at once, in fp32


class Continuation(NamedTuple):
    """Tokens to be scored, and those before them, at least one."""

    context: Sequence[int]
    tokens: Sequence[int]


class Likelihood(NamedTuple):
    """log_likelihood: sum over the tokens of a continuation, nats. is_greedy: each is the most probable one."""

    log_likelihood: float
    is_greedy: bool


class _Window(NamedTuple):
    owner: int
    tokens: Sequence[int]
    scored: int  # of the tokens, the last so many


@torch.inference_mode()
def score_continuations(
    model: LanguageModel,
    continuations: Sequence[Continuation],
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Likelihood]:
    """The likelihood of each continuation, in order, in fp32; one without tokens has log-likelihood 0 and is greedy.

    What does not fit in the model's context is cut off from the left. Of a continuation that is longer than that, each
    token is scored once: in pieces of a context's length, the last with as many tokens before it as fit.

    progress: called with the number of windows of each batch, `count_windows` in all.
    """
    windows = [
        _Window(owner, *window)
        for owner, one in enumerate(continuations)
        for window in scoring_windows(one.context, one.tokens, model.config.context_length)
    ]
    # Of about one length, so that little is padding; the longest first, so that memory runs out at once or never.
    windows.sort(key=lambda window: -len(window.tokens))
    sums, greedy = [0.0] * len(continuations), [True] * len(continuations)
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        for window, (log_likelihood, is_greedy) in zip(batch, _score(model, batch), strict=True):
            sums[window.owner] += log_likelihood
            greedy[window.owner] &= is_greedy
        progress(len(batch))
    return [Likelihood(*one) for one in zip(sums, greedy, strict=True)]


def count_windows(continuations: Sequence[Continuation], context_length: int) -> int:
    """How many windows `scoring_windows` makes of all of them."""
    return sum(-(-len(one.tokens) // context_length) for one in continuations)


def scoring_windows(
    context: Sequence[int], tokens: Sequence[int], context_length: int
) -> Iterator[tuple[Sequence[int], int]]:
    """(window, how many of its last tokens are scored), so that all of `tokens` are, once each and in order.

    A window has up to context_length inputs and one token more, its last target. The windows of the harness's
    loglikelihood_rolling, where the context is one token.
    """
    assert context, "the first token needs one before it"
    whole = [*context, *tokens]
    for start in range(len(context), len(whole), context_length):
        end = min(start + context_length, len(whole))
        yield whole[max(0, end - context_length - 1) : end], end - start


def _score(model: LanguageModel, windows: Sequence[_Window]) -> Iterator[Likelihood]:
    device = next(model.parameters()).device
    length = max(len(window.tokens) for window in windows) - 1
    # Padded on the right, where a causal network does not see it.
    inputs_BS = torch.zeros(len(windows), length, dtype=torch.int64)
    scored_BS = torch.zeros(len(windows), length, dtype=torch.bool)
    for row, window in enumerate(windows):
        end = len(window.tokens) - 1
        inputs_BS[row, :end] = torch.tensor(window.tokens[:-1])
        scored_BS[row, end - window.scored : end] = True
    targets_N = torch.tensor([token for window in windows for token in window.tokens[-window.scored :]], device=device)
    # The head runs on what is scored alone: most of a window is context.
    hidden_NE = model.decoder(inputs_BS.to(device))[scored_BS.to(device)]
    rows = max(1, LOGITS_BYTES // (4 * model.config.padded_vocab_size))
    log_probs, greedy = [], []
    for hidden, targets in zip(hidden_NE.split(rows), targets_N.split(rows), strict=True):
        logits_NV = model.head(hidden).float()
        log_probs.append(logits_NV.log_softmax(-1).gather(1, targets[:, None])[:, 0])
        greedy.append(logits_NV.argmax(-1) == targets)
    counts = [window.scored for window in windows]
    for of_window, equal in zip(
        torch.cat(log_probs).double().cpu().split(counts), torch.cat(greedy).cpu().split(counts), strict=True
    ):
        yield Likelihood(of_window.sum().item(), bool(equal.all()))
