"""From transformers to a checkpoint and back: every byte of every parameter, and nothing half-done."""

import hashlib
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

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
from megaslm.files import sole_writer
from megaslm.model import count_parameters


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
    digest = hashlib.sha256((llama / "model.safetensors").read_bytes()).hexdigest()
    assert origin["files"] == {"model.safetensors": digest}
    assert checkpoint.fingerprint.precision == "fp32" and len(checkpoint.fingerprint.tokens) == 33
    assert checkpoint.model_config == open_model(llama).config
    assert "llama, in bf16" in lines[0] and "(bound 0.0001)" in lines[1] and len(lines) == 3
    assert lines[2].startswith("attention_dropout 0.1: megaslm's network has no dropout")
    run = load_run_config(str(result.run_config))
    assert run.name == result.run_name == "my_llama-continued"
    assert run.model == checkpoint.model_config
    assert run.tokenizer.path == str(result.tokenizer) == str(tmp_path / "deep" / "my llama" / "tokenizer")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["my llama"]
    assert result.run_config == result.checkpoint / "continue.json"


# What is said of each beside the sizes and the logits.
REMARKS = {
    "TinyLlama": ["its tokenizer begins a text with '<s>' (1) and ends one with '</s>' (2)"],
    "Mistral": ["its tokenizer begins a text with '<s>' (1) and ends one with '</s>' (2)"],
    "Llama-3.2": [
        "its tokenizer begins a text with '<|begin_of_text|>' (480) and ends one with '<|end_of_text|>' (481)",
        "continued training starts with sequences of 2048 tokens (data.seq_length), of the 131072 that",
    ],
    "Qwen3": [],
    "gpt2": ["resid_pdrop 0.1, embd_pdrop 0.1, attn_pdrop 0.1: megaslm's network has no dropout", "its tokenizer, "],
    "pythia": [],
}
HEADS = ("lm_head.weight", "embed_out.weight")


@pytest.mark.parametrize("name", REMARKS)
def test_models_as_the_hub_has_them_come_back(name, hub_folder, tmp_path):
    """Old spellings, buffers, names without prefix, several tokens that end a text, tokenizers of every kind."""
    folder, lines = hub_folder(name), []
    imported = import_model(folder, tmp_path / "imported", report=lines.append)
    others = [line for line in lines if line.startswith("transformers' AutoTokenizer gives other ids of a text than")]
    assert len(others) == (imported.logits_check.tokenizer_equal is False)
    if name == "Qwen3" and int(transformers.__version__.split(".")[0]) >= 5:
        assert others  # its tokenizer.json splits otherwise than the class does that it names
    lines = [line for line in lines if line not in others]
    assert [line[: len(start)] for line, start in zip(lines[2:], REMARKS[name], strict=True)] == REMARKS[name]
    assert imported.logits_check.tokens == (64 if name == "gpt2" else 256)
    exported = export_checkpoint(
        open_model(imported.checkpoint), tmp_path / "exported", without_tokenizer=name == "gpt2", report=nothing
    )
    before, after = tensors_of(folder), tensors_of(exported.path)
    bare = {key.removeprefix("transformer."): tensor for key, tensor in after.items()}
    assert all(torch.equal(before[key], tensor) and before[key].dtype == tensor.dtype for key, tensor in bare.items())
    assert all("rotary" in key or "attn" in key or "attention" in key or key in HEADS for key in before.keys() - bare)
    config, back = (json.loads((path / "config.json").read_text()) for path in (folder, exported.path))
    keys = ("model_type", "bos_token_id", "eos_token_id")
    assert [back[key] for key in keys] == [config[key] for key in keys]
    generation = json.loads((exported.path / "generation_config.json").read_text())
    if name == "Llama-3.2":
        assert generation == json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"]


def test_several_types_become_fp32(hub_folder, tmp_path):
    folder, lines = hub_folder("Llama-3.2"), []
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.float() if "norm" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    imported = import_model(folder, tmp_path / "imported", report=lines.append)
    assert "in bfloat16 and float32: an export of it will be in one type, fp32" in lines[0]
    exported = export_checkpoint(open_model(imported.checkpoint), tmp_path / "exported", report=nothing)
    after = tensors_of(exported.path)
    assert all(torch.equal(tensor.float(), after[name]) for name, tensor in tensors.items())


def test_a_tokenizer_may_come_from_elsewhere(hf_folder, tokenizer, llama, tmp_path):
    folder = hf_folder("gpt2", vocab_size=290, n_positions=16)  # fewer than a fingerprint's tokens
    lines = []
    without = import_model(folder, tmp_path / "without", report=lines.append)
    assert without.tokenizer is None and open_model(without.checkpoint).tokenizer is None
    assert load_run_config(str(without.run_config)).tokenizer.path is None
    assert lines[3].startswith("it has no tokenizer: name the folder (--tokenizer FOLDER)")
    assert len(open_model(without.checkpoint).weights.fingerprint.tokens) == 17
    result = import_model(folder, tmp_path / "with", str(tokenizer), report=nothing)
    assert open_model(result.checkpoint).tokenizer.vocab_size == 290
    assert (result.logits_check.text, result.logits_check.tokenizer_equal) == ("python-stdlib", None)
    train_bpe(["quite another text, of other words"], 280).save(tmp_path / "other")  # than the one in the folder
    other = import_model(llama, tmp_path / "replaced", str(tmp_path / "other"), report=nothing)
    assert (other.logits_check.text, other.logits_check.tokenizer_equal) == ("python-stdlib", None)
    assert open_model(other.checkpoint).tokenizer.same_files(load_tokenizer(tmp_path / "other"))
    with pytest.raises(UserError, match="has 290 tokens and the model of .* only 289"):
        import_model(hf_folder("gpt2", vocab_size=289), tmp_path / "small", str(tokenizer), report=nothing)
    assert not (tmp_path / "small").exists()


def test_what_is_there_stays(llama, tmp_path):
    output = tmp_path / "imported"
    output.write_text("mine")
    with pytest.raises(UserError, match="imported is there already"):
        import_model(llama, output, report=nothing)
    assert list(tmp_path.iterdir()) == [output] and output.read_text() == "mine"
    output.unlink()
    output.symlink_to("nowhere")
    with pytest.raises(UserError, match="imported is there already"):
        import_model(llama, output, report=nothing)
    assert list(tmp_path.iterdir()) == [output] and output.is_symlink()


def test_one_import_of_a_name_at_a_time(llama, tmp_path, monkeypatch):
    with sole_writer(tmp_path / "imported"), pytest.raises(UserError, match="process .* is writing .*imported: wait"):
        import_model(llama, tmp_path / "imported", report=nothing)
    assert list(tmp_path.iterdir()) == []
    real = importing.open_huggingface

    def meanwhile(*arguments):
        (tmp_path / "imported").mkdir()
        return real(*arguments)

    monkeypatch.setattr(importing, "open_huggingface", meanwhile)
    with pytest.raises(UserError, match="imported is there already"):
        import_model(llama, tmp_path / "imported", report=nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["imported"]


@pytest.mark.parametrize(
    "name, message",
    [("x/..", "is no name for a new folder"), ("file/x", r"cannot write .*file/x: .* \(.*file\); choose")],
)
def test_an_output_that_cannot_be(name, message, llama, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        import_model(llama, f"{tmp_path}/{name}", report=nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def rewrite(path, **keys):
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def a_class_of_its_own(folder):
    (folder / "own.py").write_text(f"open({str(folder.parent / 'executed')!r}, 'w')")
    rewrite(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")


def a_number_of_the_wrong_type(folder):
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 does not check types")
    rewrite(folder / "config.json", rms_norm_eps=1)


@pytest.mark.parametrize(
    "edit, message",
    [
        (a_class_of_its_own, "tokenizer_config.json: transformers .* does not open it: .*--tokenizer DIR"),
        (a_number_of_the_wrong_type, "config.json: transformers .* does not open it: .*rms_norm_eps.*; mend the file"),
    ],
)
def test_what_transformers_does_not_open_is_told_before_the_work(edit, message, llama, tmp_path, monkeypatch):
    folder = shutil.copytree(llama, tmp_path / "copy")
    edit(folder)
    monkeypatch.setattr(importing, "write_checkpoint", None)
    with pytest.raises(UserError, match=message):
        import_model(folder, tmp_path / "imported", report=nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_the_spelling_of_transformers_5_needs_it(llama, tmp_path, monkeypatch):
    folder = shutil.copytree(llama, tmp_path / "copy")
    rotary = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    rewrite(folder / "config.json", rope_parameters=rotary)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.56.0")
    with pytest.raises(UserError, match="transformers 4.56.0 passes over them: install transformers 5"):
        import_model(folder, tmp_path / "imported", report=nothing)


def test_weights_that_are_not_numbers_are_told_before_the_work(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="the logits of .*copy are not finite: its weights hold NaN"):
        import_model(folder, tmp_path / "imported", report=nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_continued_training_starts_with_what_fits(llama):
    source = open_model(llama)
    small = importing.continued_run(source, "x", "y", None)
    assert (small.seq_length, small.train.activation_checkpointing) == (64, False)
    sizes = {**source.config.model_dump(), "context_length": 131072, "num_layers": 120, "hidden_size": 1024}
    source = replace(source, config=type(source.config)(**{**sizes, "ffn_hidden_size": 2750}))
    assert count_parameters(source.config) > 1e9
    large = importing.continued_run(source, "x", "y", None)
    assert (large.seq_length, large.train.activation_checkpointing) == (2048, True)
    assert list(importing._remarks(source, large))[-1].startswith("continued training starts with activation check")


def test_logits_that_differ_leave_nothing(llama, tmp_path, monkeypatch):
    """As a wrong mapping would: queries and keys are one for the other."""
    real = importing.HuggingFaceFolder.read

    def read(self, name):
        tensor = real(self, name)
        return tensor.flip(0) if name == "decoder.blocks.1.attention.out.weight" else tensor

    monkeypatch.setattr(importing.HuggingFaceFolder, "read", read)
    with pytest.raises(UserError, match="largest difference of a logit .*is not what its config.json describes"):
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
    assert [path.name for path in tmp_path.iterdir()] == ["imported"]
    assert json.loads((tmp_path / "imported" / "continue.json").read_text())["name"] == "imported-continued"


@pytest.mark.parametrize("rotary", [{"rope_theta": 10001.0}, {"rope_scaling": "linear", "rope_scaling_factor": 1.001}])
def test_far_positions_are_compared_and_other_angles_seen(rotary, hf_folder):
    """The angles are transformers' to the bit: rounded otherwise, they would move these logits by more than the bound
    at position 256."""
    source = open_model(hf_folder("llama", max_position_embeddings=256, num_hidden_layers=4))
    check = compare_logits(source.path, source)
    assert check.passed and check.tokens == 256
    other = type(source.config)(**{**source.config.model_dump(), **rotary})
    assert not compare_logits(source.path, replace(source, config=other)).passed
