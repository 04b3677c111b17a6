"""The network by itself: loss, causality, sizes, initial weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from megaslm.config import ModelConfig, list_presets, load_run_config
from megaslm.model import (
    LanguageModel,
    build_model,
    count_parameters,
    flops_per_token,
    initial_value,
    initialize_parameters,
)

SMALL = dict(vocab_size=100, context_length=16, num_layers=2, hidden_size=32, num_heads=4, ffn_hidden_size=48)

VARIANTS = {
    "llama": dict(num_kv_heads=2),
    "qwen3": dict(num_kv_heads=1, qk_norm=True, head_dim=12),
    "gpt2": dict(norm="layernorm", position="learned", feed_forward="gelu_tanh", bias=True, tie_embeddings=True),
    "gpt2_without_bias": dict(norm="layernorm", position="learned", feed_forward="gelu", tie_embeddings=True),
    "neox": dict(norm="layernorm", rope_fraction=0.5, feed_forward="gelu", bias=True, parallel_residual=True),
    "biased_swiglu": dict(bias=True),
}


def build(seed=0, **switches):
    config = ModelConfig(**{**SMALL, **switches})
    model = LanguageModel(config)
    initialize_parameters(model, config, seed)
    return model


def batch(rows=3, seed=0):
    tokens = torch.randint(0, 100, (rows, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:].clone()


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_formula_equals_the_built_model(name):
    model = build(**VARIANTS[name])
    rows = model.config.padded_vocab_size - model.config.vocab_size
    padding = rows * model.config.hidden_size * (1 if model.config.tie_embeddings else 2)
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters()) - padding


def test_presets_have_the_sizes_they_are_documented_with():
    def count(name, vocab):
        config = load_run_config(name, []).model
        return count_parameters(config.model_copy(update={"vocab_size": config.vocab_size or vocab}))

    assert count("slm_large", 32000) == pytest.approx(430e6, rel=0.01)
    assert count("neox_1.2b", 50257) == pytest.approx(1.41e9, rel=0.01)
    assert count("sab_3b", 96) == pytest.approx(7.2e9, rel=0.01)
    assert all(count(name, 50304) > 0 for name in list_presets())


def test_flops_per_token_of_a_known_shape():
    config = ModelConfig(**{**SMALL, "num_kv_heads": 2})
    matmul = 2 * (32 * 8 * (4 + 2 * 2 + 4) + 3 * 32 * 48) + 100 * 32
    assert flops_per_token(config, 16) == 6 * matmul + 12 * 2 * 4 * 8 * 16
    assert flops_per_token(config, 16, causal=True) == 6 * matmul + 6 * 2 * 4 * 8 * 16


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_is_the_sum_of_cross_entropies_of_the_logits(name):
    model = build(**VARIANTS[name])
    tokens, targets = batch()
    targets[0, :5] = -100
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    objective, loss = model(tokens, targets)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(objective, loss)


def test_initial_loss_is_about_ln_vocabulary():
    tokens, targets = batch(rows=32)
    _, loss = build(init_std=0.02)(tokens, targets)
    assert loss.item() / targets.numel() == pytest.approx(math.log(100), rel=0.02)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_later_token_changes_no_earlier_logit(name):
    model = build(**VARIANTS[name])
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 100
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


# Of three rows: lengths of the documents that share them, the last one cut by the end of the row.
DOCUMENTS = ((5, 4, 7), (16,), (1, 1, 14))


def positions_of(rows=DOCUMENTS):
    return torch.stack([torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]) for lengths in rows])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_token_changes_no_logit_of_another_document(name):
    model, (tokens, _) = build(**VARIANTS[name]), batch()
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 100  # in the second document of the first row
    with torch.no_grad():
        before, after = (model(ids, positions_BS=positions_of()) for ids in (tokens, changed))
    different = (before != after).any(-1)
    assert different[0, 6:9].all() and different.sum() == 3
    # Without positions it does, which shows that the test sees it.
    with torch.no_grad():
        assert (model(tokens) != model(changed)).any(-1)[0, 9:].all()


@pytest.mark.parametrize("name", VARIANTS)
def test_documents_that_share_a_row_are_computed_as_each_by_itself(name):
    """Logits and, of the summed loss, gradients; recomputed blocks too."""
    tokens, targets = batch()
    targets[0, 3] = -100
    alone, shared = build(**VARIANTS[name]), build(**VARIANTS[name])
    shared.decoder.activation_checkpointing = True
    logits = []
    for row, lengths in enumerate(DOCUMENTS):
        start = 0
        for length in lengths:
            document = (slice(row, row + 1), slice(start, start + length))
            logits.append(alone(tokens[document])[0])
            alone(tokens[document], targets[document])[0].backward()
            start += length
    found = shared(tokens, positions_BS=positions_of())
    torch.testing.assert_close(found.flatten(0, 1), torch.cat(logits), rtol=1e-5, atol=1e-5)
    shared(tokens, targets, positions_of(), 7)[0].backward()
    for (parameter_name, one), other in zip(alone.named_parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5, msg=parameter_name)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_document_a_row_is_the_plain_model(name):
    model, (tokens, _) = build(**VARIANTS[name]), batch()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, positions_BS=positions_of(((16,),) * 3)), model(tokens))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient_and_padding_gets_none(name):
    model = build(**VARIANTS[name], init_std=0.1)
    model(*batch())[0].backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
    assert model.head.weight.grad[100:].abs().sum() == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_activation_checkpointing_changes_no_gradient(name):
    gradients = []
    for checkpointing in (False, True):
        model = build(**VARIANTS[name])
        model.decoder.activation_checkpointing = checkpointing
        model(*batch())[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_initial_weights_depend_on_seed_and_name_alone():
    shallow, deep = build(num_layers=2), build(num_layers=3)
    name = "decoder.blocks.1.attention.qkv.weight"
    assert torch.equal(shallow.get_parameter(name), deep.get_parameter(name))
    assert not torch.equal(shallow.get_parameter(name), build(seed=1).get_parameter(name))
    assert torch.equal(shallow.get_parameter(name), initial_value(name, (96, 32), shallow.config, seed=0))


def test_scale_of_the_initial_weights_follows_the_width():
    model = build(hidden_size=256, num_heads=4, ffn_hidden_size=512)
    block, std = model.decoder.blocks[0], math.sqrt(2 / (5 * 256))
    assert block.attention.qkv.weight.std().item() == pytest.approx(std, rel=0.02)
    assert model.decoder.embedding.weight.std().item() == pytest.approx(std, rel=0.02)
    # The projections into the residual stream start smaller, by sqrt(2 layers).
    assert block.attention.out.weight.std().item() == pytest.approx(std / 2, rel=0.02)
    assert block.feed_forward.down.weight.std().item() == pytest.approx(std / 2, rel=0.02)
    assert build(init_std=0.01).decoder.embedding.weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_built_without_its_first_copy_is_the_same(name):
    plain = build(seed=5, **VARIANTS[name])
    built = build_model(plain.config, seed=5)
    assert (built.head.weight is built.decoder.embedding.weight) == plain.config.tie_embeddings
    for (ours, a), (theirs, b) in zip(built.named_parameters(), plain.named_parameters(), strict=True):
        assert ours == theirs and torch.equal(a, b)
    tokens, _ = batch()
    assert torch.equal(built(tokens), plain(tokens))


def test_the_rotary_tables_stay_in_fp32_when_the_model_changes_its_type():
    model = build()
    before = model.decoder.rotary_table.cos.clone()
    model.bfloat16()
    assert model.head.weight.dtype == torch.bfloat16
    assert torch.equal(model.decoder.rotary_table.cos, before) and before.dtype == torch.float32
