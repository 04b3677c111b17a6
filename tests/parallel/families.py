"""The families of models of the presets, small enough for the tests of sharded models."""

from megaslm.config import ModelConfig, load_run_config

LENGTH = 8
SIZES = {"vocab_size": 300, "context_length": LENGTH, "num_layers": 2, "hidden_size": 16, "num_heads": 4}
# Presets of every family, on the smallest widths that 4 ranks can share. Of the 384 rows of the padded vocabulary the
# last of 4 ranks has 12 that are no padding; of 256, for 190 tokens, it has none.
FAMILIES = {
    "megaslm_125m": {"num_heads": 8, "num_kv_heads": 4, "ffn_hidden_size": 24},
    "megaslm_1.2b": {"num_kv_heads": 1, "head_dim": 8, "ffn_hidden_size": 24},
    "slm_large": {"num_kv_heads": 2, "ffn_hidden_size": 24, "vocab_size": 190},
    "slm_small": {"num_kv_heads": 4, "ffn_hidden_size": 24},
    "mvlm_gpt2": {"ffn_hidden_size": 32},
    "neox_1.2b": {"head_dim": 8, "ffn_hidden_size": 32},
    "sab_3b": {"num_kv_heads": 2, "ffn_hidden_size": 32},
    "shakespeare_char": {"ffn_hidden_size": 32},
}


def switches(preset: str) -> dict:
    """What its model is apart from its sizes, and from the width of its initial weights, which follows from those."""
    of_size = SIZES.keys() | {"num_kv_heads", "head_dim", "ffn_hidden_size", "init_std"}
    return {key: value for key, value in load_run_config(preset).model.model_dump().items() if key not in of_size}


def config_of(family: str, **sizes: int) -> ModelConfig:
    return ModelConfig(**{**switches(family), **SIZES, **FAMILIES[family], **sizes})
