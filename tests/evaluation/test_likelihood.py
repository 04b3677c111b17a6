"""Log-likelihoods of continuations against one forward pass for each token."""

import pytest
import torch

from megaslm.config import ModelConfig
from megaslm.evaluation import Continuation, likelihood, score_continuations
from megaslm.evaluation.likelihood import count_windows, scoring_windows
from megaslm.model import build_model

CONTEXT = 12


@pytest.fixture(scope="module", params=["rope", "learned"])
def model(request):
    config = ModelConfig(
        vocab_size=40,
        context_length=CONTEXT,
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        ffn_hidden_size=48,
        position=request.param,
        init_std=0.3,  # probabilities far from uniform
    )
    return build_model(config, seed=1).eval()


def numbers(count: int, seed: int) -> list[int]:
    return torch.randint(40, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def token_by_token(model, context: list[int], tokens: list[int]) -> tuple[float, bool]:
    """Each token from what stands before it, as much of it as fits."""
    total, greedy = 0.0, True
    for at, token in enumerate(tokens):
        before = [*context, *tokens[:at]]
        logits = model(torch.tensor([before]))[0, -1].double()
        total += logits.log_softmax(-1)[token].item()
        greedy = greedy and logits.argmax().item() == token
    return total, greedy


@torch.no_grad()
def most_probable(model, context: list[int], count: int) -> list[int]:
    tokens = list(context)
    for _ in range(count):
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(context) :]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_continuations_of_all_lengths_in_batches(model, batch_size, monkeypatch):
    monkeypatch.setattr(likelihood, "LOGITS_BYTES", 5 * 4 * model.config.padded_vocab_size)  # five tokens at once
    pairs = [(numbers(1 + i % 6, i), numbers(1 + i % 5, 100 + i)) for i in range(12)]
    pairs += [(context, most_probable(model, context, 3)) for context, _ in pairs[:4]]
    done = []
    found = score_continuations(model, [Continuation(*pair) for pair in pairs], batch_size, done.append)
    for (context, tokens), one in zip(pairs, found, strict=True):
        expected, greedy = token_by_token(model, context, tokens)
        assert one.log_likelihood == pytest.approx(expected, abs=1e-4) and one.is_greedy == greedy
    assert [one.is_greedy for one in found[-4:]] == [True] * 4 and not all(one.is_greedy for one in found)
    assert sum(done) == len(pairs) == count_windows([Continuation(*pair) for pair in pairs], CONTEXT)


def test_a_context_that_does_not_fit_loses_its_start(model):
    context, tokens = numbers(30, 0), numbers(4, 1)
    (found,) = score_continuations(model, [Continuation(context, tokens)], 2)
    inputs = [*context, *tokens][-CONTEXT - 1 : -1]
    with torch.no_grad():
        log_probs = model(torch.tensor([inputs]))[0, -4:].log_softmax(-1)
    assert found.log_likelihood == pytest.approx(log_probs[range(4), tokens].sum().item(), abs=1e-4)


def test_a_continuation_longer_than_the_context_is_scored_in_pieces(model):
    """lm-evaluation-harness's windows for whole texts, of its get_rolling_token_windows with one token of context."""
    utils = pytest.importorskip("lm_eval.utils")
    for count in (1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 31):
        tokens = numbers(count, count)
        theirs = [
            ([*context, *scored], len(scored))
            for context, scored in map(
                utils.make_disjoint_window, utils.get_rolling_token_windows(tokens, 7, CONTEXT, context_len=1)
            )
        ]
        assert list(scoring_windows([7], tokens, CONTEXT)) == theirs
    tokens = numbers(31, 5)
    done = []
    (found,) = score_continuations(model, [Continuation([7], tokens)], 2, done.append)
    assert done == [2, 1] and count_windows([Continuation([7], tokens)], CONTEXT) == 3
    expected = 0.0
    for window, scored in scoring_windows([7], tokens, CONTEXT):
        expected += token_by_token(model, window[:-scored], window[-scored:])[0]
    assert found.log_likelihood == pytest.approx(expected, abs=1e-4)


def test_nothing_to_score(model):
    assert score_continuations(model, [], 4) == []
    assert score_continuations(model, [Continuation([1], [])], 4) == [(0.0, True)]
