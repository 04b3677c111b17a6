"""Every key of an export's config.json, changed, is found: most of them no logits of one text would show."""

import json
import math
from dataclasses import replace

import pytest

from megaslm.checkpoint import ExportDiffers, Piece, export_checkpoint, open_model, write_checkpoint
from megaslm.checkpoint.huggingface import export as export_module
from megaslm.checkpoint.huggingface.configuration import configuration_faults
from megaslm.config import ModelConfig
from megaslm.data import train_bpe
from megaslm.model import build_model

pytest.importorskip("transformers")

GPT2 = {"norm": "layernorm", "position": "learned", "feed_forward": "gelu_tanh"}
NEOX = {"norm": "layernorm", "rope_fraction": 0.5, "feed_forward": "gelu", "bias": True}
MODELS = {
    "llama, yarn": {"rope_scaling": "yarn", "rope_scaling_factor": 4.0},
    "llama, ntk": {"rope_scaling": "ntk", "rope_scaling_factor": 4.0, "tie_embeddings": True},
    "mistral": {"num_heads": 5, "head_dim": 16, "rope_scaling": "linear", "rope_scaling_factor": 2.0},
    "qwen3": {"qk_norm": True, "rope_scaling": "llama3", "rope_scaling_factor": 4.0},
    "gpt2": {**GPT2, "bias": True},
    "gpt2, no biases": GPT2,
    "gpt_neox": {**NEOX, "parallel_residual": True},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the quick brown fox jumps over the lazy dog\n"] * 4, vocab_size=280)


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tokenizer, tmp_path_factory):
    """The source and the folder of an export."""
    sizes = {"context_length": 64, "num_layers": 2, "hidden_size": 48, "num_heads": 4, "ffn_hidden_size": 80}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **{**sizes, **MODELS[request.param]})
    folder = tmp_path_factory.mktemp("model")
    checkpoint = write_checkpoint(
        folder / "run" / "checkpoints",
        {"weights": [Piece.whole(name, tensor.detach()) for name, tensor in build_model(config, 1).named_parameters()]},
        step=1,
        run_config={"name": "some", "model": config.model_dump(mode="json")},
        global_state={},
        optimizer=None,
        tokenizer_files=tokenizer.files,
    )
    source = open_model(checkpoint)
    export_checkpoint(source, folder / "out", check=False, report=lambda line: None)
    return source, folder / "out"


def changes(content, path=()):
    """(path of a key, another value of its kind) for every key, those of inner objects too."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from changes(value, (*path, key))
            continue
        if isinstance(value, bool):
            other = not value
        elif isinstance(value, (int, float)):
            other = value + 1
        elif isinstance(value, list):
            other = ["AnotherForCausalLM"]
        elif isinstance(value, str):
            other = {"bfloat16": "float32", "silu": "gelu"}.get(value, "another")
        else:
            other = {"sliding_window": 80, "pad_token_id": 0}.get(key, {"rope_type": "linear", "factor": 2.0})
        yield (*path, key), other


def test_every_key_matters(exported):
    source, folder = exported
    assert configuration_faults(folder, source, "bf16") == []
    for file in ("config.json", "generation_config.json"):
        text = (folder / file).read_text()
        unseen = []
        for path, other in changes(json.loads(text)):
            content = json.loads(text)
            inner = content
            for key in path[:-1]:
                inner = inner[key]
            if path == ("do_sample",):
                continue  # a wish, no fact
            inner[path[-1]] = other
            (folder / file).write_text(json.dumps(content))
            if not configuration_faults(folder, source, "bf16"):
                unseen.append((*path, other))
        (folder / file).write_text(text)
        assert unseen == []
    assert configuration_faults(folder, source, "fp16") != []
    assert configuration_faults(folder, replace(source, config=stretched(source.config)), "bf16") != []


def stretched(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"context_length": config.context_length + 1})


@pytest.mark.parametrize("exported", ["llama, yarn"], indirect=True)
def test_the_tokenizer_s_special_tokens_matter(exported):
    source, folder = exported
    path = folder / "tokenizer_config.json"
    text = path.read_text()
    for key in ("eos_token", "bos_token"):
        path.write_text(json.dumps({**json.loads(text), key: "the"}))
        faults = configuration_faults(folder, source, "bf16")
        assert len(faults) == 1 and faults[0].startswith(f"{key} of the tokenizer is ")
    path.write_text(text)


@pytest.mark.parametrize("exported", ["mistral"], indirect=True)
def test_an_export_with_a_wrong_key_is_refused(exported, tmp_path, monkeypatch):
    source, _ = exported
    right = export_module.hf_config
    wrong = {"max_position_embeddings": 128}
    monkeypatch.setattr(export_module, "hf_config", lambda *arguments: {**right(*arguments), **wrong})
    with pytest.raises(ExportDiffers, match="do not say what the model is: .*context_length is 128 instead of 64"):
        export_checkpoint(source, tmp_path / "out", report=lambda line: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exported", ["llama, ntk"], indirect=True)
def test_ntk_is_a_larger_theta(exported):
    theta = json.loads((exported[1] / "config.json").read_text())["rope_theta"]
    assert math.isclose(theta, 10000 * 4 ** (12 / 10))
