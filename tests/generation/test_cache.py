"""The network with a cache is the network without one."""

import sys
from pathlib import Path

import pytest
import torch

from megaslm.generation import KeyValueCache

sys.path.insert(0, str(Path(__file__).parent))

from networks import CONTEXT, FAMILIES, VOCAB, network, prompts  # noqa: E402

CHUNKS = {"at once": (24,), "in chunks": (1, 9, 14), "prompt and tokens": (20, 1, 1, 1, 1)}


@torch.no_grad()
def with_cache(model, tokens, chunks, padding=None, capacity=CONTEXT):
    cache = KeyValueCache(model.config, capacity, padding)
    return torch.cat([model(part, cache=cache) for part in tokens.split(chunks, dim=1)], dim=1), cache


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_with_a_cache_gives_the_logits_of_one_without(family, chunks):
    model, tokens = network(family, init_std=0.15), torch.tensor(prompts(24, 24, 24))
    with torch.no_grad():
        expected = model(tokens)
    torch.testing.assert_close(with_cache(model, tokens, chunks)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_are_computed_as_each_by_itself(family, chunks):
    model, rows, padding = network(family, init_std=0.15), prompts(24, 11, 19), torch.tensor([0, 13, 5])
    tokens = torch.tensor([[7] * int(pad) + row for row, pad in zip(rows, padding, strict=True)])
    found, _ = with_cache(model, tokens, chunks, padding)
    with torch.no_grad():
        for row, pad, logits in zip(rows, padding, found, strict=True):
            torch.testing.assert_close(logits[pad:], model(torch.tensor([row]))[0], atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()  # those of the padding too: a NaN would spread


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_no_token_is_without_a_key_that_it_sees(chunks):
    """Padding neither: a softmax over nothing is NaN in some backends, though not in the one of a CPU."""
    cache = KeyValueCache(network("llama").config, CONTEXT, torch.tensor([0, 13, 5]))
    for length in chunks:
        cache.extend(length)
        mask = cache.mask(torch.zeros(1))
        assert (mask == 0).any(-1).all() and mask.shape == (3, 1, length, cache.length)


def test_a_cache_holds_each_key_head_once_and_is_never_allocated_again():
    model, tokens = network("qwen3"), torch.tensor(prompts(8, 8))
    cache = KeyValueCache(model.config, 40)
    with torch.no_grad():
        model(tokens[:, :5], cache=cache)
        before = [layer.keys.data_ptr() for layer in cache.layers]
        assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (2, 1, 40, 20)
        model(tokens[:, 5:], cache=cache)
    assert cache.length == 8 and [layer.keys.data_ptr() for layer in cache.layers] == before


def test_without_padding_tokens_have_no_mask_but_a_chunk_that_is_not_the_first():
    """One would cost a pass over the scores, and a prompt its flash attention."""
    for padding in (None, torch.tensor([0, 0])):
        cache = KeyValueCache(network("llama").config, CONTEXT, padding)
        assert cache.extend(8) == (0, None) and cache.is_plain
        assert cache.extend(1) == (8, None) and not cache.is_plain and cache.mask(torch.zeros(1)) is None
        # Once for all rows and heads: at a context of 100,000 tokens it has 51 million numbers.
        assert cache.extend(4) == (9, None) and cache.mask(torch.zeros(1)).shape == (1, 1, 4, 13)


def test_a_cache_for_more_tokens_than_the_context_is_a_fault():
    config = network("llama").config
    KeyValueCache(config, CONTEXT + 5, torch.tensor([0, 5]))  # the row of which only padding is out of reach
    for padding in (None, torch.tensor([0, 4])):
        with pytest.raises(AssertionError, match=f"does not fit in the model's context of {CONTEXT}"):
            KeyValueCache(config, CONTEXT + 5, padding)


def test_more_tokens_than_a_cache_has_room_for_are_a_fault():
    model, tokens = network("llama"), torch.tensor(prompts(8))
    with pytest.raises(AssertionError, match="do not fit"):
        with_cache(model, tokens, (8,), capacity=7)


def test_half_precision_keeps_the_type():
    model, tokens = network("llama").bfloat16(), torch.tensor(prompts(12, 12)) % VOCAB
    logits, cache = with_cache(model, tokens, (8, 4), torch.tensor([0, 3]))
    assert logits.dtype == cache.layers[0].keys.dtype == torch.bfloat16 and logits.isfinite().all()
