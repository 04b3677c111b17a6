"""Models of transformers with weights that hide no mistake: no ones, no zeros, logits of a size that matters."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from hub_models import CONFIGS, write_hub_model  # noqa: E402

VOCAB, CONTEXT = 300, 64
SIZES = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "num_hidden_layers": 2, "hidden_size": 64}
SIZES |= {"num_attention_heads": 4, "intermediate_size": 80}
GPT2_SIZES = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_layer": 2, "n_embd": 64, "n_head": 4, "n_inner": 80}


@torch.no_grad()
def scramble(network: nn.Module, seed: int = 0) -> nn.Module:
    """Norm weights around one, biases around zero, matrices so that logits are about 10."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.copy_(0.5 * noise + (0.0 if name.endswith("bias") else 1.0))
        else:
            parameter.copy_(noise * (0.2 if "block" in name or "layer" in name or ".h." in name else 1.0))
    return network.eval()


@pytest.fixture(scope="session", name="scramble")
def _scramble() -> Callable[..., nn.Module]:
    return scramble


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory) -> Callable[..., Path]:
    """hf_folder(family, dtype, max_shard_size=..., key of config.json=value) -> a folder that transformers wrote."""
    import transformers

    def make(family: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **keys) -> Path:
        sizes = GPT2_SIZES if family == "gpt2" else SIZES
        config = transformers.AutoConfig.for_model(family, **{**sizes, **keys})
        network = scramble(transformers.AutoModelForCausalLM.from_config(config)).to(dtype)
        network.tie_weights()
        folder = tmp_path_factory.mktemp(family)
        network.save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory) -> Callable[[str], Path]:
    """hub_folder(name) -> a folder as the hub has that of CONFIGS[name]."""
    import transformers

    def make(name: str) -> Path:
        config = transformers.AutoConfig.for_model(**{k: v for k, v in CONFIGS[name].items() if k != "torch_dtype"})
        network = scramble(transformers.AutoModelForCausalLM.from_config(config))
        return write_hub_model(name, tmp_path_factory.mktemp("hub") / name, network)

    return make


@pytest.fixture(scope="session")
def edit_json() -> Callable[..., None]:
    """edit_json(path, key=value, ...): change keys of a JSON file."""

    def edit(path: Path, **keys) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return edit
