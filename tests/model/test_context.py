"""Rotary scalings are those of transformers; contexts that are stretched reach further, and say so when they can't."""

import math

import pytest
import torch

from megaslm.config import ModelConfig
from megaslm.errors import UserError
from megaslm.model import LanguageModel, build_model, stretch_context, stretch_positions
from megaslm.model.rotary import RotaryTable, rotary_frequencies

SMALL = dict(vocab_size=100, context_length=64, num_layers=1, hidden_size=64, num_heads=2, ffn_hidden_size=48)
LEARNED = dict(position="learned", norm="layernorm", feed_forward="gelu")


def config(**switches) -> ModelConfig:
    return ModelConfig(**{**SMALL, **switches})


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("context, original, factor", [(64, None, 4.0), (4096, 512, 3.7), (131072, 8192, 8.0)])
@pytest.mark.parametrize("kind", ["none", "linear", "ntk", "yarn", "llama3"])
def test_angles_are_those_of_transformers_over_the_whole_context(kind, context, original, factor, fraction, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {} if kind == "none" else {"rope_scaling": kind, "rope_scaling_factor": factor}
    if kind in ("yarn", "llama3"):
        scaling["rope_original_context"] = original
    ours = config(context_length=context, rope_fraction=fraction, rope_theta=theta, **scaling)
    rope = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": ours.rope_original_context}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    elif kind == "linear":
        del rope["original_max_position_embeddings"]
    rotated = int(ours.head_dim * fraction)  # as the size of a head: how a fraction is spelled differs by version
    if kind in ("none", "ntk"):  # ntk is a larger theta, and has no other name there
        theta, rope = theta * (factor ** (rotated / (rotated - 2)) if kind == "ntk" else 1.0), None
    sizes = dict(hidden_size=2 * rotated, num_attention_heads=2, head_dim=rotated, max_position_embeddings=context)
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**sizes, rope_theta=theta, rope_scaling=rope))
    assert torch.equal(rotary_frequencies(ours), theirs.inv_freq)
    cos, sin = theirs(torch.zeros(1), torch.arange(context)[None])  # both halves of a head have the same angles
    table = RotaryTable(ours)
    torch.testing.assert_close(table.cos, cos[0, :, : rotated // 2], rtol=0, atol=1e-6)
    torch.testing.assert_close(table.sin, sin[0, :, : rotated // 2], rtol=0, atol=1e-6)
    assert theirs.attention_scaling == pytest.approx(0.1 * math.log(factor) + 1 if kind == "yarn" else 1)


@pytest.mark.parametrize("size, theta, original", [(4, 1e4, 4), (8, 10.0, 40), (128, 3.0, 8192), (64, 1e6, 1)])
def test_yarn_of_few_channels_or_turns_is_that_of_transformers(size, theta, original):
    """Where the pairs that turn 32 times and those that turn once are one, or in reverse order."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    switches = dict(rope_scaling="yarn", rope_scaling_factor=8.0, rope_original_context=original, rope_theta=theta)
    ours = config(head_dim=size, context_length=8 * original, **switches)
    rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": original}
    sizes = dict(hidden_size=2 * size, num_attention_heads=2, head_dim=size, max_position_embeddings=8 * original)
    theirs = transformers.LlamaConfig(**sizes, rope_theta=theta, rope_scaling=rope)
    assert torch.equal(rotary_frequencies(ours), ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")[0])


def test_the_original_context_follows_from_the_factor_and_is_of_yarn_and_llama3_alone():
    for kind in ("yarn", "llama3"):
        scaled = config(rope_scaling=kind, rope_scaling_factor=4.0)
        assert scaled.rope_original_context == 16
        assert ModelConfig(**scaled.model_dump()) == scaled
    assert config(rope_scaling="linear", rope_scaling_factor=4.0).rope_original_context is None
    with pytest.raises(ValueError, match="rope_original_context has no effect with rope_scaling ntk"):
        config(rope_scaling="ntk", rope_scaling_factor=4.0, rope_original_context=16)
    with pytest.raises(ValueError, match="needs a rope_theta above 1"):
        config(rope_scaling="yarn", rope_scaling_factor=4.0, rope_theta=1.0)


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn"])
def test_a_rotary_context_is_stretched_by_the_ratio_and_further_by_the_same_method(method):
    once = stretch_context(config(), 160, method)
    assert (once.context_length, once.rope_scaling, once.rope_scaling_factor) == (160, method, 2.5)
    assert once.rope_original_context == (64 if method == "yarn" else None)
    assert stretch_context(once, 320, method) == stretch_context(config(), 320, method)
    same = once.model_dump(exclude={"context_length", "rope_scaling", "rope_scaling_factor", "rope_original_context"})
    assert same == config().model_dump(include=same.keys())
    weights = LanguageModel(config()).state_dict()
    LanguageModel(once).load_state_dict(weights)  # the same parameters


def test_linear_and_interpolated_positions_lie_between_the_old_ones():
    short, long = config(), stretch_context(config(), 128, "linear")
    assert torch.equal(RotaryTable(long).cos[::2], RotaryTable(short).cos)
    short = config(**LEARNED)
    long = stretch_context(short, 127, "interpolate")
    assert long == config(**LEARNED, context_length=127)
    weight = build_model(short, 0).decoder.position_embedding.weight.detach()
    stretched = stretch_positions(weight, 127)
    assert stretched.shape == (127, 64) and torch.equal(stretched[::2], weight)
    torch.testing.assert_close(stretched[1::2], (weight[1:] + weight[:-1]) / 2)


def test_stretched_positions_keep_their_ends_and_their_type():
    weight = torch.randn(5, 3).bfloat16()
    for length in (5, 6, 17):
        stretched = stretch_positions(weight, length)
        assert stretched.dtype == torch.bfloat16 and stretched.shape == (length, 3)
        assert torch.equal(stretched[[0, -1]], weight[[0, -1]])
    assert torch.equal(stretch_positions(weight, 5), weight)
    assert torch.equal(stretch_positions(weight[:1], 3), weight[:1].expand(3, 3))


@pytest.mark.parametrize(
    "switches, length, method, says",
    [
        ({}, 64, "yarn", "not longer than the model's, which has 64"),
        ({}, 128, "interpolate", "interpolate does not stretch rotary positions, which this model has; take linear"),
        (LEARNED, 128, "yarn", "yarn does not stretch learned positions, which this model has; take interpolate"),
        ({}, 128, "longer", "no method 'longer'"),
        ({"rope_theta": 1.0}, 128, "yarn", "yarn needs a rope_theta above 1, and the model has 1; take linear or ntk"),
        ({"rope_scaling": "ntk", "rope_scaling_factor": 2.0}, 128, "yarn", "further by ntk alone"),
        ({"rope_scaling": "llama3", "rope_scaling_factor": 2.0}, 128, "yarn", "it cannot be stretched further"),
    ],
)
def test_what_does_not_fit_is_refused(switches, length, method, says):
    with pytest.raises(UserError, match=says):
        stretch_context(config(**switches), length, method)
