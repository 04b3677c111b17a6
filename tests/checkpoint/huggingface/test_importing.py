"""From transformers to a checkpoint and back: every byte of every parameter, and nothing half-done."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from megaslm.checkpoint import (
    compare_logits,
    export_checkpoint,
    import_model,
    open_checkpoint,
    open_model,
)
from megaslm.checkpoint.huggingface import importing
from megaslm.config import load_run_config
from megaslm.data import load_tokenizer, train_bpe
from megaslm.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["a text that is rather short, and then some more of it"], 290).save(folder)
    return folder


@pytest.fixture(scope="module")
def llama(hf_folder, tokenizer):
    folder = hf_folder("llama", torch.bfloat16, num_key_value_heads=2, attention_dropout=0.1)
    return shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """All tensors of a folder, gpt_neox's head under one name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return {name.replace("embed_out", "lm_head"): tensor for name, tensor in found.items()}


def nothing(line: str) -> None:
    """Report to nobody."""


@pytest.mark.parametrize(
    "family, dtype, keys",
    [
        ("llama", torch.bfloat16, {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
        ("llama", torch.float16, {"tie_word_embeddings": True, "head_dim": 20, "max_shard_size": "40KB"}),
        ("mistral", torch.bfloat16, {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 12}),
        ("qwen3", torch.float32, {"num_key_value_heads": 1, "head_dim": 16, "max_shard_size": "40KB"}),
        ("gpt2", torch.float32, {"activation_function": "gelu"}),
        ("gpt2", torch.bfloat16, {"tie_word_embeddings": False, "n_inner": None, "vocab_size": 256}),
        ("gpt_neox", torch.float16, {"use_parallel_residual": False, "max_shard_size": "40KB"}),
        ("gpt_neox", torch.bfloat16, {"tie_word_embeddings": True, "hidden_act": "gelu_new"}),
    ],
)
def test_every_byte_comes_back(family, dtype, keys, hf_folder, tmp_path):
    if family == "mistral":
        keys = {**keys, "sliding_window": None}
    folder = hf_folder(family, dtype, **keys)
    imported = import_model(folder, tmp_path / "imported", report=nothing)
    assert imported.logits_check.passed
    exported = export_checkpoint(
        open_model(imported.checkpoint), tmp_path / "exported", without_tokenizer=True, check=False, report=nothing
    )
    before, after = tensors_of(folder), tensors_of(exported.path)
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {dtype}
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert all(torch.equal(before[name].view(bits), after[name].view(bits)) for name in before)


def test_the_checkpoint_says_where_it_comes_from_and_carries_its_tokenizer(llama, tokenizer, tmp_path):
    lines = []
    result = import_model(llama, tmp_path / "deep" / "my llama", report=lines.append)
    checkpoint = open_checkpoint(result.checkpoint)
    state = checkpoint.global_state
    assert (checkpoint.step, checkpoint.optimizer, set(checkpoint.manifest["tensors"])) == (0, None, {"weights"})
    assert state["identity"]["tokenizer"] == load_tokenizer(tokenizer).fingerprint == checkpoint.tokenizer().fingerprint
    assert state["identity"]["model.num_kv_heads"] == 2
    origin = state["imported_from"]
    assert (origin["name"], origin["family"], origin["dtype"]) == (llama.name, "llama", "bf16")
    assert list(origin["files"]) == ["model.safetensors"] and len(origin["files"]["model.safetensors"]) == 64
    assert checkpoint.fingerprint.precision == "fp32" and len(checkpoint.fingerprint.tokens) == 33
    assert checkpoint.model_config == open_model(llama).config
    assert lines[0].startswith("attention_dropout 0.1: megaslm's network has no dropout")
    assert "llama in bf16" in lines[1] and "allowed: 1e-04" in lines[2] and len(lines) == 3
    run = load_run_config(str(result.run_config))
    assert run.name == result.run_name == "my_llama-continued"
    assert run.model == checkpoint.model_config
    assert run.tokenizer.path == str(result.tokenizer) == str(tmp_path / "deep" / "my llama" / "tokenizer")
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["my llama", "my llama.json"]


def test_a_tokenizer_may_come_from_elsewhere(hf_folder, tokenizer, tmp_path):
    folder = hf_folder("gpt2", vocab_size=290)
    without = import_model(folder, tmp_path / "without", report=nothing)
    assert without.tokenizer is None and open_model(without.checkpoint).tokenizer is None
    assert load_run_config(str(without.run_config)).tokenizer.path is None
    result = import_model(folder, tmp_path / "with", str(tokenizer), report=nothing)
    assert open_model(result.checkpoint).tokenizer.vocab_size == 290
    with pytest.raises(UserError, match="has 290 tokens and the model of .* only 289"):
        import_model(hf_folder("gpt2", vocab_size=289), tmp_path / "small", str(tokenizer), report=nothing)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("there", ["imported", "imported.json"])
def test_what_is_there_stays(there, llama, tmp_path):
    (tmp_path / there).write_text("mine")
    with pytest.raises(UserError, match=f"{there} is there already"):
        import_model(llama, tmp_path / "imported", report=nothing)
    assert [path.name for path in tmp_path.iterdir()] == [there] and (tmp_path / there).read_text() == "mine"


def test_logits_that_differ_leave_nothing(llama, tmp_path, monkeypatch):
    """As a wrong mapping would: queries and keys are one for the other."""
    real = importing.HuggingFaceFolder.read

    def read(self, name):
        tensor = real(self, name)
        return tensor.flip(0) if name == "decoder.blocks.1.attention.out.weight" else tensor

    monkeypatch.setattr(importing.HuggingFaceFolder, "read", read)
    with pytest.raises(UserError, match="differ by .* at most .*is not what its config.json describes"):
        import_model(llama, tmp_path / "imported", report=nothing)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_not_what_was_read_leaves_nothing(llama, tmp_path, monkeypatch):
    real = importing.write_checkpoint

    def write(*arguments, fingerprint, **options):
        wrong = type(fingerprint)(**{**vars(fingerprint), "loss": fingerprint.loss + 1e-2})
        return real(*arguments, fingerprint=wrong, **options)

    monkeypatch.setattr(importing, "write_checkpoint", write)
    with pytest.raises(UserError, match="the checkpoint is not what was read from .*loss"):
        import_model(llama, tmp_path / "imported", report=nothing)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(llama, tmp_path, monkeypatch):
    import errno

    from megaslm.checkpoint import folder

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder, "write_safetensors", full)
    with pytest.raises(UserError, match="No space left on device"):
        import_model(llama, tmp_path / "imported", report=nothing)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_import_left_is_no_hindrance(llama, tmp_path):
    (tmp_path / ".imported.import" / "imported").mkdir(parents=True)
    import_model(llama, tmp_path / "imported", report=nothing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imported", "imported.json"]
    assert json.loads((tmp_path / "imported.json").read_text())["name"] == "imported-continued"


@pytest.mark.parametrize("rotary", [{"rope_theta": 10001.0}, {"rope_scaling": "linear", "rope_scaling_factor": 1.001}])
def test_far_positions_are_compared_and_other_angles_seen(rotary, hf_folder):
    """The angles are transformers' to the bit: rounded otherwise, they would move these logits by more than the bound
    at position 256."""
    source = open_model(hf_folder("llama", max_position_embeddings=256, num_hidden_layers=4))
    check = compare_logits(source.path, source)
    assert check.passed and check.tokens == 256
    other = type(source.config)(**{**source.config.model_dump(), **rotary})
    assert not compare_logits(source.path, replace(source, config=other)).passed
