"""Penalties, filters and the draw: those of transformers, on random logits."""

import pytest
import torch

from megaslm.generation.processors import RepeatedNgrams, draw, keep_top_k, keep_top_p, penalize_repetition

transformers = pytest.importorskip("transformers")
B, V = 5, 300


@pytest.fixture
def logits() -> torch.Tensor:
    return 4 * torch.randn(B, V, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tokens() -> torch.Tensor:
    """Texts that repeat themselves: few tokens."""
    return torch.randint(6, (B, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_repetition_penalty(logits, tokens, penalty):
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone())
    seen = torch.zeros(B, V, dtype=torch.bool).scatter_(1, tokens, True)
    assert torch.equal(penalize_repetition(logits, seen, penalty), expected) and not torch.equal(logits, expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [0, 1, 2, 40])
def test_no_repeat_ngrams(logits, tokens, size, length):
    tokens = tokens[:, :length]
    expected = transformers.NoRepeatNGramLogitsProcessor(size)(tokens, logits.clone())
    ngrams = RepeatedNgrams(size, tokens[:, : length // 2].tolist())
    for row, text in enumerate(tokens[:, length // 2 :].tolist()):
        for token in text:
            ngrams.append(row, token)
    assert torch.equal(ngrams.ban(logits), expected)
    assert length < 40 or size == 4 or not torch.equal(expected, logits)


def test_where_no_repeat_ngrams_would_leave_no_token_all_are_left(logits):
    every = list(range(V))
    found = RepeatedNgrams(1, [every, every[1:], *[[]] * (B - 2)]).ban(logits)
    assert torch.equal(found[0], logits[0]) and torch.equal(found[2:], logits[2:])
    assert found[1, 0] == logits[1, 0] and (found[1, 1:] == -torch.inf).all()


@pytest.mark.parametrize("k", [1, 7, V - 1, V, V + 5])
def test_top_k(logits, k):
    logits[2, :20] = logits[2].max() + 1  # ties with the k-th stay
    expected = transformers.TopKLogitsWarper(k)(None, logits.clone())
    assert torch.equal(keep_top_k(logits, k), expected)


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("k", [V, 20])
def test_top_p(logits, p, k):
    logits = keep_top_k(logits, k)
    expected = transformers.TopPLogitsWarper(p)(None, logits.clone())
    found = keep_top_p(logits, p)
    assert torch.equal(found, expected) and (found > -torch.inf).any(1).all()


def test_a_draw_comes_as_often_as_its_probability(logits):
    logits = keep_top_k(logits[:1] / 2, 12)
    drawn = draw(logits.expand(20_000, V), torch.rand(20_000, dtype=torch.float64))
    shares = drawn.bincount(minlength=V) / 20_000
    assert (shares - logits[0].softmax(0)).abs().sum() < 0.05


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_interval_draw_tokens_that_can_be_drawn(uniform):
    logits = torch.full((1, V), -torch.inf)
    logits[0, [3, 250]] = torch.tensor([0.1, -0.2])
    assert draw(logits, torch.tensor([uniform], dtype=torch.float64)).item() == (3 if uniform == 0 else 250)
