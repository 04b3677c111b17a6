"""The same network under other switches is transformers' llama, qwen3, gpt2 and gpt_neox: equal logits, equal loss."""

import pytest
import torch

from megaslm.config import ModelConfig
from megaslm.model import LanguageModel, initialize_parameters

transformers = pytest.importorskip("transformers")

VOCAB, CONTEXT, WIDTH, LAYERS, HEADS, FFN = 199, 32, 48, 2, 4, 80


def build(**switches) -> LanguageModel:
    config = ModelConfig(
        vocab_size=VOCAB,
        context_length=CONTEXT,
        num_layers=LAYERS,
        hidden_size=WIDTH,
        num_heads=HEADS,
        ffn_hidden_size=FFN,
        init_std=0.2,
        **switches,
    )
    model = LanguageModel(config)
    initialize_parameters(model, config, seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # norm weights of one and biases of zero would hide a mistake
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def assert_equal_logits(model: LanguageModel, other, state: dict) -> None:
    missing, unexpected = other.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_embeddings else set()
    assert set(missing) <= tied and not unexpected
    other.tie_weights()
    tokens = torch.randint(0, VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(tokens), other.eval()(tokens).logits
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def llama_state(model: LanguageModel) -> dict:
    config, weights = model.config, dict(model.state_dict())
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    state = {"model.embed_tokens.weight": weights["decoder.embedding.weight"][:VOCAB]}
    state["model.norm.weight"] = weights["decoder.norm.weight"]
    state["lm_head.weight"] = weights["head.weight"][:VOCAB]
    for i in range(LAYERS):
        ours, theirs = f"decoder.blocks.{i}.", f"model.layers.{i}."
        for name, part in zip("qkv", weights[ours + "attention.qkv.weight"].split((q, kv, kv)), strict=True):
            state[f"{theirs}self_attn.{name}_proj.weight"] = part
        gate, up = weights[ours + "feed_forward.gate_up.weight"].chunk(2)
        state[theirs + "mlp.gate_proj.weight"], state[theirs + "mlp.up_proj.weight"] = gate, up
        state[theirs + "mlp.down_proj.weight"] = weights[ours + "feed_forward.down.weight"]
        state[theirs + "self_attn.o_proj.weight"] = weights[ours + "attention.out.weight"]
        state[theirs + "input_layernorm.weight"] = weights[ours + "attention_norm.weight"]
        state[theirs + "post_attention_layernorm.weight"] = weights[ours + "feed_forward_norm.weight"]
        if config.qk_norm:
            state[theirs + "self_attn.q_norm.weight"] = weights[ours + "attention.qk_norm.q_weight"]
            state[theirs + "self_attn.k_norm.weight"] = weights[ours + "attention.qk_norm.k_weight"]
    return state


def llama_options(config: ModelConfig) -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": FFN,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


@pytest.mark.parametrize("kv_heads,tied", [(4, False), (2, True), (1, False)])
def test_llama(kv_heads, tied):
    model = build(num_kv_heads=kv_heads, tie_embeddings=tied)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_options(model.config)))
    assert_equal_logits(model, other, llama_state(model))


def test_llama_rope_scaling_linear():
    model = build(rope_scaling="linear", rope_scaling_factor=4.0)
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**llama_options(model.config), rope_parameters=rope)
    assert_equal_logits(model, transformers.LlamaForCausalLM(config), llama_state(model))


def test_qwen3_with_free_head_dim():
    model = build(num_kv_heads=2, head_dim=20, qk_norm=True)
    other = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**llama_options(model.config)))
    assert_equal_logits(model, other, llama_state(model))


def test_gpt2():
    model = build(norm="layernorm", position="learned", feed_forward="gelu_tanh", bias=True, tie_embeddings=True)
    weights = model.state_dict()
    state = {
        "transformer.wte.weight": weights["decoder.embedding.weight"][:VOCAB],
        "transformer.wpe.weight": weights["decoder.position_embedding.weight"],
    }
    names = {
        "attention_norm": "ln_1",
        "feed_forward_norm": "ln_2",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    }
    for i in range(LAYERS):
        for ours, theirs in names.items():
            weight = weights[f"decoder.blocks.{i}.{ours}.weight"]
            state[f"transformer.h.{i}.{theirs}.weight"] = weight.T if weight.dim() == 2 else weight
            state[f"transformer.h.{i}.{theirs}.bias"] = weights[f"decoder.blocks.{i}.{ours}.bias"]
    for kind in ("weight", "bias"):
        state[f"transformer.ln_f.{kind}"] = weights[f"decoder.norm.{kind}"]
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=FFN
    )
    assert_equal_logits(model, transformers.GPT2LMHeadModel(config), state)


@pytest.mark.parametrize("parallel", [True, False])
def test_gpt_neox(parallel):
    model = build(norm="layernorm", rope_fraction=0.5, feed_forward="gelu", bias=True, parallel_residual=parallel)
    weights, head_dim = model.state_dict(), model.config.head_dim
    state = {
        "gpt_neox.embed_in.weight": weights["decoder.embedding.weight"][:VOCAB],
    }
    names = {
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        "attention.qkv": "attention.query_key_value",
        "attention.out": "attention.dense",
        "feed_forward.up": "mlp.dense_h_to_4h",
        "feed_forward.down": "mlp.dense_4h_to_h",
    }
    for kind in ("weight", "bias"):
        state[f"gpt_neox.final_layer_norm.{kind}"] = weights[f"decoder.norm.{kind}"]
        for i in range(LAYERS):
            for ours, theirs in names.items():
                tensor = weights[f"decoder.blocks.{i}.{ours}.{kind}"]
                if ours == "attention.qkv":  # theirs interleaves q, k and v head by head
                    tensor = tensor.unflatten(0, (3, HEADS, head_dim)).transpose(0, 1).flatten(0, 2)
                state[f"gpt_neox.layers.{i}.{theirs}.{kind}"] = tensor
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=CONTEXT,
        rotary_pct=0.5,
        use_parallel_residual=parallel,
        hidden_act="gelu",
        tie_word_embeddings=False,
    )
    other = transformers.GPTNeoXForCausalLM(config)
    head = "lm_head" if hasattr(other, "lm_head") else "embed_out"  # renamed in transformers 5
    state[f"{head}.weight"] = weights["head.weight"][:VOCAB]
    assert_equal_logits(model, other, state)
