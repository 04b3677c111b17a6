"""Which family holds which switches, and config.json both ways."""

import contextlib
import json

import pytest
import torch

from megaslm.checkpoint.huggingface.families import (
    FAMILIES,
    dropout_of,
    family_of,
    generation_config,
    hf_config,
    model_config,
    needs_transformers_5,
)
from megaslm.config import ModelConfig, list_presets, load_run_config
from megaslm.data import ascii_tokenizer, train_bpe
from megaslm.errors import UserError

SIZES = {"vocab_size": 300, "context_length": 64, "num_layers": 2, "hidden_size": 48, "num_heads": 4}
LLAMA = {**SIZES, "ffn_hidden_size": 80}
GPT2 = {**LLAMA, "norm": "layernorm", "position": "learned", "feed_forward": "gelu_tanh", "bias": True}
NEOX = {**LLAMA, "norm": "layernorm", "feed_forward": "gelu", "bias": True, "rope_fraction": 0.5}
OF_FAMILY = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "num_heads": 5, "head_dim": 8},
    "qwen3": {**LLAMA, "qk_norm": True},
    "gpt2": GPT2,
    "gpt_neox": {**NEOX, "parallel_residual": True},
}
PRESETS = {
    "llama": {"simone_enhanced", "slm_large", "slm_medium", "slm_small"},
    "mistral": {"slm_tiny"},
    "qwen3": {"megaslm_1.2b", "megaslm_125m", "megaslm_350m", "megaslm_3b", "megaslm_760m", "quickstart"},
    "gpt2": {"mvlm_gpt2", "shakespeare_char"},
    "gpt_neox": {"neox_1.2b", "neox_1.2b_8gpu", "sab_3b", "sab_lite"},
}


def test_every_preset_has_a_family():
    found = {name: set() for name in FAMILIES}
    for preset in list_presets():
        found[family_of(load_run_config(preset).model)].add(preset)
    assert found == PRESETS


@pytest.mark.parametrize(
    "switches, named",
    [
        ({**LLAMA, "rope_fraction": 0.5}, "model.rope_fraction is 0.5, where llama has 1.0"),
        ({**LLAMA, "qk_norm": True, "bias": True}, "model.qk_norm is True, where llama has False"),
        ({**LLAMA, "parallel_residual": True}, "model.parallel_residual is True, where llama has False"),
        ({**LLAMA, "position": "learned"}, "model.position is learned, where llama has rope"),
        ({**LLAMA, "feed_forward": "gelu"}, "model.feed_forward is gelu, where llama has swiglu"),
        (
            {**LLAMA, "num_heads": 5, "head_dim": 8, "bias": True},
            "hidden_size 48 is no multiple of num_heads 5, as llama",
        ),
        ({**GPT2, "num_kv_heads": 2}, "model.num_kv_heads is 2, where gpt2 has num_heads, 4"),
        ({**GPT2, "head_dim": 16}, "model.head_dim is 16, where gpt2 has hidden_size / num_heads"),
        ({**GPT2, "parallel_residual": True}, "model.parallel_residual is True, where gpt2 has False"),
        ({**NEOX, "num_kv_heads": 1}, "model.num_kv_heads is 1, where gpt_neox has num_heads, 4"),
        ({**NEOX, "feed_forward": "swiglu"}, "model.feed_forward is swiglu, where gpt_neox has gelu or gelu_tanh"),
        ({**NEOX, "qk_norm": True}, "model.qk_norm is True, where gpt_neox has False"),
        ({**NEOX, "num_heads": 5, "head_dim": 8}, "hidden_size 48 is no multiple of num_heads 5, as gpt_neox needs"),
    ],
)
def test_a_model_that_no_family_holds_is_refused_by_its_switch(switches, named):
    with pytest.raises(UserError) as error:
        family_of(ModelConfig(**switches))
    assert named in str(error.value)


@pytest.mark.parametrize(
    "switches",
    [
        *OF_FAMILY.values(),
        {**LLAMA, "num_kv_heads": 2, "head_dim": 16, "bias": True, "tie_embeddings": True, "norm_eps": 1e-6},
        {**LLAMA, "rope_scaling": "linear", "rope_scaling_factor": 3.5},
        {**LLAMA, "rope_scaling": "yarn", "rope_scaling_factor": 4.0, "rope_original_context": 20},
        {**LLAMA, "rope_scaling": "llama3", "rope_scaling_factor": 8.0, "rope_theta": 500000.0},
        {**GPT2, "feed_forward": "gelu", "tie_embeddings": True},
        {**NEOX, "bias": False, "tie_embeddings": True, "feed_forward": "gelu_tanh", "rope_theta": 20000.0},
        {**NEOX, "rope_scaling": "yarn", "rope_scaling_factor": 4.0},
    ],
)
def test_switches_come_back_from_config_json(switches):
    config = ModelConfig(**switches)
    content = json.loads(json.dumps(hf_config(config, "bf16", None)))
    assert model_config(content, "config.json") == config
    assert (content["model_type"], content["dtype"], content["torch_dtype"]) == (family_of(config), *["bfloat16"] * 2)


def test_ntk_is_a_larger_theta_and_missing_biases_of_gpt2_are_there():
    ntk = model_config(hf_config(ModelConfig(**LLAMA, rope_scaling="ntk", rope_scaling_factor=2.0), "fp32", None), "")
    assert (ntk.rope_scaling, ntk.rope_theta) == ("none", pytest.approx(10000 * 2 ** (12 / 10)))
    assert model_config(hf_config(ModelConfig(**{**GPT2, "bias": False}), "fp32", None), "").bias


def test_special_tokens_are_the_tokenizers_and_explicitly_none_without():
    tokenizer = train_bpe(["some text"], 300)
    ids = [hf_config(ModelConfig(**LLAMA), "fp32", t) for t in (tokenizer, ascii_tokenizer(), None)]
    ids = [[content[f"{name}_token_id"] for name in ("bos", "eos", "pad")] for content in ids]
    assert ids == [[tokenizer.eod_id, tokenizer.eod_id, None], [None, None, ascii_tokenizer().pad_id], [None] * 3]


# Of the hub: what is read in each, and spellings of their time.
LLAMA_3_1 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
    "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip
GPT2_HUB = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1,
    "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
    "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_type": "cls_index", "vocab_size": 50257,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


def test_models_of_the_hub_are_understood():
    llama, pythia = model_config(LLAMA_3_1, ""), model_config(PYTHIA, "")
    gpt2, qwen3 = model_config(GPT2_HUB, ""), model_config(QWEN3, "")
    assert (llama.rope_scaling, llama.rope_scaling_factor, llama.rope_original_context) == ("llama3", 8.0, 8192)
    assert (llama.rope_theta, llama.num_kv_heads, llama.head_dim, llama.bias) == (500000.0, 8, 128, False)
    assert (pythia.rope_fraction, pythia.rope_theta, pythia.parallel_residual, pythia.bias) == (
        0.25,
        10000.0,
        True,
        True,
    )
    assert (gpt2.ffn_hidden_size, gpt2.feed_forward, gpt2.tie_embeddings, gpt2.bias) == (3072, "gelu_tanh", True, True)
    assert (qwen3.qk_norm, qwen3.head_dim, qwen3.rope_theta, qwen3.norm_eps) == (True, 128, 1e6, 1e-6)
    assert dropout_of(GPT2_HUB) == {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    assert dropout_of(LLAMA_3_1) == {}


def without_gaps(content):
    """Without the keys whose value is `...`, within objects too."""
    kept = {key: value for key, value in content.items() if value is not ...}
    return {key: without_gaps(value) if isinstance(value, dict) else value for key, value in kept.items()}


def yarn(**values):
    return {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **values}}


@pytest.mark.parametrize(
    "base, change, named",
    [
        (LLAMA_3_1, {"model_type": "gemma2"}, "model_type is 'gemma2'"),
        (LLAMA_3_1, {"architectures": ["LlamaForSequenceClassification"]}, "architectures is ['LlamaForSequence"),
        (LLAMA_3_1, {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}}, "auto_map names code"),
        (
            LLAMA_3_1,
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config is {'quant_method': 'gptq'}",
        ),
        (LLAMA_3_1, {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        (LLAMA_3_1, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LLAMA_3_1, {"attention_bias": True}, "attention_bias is True and mlp_bias is False"),
        (LLAMA_3_1, {"mlp_bias": True}, "attention_bias is False and mlp_bias is True"),
        (LLAMA_3_1, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (LLAMA_3_1, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        (LLAMA_3_1, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        (LLAMA_3_1, {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'"),
        (LLAMA_3_1, {"rope_scaling": {"rope_type": "linear"}}, "its factor is None"),
        (LLAMA_3_1, yarn(beta_fast=16), "beta_fast of rope_type 'yarn' is 16"),
        (LLAMA_3_1, yarn(beta_slow=2.0), "beta_slow of rope_type 'yarn' is 2.0"),
        (LLAMA_3_1, yarn(attention_factor=1.0), "attention_factor of rope_type 'yarn' is 1.0"),
        (LLAMA_3_1, yarn(truncate=False), "truncate of rope_type 'yarn' is False"),
        (LLAMA_3_1, yarn(mscale=0.7), "mscale of rope_type 'yarn' is 0.7"),
        (LLAMA_3_1, {"rope_scaling": {**LLAMA_3_1["rope_scaling"], "low_freq_factor": 2.0}}, "low_freq_factor of rope"),
        (LLAMA_3_1, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "rope_theta is given twice"),
        (
            LLAMA_3_1,
            {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "layer to layer",
        ),
        (LLAMA_3_1, {"num_key_value_heads": 5}, "num_heads 32 is not a multiple of num_kv_heads 5"),
        (LLAMA_3_1, {"hidden_size": "4096"}, "hidden_size is '4096': "),
        (LLAMA_3_1, {"rope_theta": 0}, "rope_theta is 0.0: "),
        (LLAMA_3_1, {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5: "),
        (LLAMA_3_1, {"tie_word_embeddings": None}, "tie_word_embeddings is None: "),
        (LLAMA_3_1, {"num_attention_heads": 24, "head_dim": 128}, "with model_type mistral, architectures left out"),
        (
            LLAMA_3_1,
            {"rope_scaling": {**LLAMA_3_1["rope_scaling"], "low_freq_factor": ...}},
            "low_freq_factor of rope_type 'llama3' is None",
        ),
        (LLAMA_3_1, {"hidden_size": ...}, "hidden_size is missing"),
        (LLAMA_3_1, {"model_type": "mistral", "architectures": None}, "sliding_window is 4096, shorter than"),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 4096}, "sliding_window is 4096, shorter than"),
        (QWEN3, {"attention_bias": True}, "attention_bias is True"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 28}, "layer_types is"),
        (GPT2_HUB, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        (GPT2_HUB, {"scale_attn_weights": False}, "scale_attn_weights is False"),
        (GPT2_HUB, {"add_cross_attention": True}, "add_cross_attention is True"),
        (GPT2_HUB, {"activation_function": "silu"}, "activation_function is 'silu'"),
        (PYTHIA, {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        (PYTHIA, {"rotary_pct": 0.3}, "must be an even number of channels"),
    ],
)
def test_what_our_network_cannot_hold_is_refused_by_its_key(base, change, named):
    content = without_gaps({**base, **change})
    with pytest.raises(UserError) as error:
        model_config(content, "DIR/config.json")
    assert str(error.value).startswith("DIR/config.json: ") and named in str(error.value)


@pytest.mark.parametrize(
    "base, change, expected",
    [
        (LLAMA_3_1, {"model_type": "mistral", "architectures": None, "sliding_window": None}, {"bias": False}),
        (LLAMA_3_1, {"model_type": "mistral", "architectures": None, "sliding_window": 131072}, {"bias": False}),
        (QWEN3, {"use_sliding_window": False, "sliding_window": 4096}, {"qk_norm": True}),
        (LLAMA_3_1, {"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": "linear"}),
        (LLAMA_3_1, yarn(), {"rope_scaling": "yarn", "rope_original_context": 131072}),
        (LLAMA_3_1, {"num_key_value_heads": None}, {"num_kv_heads": 32}),
        (PYTHIA, {"hidden_act": "gelu_fast"}, {"feed_forward": "gelu_tanh"}),
        (PYTHIA, {"hidden_act": "gelu_pytorch_tanh"}, {"feed_forward": "gelu_tanh"}),
        (PYTHIA, {"rotary_pct": ...}, {"rope_fraction": 0.25}),
        (LLAMA_3_1, {**yarn(), "original_max_position_embeddings": 4096}, {"rope_original_context": 4096}),
        (
            LLAMA_3_1,
            {
                "model_type": "mistral",
                "architectures": None,
                "sliding_window": None,
                "num_attention_heads": 24,
                "head_dim": 128,
            },
            {"num_heads": 24},
        ),
    ],
)
def test_what_it_can_hold_is_not(base, change, expected):
    content = without_gaps({**base, **change})
    found = model_config(content, "config.json")
    assert {key: getattr(found, key) for key in expected} == expected


V5 = {"rope_theta": ..., "rope_scaling": ..., "rotary_emb_base": ..., "rotary_pct": ...}
THETA = {"rope_theta": 500000.0}


@pytest.mark.parametrize(
    "base, change, needed",
    [
        (LLAMA_3_1, {}, False),
        (LLAMA_3_1, {"rope_parameters": {**LLAMA_3_1["rope_scaling"], **THETA}}, False),
        (LLAMA_3_1, {"rope_scaling": {**LLAMA_3_1["rope_scaling"], **THETA}}, False),
        (LLAMA_3_1, {**V5, "rope_parameters": {**LLAMA_3_1["rope_scaling"], **THETA}}, True),
        (LLAMA_3_1, {**V5, "rope_parameters": {"rope_type": "default", **THETA}}, True),
        (LLAMA_3_1, {**V5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, False),
        (LLAMA_3_1, {**V5, "rope_scaling": {**LLAMA_3_1["rope_scaling"], **THETA}}, True),
        (LLAMA_3_1, {**yarn(), "original_max_position_embeddings": 4096}, True),
        (PYTHIA, {}, False),
        (PYTHIA, {**V5, "rope_parameters": {"rope_theta": 10000, "partial_rotary_factor": 0.5}}, True),
        (GPT2_HUB, {}, False),
    ],
)
def test_what_transformers_4_would_pass_over_is_seen(base, change, needed):
    assert needs_transformers_5(without_gaps({**base, **change}), "config.json") == needed


def test_nonsense_in_any_key_is_a_users_error():
    nonsense = ["x", [], ["x"], {}, {"rope_theta": "x"}, {"rope_type": ["x"]}, {"rope_type": "yarn", "factor": True}]
    nonsense += [{"rope_type": "llama3", "factor": 2, "low_freq_factor": []}, -1, 0, 1.5, True, None]
    keys = ("rope_parameters", "rope_scaling", "layer_types", "auto_map", "sliding_window", "use_sliding_window")
    mistral = {**LLAMA_3_1, "model_type": "mistral", "architectures": None}
    for base in (LLAMA_3_1, mistral, QWEN3, PYTHIA, GPT2_HUB, {**LLAMA_3_1, **yarn()}):
        for key in (*base, *keys):
            for value in nonsense:
                with contextlib.suppress(UserError):
                    model_config({**base, key: value}, "config.json")


def test_the_facts_of_an_imported_model_go_before_ours():
    tokenizer = train_bpe(["some text"], 300)
    origin = {"family": "mistral", "special_tokens": {"eos_token_id": [5, 6]}, "generation_config": {"top_p": 0.9}}
    content = hf_config(ModelConfig(**LLAMA), "fp32", tokenizer, origin)
    assert (content["model_type"], content["sliding_window"]) == ("mistral", None)
    assert (content["bos_token_id"], content["eos_token_id"]) == (tokenizer.bos_id, [5, 6])
    assert generation_config(tokenizer, origin) == {"top_p": 0.9}
    assert generation_config(tokenizer)["eos_token_id"] == tokenizer.eod_id
    # Continued with another switch, it may no longer be what it was.
    assert hf_config(ModelConfig(**LLAMA, bias=True), "fp32", None, origin)["model_type"] == "llama"


def test_defaults_are_those_of_transformers():
    import transformers

    for name, family in FAMILIES.items():
        theirs = transformers.AutoConfig.for_model(name, hidden_size=256, num_attention_heads=4).to_dict()
        theirs |= {"num_key_value_heads": None} if name == "llama" else {}  # filled in from the heads
        given = {key: value for key, value in family.defaults.items() if key not in ("head_dim", "sliding_window")}
        assert {key: theirs[key] for key in given} == given, name
        assert set(family.keys.values()) | set(family.fixed) | set(family.dropouts) <= theirs.keys(), name
        assert family.architecture in dir(transformers)


def test_transformers_reads_every_key_alike():
    """Both spellings of the rotary settings lead its classes to the same frequencies as ours."""
    import transformers

    config = ModelConfig(**LLAMA, rope_scaling="llama3", rope_scaling_factor=4.0, rope_theta=20000.0)
    content = hf_config(config, "fp32", None)
    old = {key: value for key, value in content.items() if key not in ("rope_parameters", "dtype")}
    new = {key: value for key, value in content.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    found = []
    for one in (old, new) if hasattr(transformers.LlamaConfig(), "rope_parameters") else (old,):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**one))
        found.append(model.model.rotary_emb.inv_freq)
    assert all(torch.equal(found[0], other) for other in found)
    assert model_config(old, "") == model_config(new, "") == config
