"""Every preset is a complete run of the shape its issue or paper states, with the parameter count by formula."""

import pytest

from megaslm.config import ModelConfig, list_presets, load_run_config, resolve_batch

# Parameters in millions with the padded vocabulary, computed by hand from the shapes.
PARAMETERS_M = {
    "quickstart": 4.001,
    "slm_tiny": 10.39,
    "slm_small": 46.80,
    "slm_medium": 153.0,
    "slm_large": 430.4,
    "neox_1.2b": 1414.6,
    "neox_1.2b_8gpu": 1414.6,
    "mvlm_gpt2": 354.9,
    "simone_enhanced": 336.1,
    "sab_lite": 42.62,
    "sab_3b": 7249.4,
    "megaslm_125m": 128.3,
    "megaslm_350m": 340.9,
    "megaslm_760m": 766.2,
    "megaslm_1.2b": 1198.0,
    "megaslm_3b": 2926.3,
}


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """Written out from the architecture, on purpose not with megaslm.model's own count."""
    width, ffn, head = model.hidden_size, model.ffn_hidden_size, model.head_dim
    query, key_value = model.num_heads * head, model.num_kv_heads * head
    norm = width * (2 if model.norm == "layernorm" and model.bias else 1)
    attention = width * (query + 2 * key_value) + query * width
    attention += (query + 2 * key_value + width) if model.bias else 0
    attention += 2 * head if model.qk_norm else 0
    feed_forward = width * ffn * (3 if model.feed_forward == "swiglu" else 2)
    feed_forward += (ffn + width) if model.bias else 0
    padded = -(-vocab_size // 128) * 128
    embeddings = padded * width * (1 if model.tie_embeddings else 2)
    embeddings += model.context_length * width if model.position == "learned" else 0
    return embeddings + model.num_layers * (attention + feed_forward + 2 * norm) + norm


@pytest.mark.parametrize("name", sorted(list_presets()))
def test_preset_is_a_complete_run(name):
    config = load_run_config(name)
    assert config.name == name
    assert 20 < len(config.description) < 160
    assert bool(config.data.input) == (name == "quickstart")
    assert not config.data.train
    assert config.model.vocab_size is None  # the tokenizer's
    batch = resolve_batch(config.train.global_batch_size, config.train.micro_batch_size, 1)
    assert batch.micro_batch_size == config.train.micro_batch_size
    assert config.schedule.warmup_steps < (config.train.max_steps or 10**9)


@pytest.mark.parametrize("name", sorted(PARAMETERS_M))
def test_parameter_count(name):
    config = load_run_config(name)
    assert parameters(config.model, config.expected_vocab_size) / 1e6 == pytest.approx(PARAMETERS_M[name], rel=1e-3)


def test_shakespeare_char_has_nanogpts_parameters():
    config = load_run_config("shakespeare_char")
    assert config.expected_vocab_size is None
    # nanoGPT prints 0.80M with 65 symbols and without the positions; ours is padded to 128 symbols.
    without_padding = parameters(config.model, 128) - (128 - 65) * 128 - 64 * 128
    assert without_padding == pytest.approx(0.80e6, rel=0.01)


@pytest.mark.parametrize(
    "name, layers, width, heads, kv, ffn, context, steps, tied",
    [
        ("slm_tiny", 6, 256, 6, 2, 1024, 1024, 20_000, True),
        ("slm_small", 8, 512, 8, 2, 2048, 2048, 100_000, True),
        ("slm_medium", 12, 768, 12, 4, 3072, 2048, 200_000, False),
        ("slm_large", 24, 1024, 16, 4, 4096, 4096, 500_000, False),
    ],
)
def test_slm_line(name, layers, width, heads, kv, ffn, context, steps, tied):
    config = load_run_config(name)
    model, optimizer = config.model, config.optimizer
    assert (model.num_layers, model.hidden_size, model.num_heads, model.num_kv_heads) == (layers, width, heads, kv)
    assert (model.ffn_hidden_size, model.context_length, model.tie_embeddings) == (ffn, context, tied)
    assert model.head_dim == 64
    assert (model.norm, model.position, model.feed_forward) == ("rmsnorm", "rope", "swiglu")
    assert config.train.max_steps == steps
    assert (config.train.global_batch_size, config.train.micro_batch_size) == (32, 8)
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (3e-4, (0.9, 0.95), 0.1)
    assert optimizer.gradient_clipping == 1
    assert (config.schedule.type, config.schedule.warmup_steps, config.schedule.min_lr_ratio) == ("cosine", 2000, 0.1)
    assert (config.logging.interval, config.eval.interval, config.checkpoint.interval) == (100, 5000, 5000)
    assert (config.checkpoint.keep_last, config.checkpoint.keep_best) == (5, True)


def test_quickstart_divides_among_the_gpus_of_a_node():
    config = load_run_config("quickstart")
    for ranks in (1, 2, 4, 8):
        resolve_batch(config.train.global_batch_size, config.train.micro_batch_size, ranks)


@pytest.mark.parametrize("size", ["125m", "350m", "760m", "1.2b", "3b"])
def test_megaslm_line_trains_on_about_20_tokens_a_parameter(size):
    config = load_run_config(f"megaslm_{size}")
    assert config.train.max_tokens / parameters(config.model, 50304) == pytest.approx(20, rel=0.06)
    assert 0.5e6 <= config.tokens_per_step <= 2.1e6
    assert config.schedule.warmup_steps * config.tokens_per_step < 0.15 * config.train.max_tokens
