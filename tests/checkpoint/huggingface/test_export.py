"""The export from a checkpoint on the disk to a folder that transformers opens, and everything that may go wrong."""

import errno
import hashlib
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megaslm.checkpoint import (
    EXPORT_RECORD,
    NUM_TOKENS,
    DamagedCheckpoint,
    ExportDiffers,
    LogitsCheck,
    Piece,
    compare_logits,
    export_checkpoint,
    open_model,
    take_fingerprint,
    verify_export,
    write_checkpoint,
)
from megaslm.checkpoint.format import read_manifest, write_manifest
from megaslm.checkpoint.huggingface import export as export_module
from megaslm.checkpoint.huggingface import parity
from megaslm.checkpoint.huggingface.export import plan_shards
from megaslm.config import ModelConfig
from megaslm.data import Tokenizer, train_bpe
from megaslm.errors import UserError
from megaslm.model import LanguageModel, build_model

transformers = pytest.importorskip("transformers")

GPT2 = {"norm": "layernorm", "position": "learned"}
NEOX = {"norm": "layernorm", "rope_fraction": 0.5}
STRETCHED = {"rope_scaling_factor": 4.0}
# {what: (family, switches)}
MODELS = {
    "llama": ("llama", {"num_kv_heads": 2}),
    "llama, biases, tied": ("llama", {"bias": True, "tie_embeddings": True}),
    "llama, linear": ("llama", {"rope_scaling": "linear", **STRETCHED}),
    "llama, ntk": ("llama", {"rope_scaling": "ntk", **STRETCHED}),
    "llama, yarn": ("llama", {"rope_scaling": "yarn", **STRETCHED}),
    "llama, llama3": ("llama", {"rope_scaling": "llama3", **STRETCHED}),
    "mistral": ("mistral", {"num_heads": 5, "num_kv_heads": 1, "head_dim": 16}),
    "qwen3": ("qwen3", {"qk_norm": True, "num_kv_heads": 2, "head_dim": 20, "tie_embeddings": True}),
    "gpt2": ("gpt2", {**GPT2, "feed_forward": "gelu_tanh", "bias": True, "tie_embeddings": True}),
    "gpt2, no biases": ("gpt2", {**GPT2, "feed_forward": "gelu"}),
    "gpt_neox": ("gpt_neox", {**NEOX, "feed_forward": "gelu", "bias": True, "parallel_residual": True}),
    "gpt_neox, no biases, tied": ("gpt_neox", {**NEOX, "feed_forward": "gelu_tanh", "tie_embeddings": True}),
}


def model_config(vocab_size: int, **switches) -> ModelConfig:
    sizes = {"context_length": 64, "num_layers": 2, "hidden_size": 48, "num_heads": 4, "ffn_hidden_size": 80}
    return ModelConfig(**{"vocab_size": vocab_size, **sizes, "init_std": 0.2, **switches})


def random_model(config: ModelConfig) -> LanguageModel:
    """Norm weights of one and biases of zero would hide a mistake."""
    model = build_model(config, seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def save_model(directory: Path, model: LanguageModel, tokenizer: Tokenizer | None, step: int = 3) -> Path:
    """A checkpoint of weights alone, as a run writes it."""
    tokens = list(range(min(NUM_TOKENS, model.config.vocab_size)))
    return write_checkpoint(
        directory,
        {"weights": [Piece.whole(name, tensor.detach()) for name, tensor in model.named_parameters()]},
        step=step,
        run_config={"name": "random", "model": model.config.model_dump(mode="json")},
        global_state={},
        optimizer=None,
        fingerprint=take_fingerprint(model, tokens, "fp32", "cpu"),
        tokenizer_files=tokenizer and tokenizer.files,
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the quick brown fox jumps over the lazy dog\n"] * 4, vocab_size=280)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    """Of a llama, two times: steps 2 and 3."""
    model = random_model(model_config(tokenizer.vocab_size, num_kv_heads=2))
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    save_model(directory, model, tokenizer, step=2)
    return save_model(directory, model, tokenizer, step=3)


@pytest.fixture
def run(checkpoint, tmp_path) -> Path:
    """A run folder of the test's own."""
    for step in checkpoint.parent.iterdir():
        target = tmp_path / "run" / "checkpoints" / step.name
        for file in (path for path in step.rglob("*") if path.is_file()):
            copy = target / file.relative_to(step)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return tmp_path / "run"


@pytest.fixture
def quiet():
    return {"report": lambda line: None}


def left(folder: Path) -> list[str]:
    """What an export left beside the run."""
    return sorted(path.name for path in folder.iterdir() if path.name != "run")


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_the_same_in_transformers(name, tokenizer, tmp_path, quiet, caplog):
    family, switches = MODELS[name]
    model = random_model(model_config(tokenizer.vocab_size, **switches))
    save_model(tmp_path / "run" / "checkpoints", model, tokenizer)
    source = open_model(tmp_path / "run")
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    result = export_checkpoint(source, tmp_path / "out", **quiet)
    transformers_logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert result.family == family and result.dtype == "bf16"
    assert result.logits_check.passed and result.logits_check.tokens == 64 and result.logits_check.tokenizer_equal
    assert compare_logits(tmp_path / "out", source, streamed=True).passed
    assert verify_export(tmp_path / "out") == []
    record = json.loads((tmp_path / "out" / EXPORT_RECORD).read_text())
    assert record["logits_check"]["passed"] and record["fingerprint_check"] == "equal"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert record["parameters"] == sum(tensor.numel() for tensor in stored.values()) == result.parameters
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert tokenizer.vocab_size in {len(tensor) for tensor in stored.values()}  # the padding is gone
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.eos_token == tokenizer.eod_token
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == tokenizer.eod_id


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 100), min_size=1), st.integers(1, 150))
def test_shards_are_as_full_as_they_can_be(sizes, most):
    shards = plan_shards(sizes, most)
    assert [name for part in shards.values() for name in part] == list(sizes)
    totals = [sum(sizes[name] for name in part) for part in shards.values()]
    for part, total in zip(shards.values(), totals, strict=True):
        assert total <= most or len(part) == 1
    for part, total in zip(list(shards.values())[1:], totals[:-1], strict=True):
        assert total + sizes[part[0]] > most


def test_several_files_with_an_index(run, tmp_path, quiet):
    source = open_model(run)
    export_checkpoint(source, tmp_path / "one", dtype="fp32", **quiet)
    export_checkpoint(source, tmp_path / "many", dtype="fp32", max_shard_bytes=60_000, **quiet)
    files = sorted(path.name for path in (tmp_path / "many").glob("model*"))
    assert files[0] == f"model-00001-of-{len(files) - 1:05d}.safetensors" and len(files) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert list(index["weight_map"]) == sorted(whole, key=list(index["weight_map"]).index)
    for name, tensor in whole.items():
        assert torch.equal(load_file(tmp_path / "many" / index["weight_map"][name])[name], tensor)
    assert compare_logits(tmp_path / "many", source, streamed=True).passed


def test_every_tensor_is_read_once(run, tmp_path, quiet, monkeypatch):
    source, read = open_model(run), []
    once = type(source.weights).read
    monkeypatch.setattr(type(source.weights), "read", lambda self, name: read.append(name) or once(self, name))
    export_checkpoint(source, tmp_path / "out", check=False, **quiet)
    assert sorted(read) == sorted(source.weights.shapes)


def test_a_difference_that_is_no_number_does_not_pass():
    facts = {"tokens": 1, "text": "", "streamed": False, "tokenizer_equal": None, "transformers": "", "torch": ""}
    for rounding, passed in ((None, [True, False, False, False]), (2e-4, [True, True, False, False])):
        checks = [LogitsCheck(d, 9.0, 1e-4, rounding, **facts) for d in (1e-4, 2e-4, 2.1e-4, float("nan"))]
        assert [check.passed for check in checks] == passed
    assert not LogitsCheck(float("nan"), 9.0, 1e-4, float("nan"), **facts).passed


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_an_export_of_an_export_has_its_type_and_bytes(run, tmp_path, quiet, dtype):
    export_checkpoint(open_model(run), tmp_path / "one", dtype=dtype, **quiet)
    result = export_checkpoint(open_model(tmp_path / "one"), tmp_path / "two", **quiet)
    assert result.dtype == dtype
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(two.read_bytes()).digest()


def test_a_wrong_mapping_is_found(run, tmp_path, quiet, monkeypatch):
    """Two parts of the same shape, one in the other's place."""
    groups = export_module.parameter_groups

    def swapped(config, family):
        for group in groups(config, family):
            if group.theirs[0].endswith("gate_proj.weight"):
                yield group.__class__(group.ours, group.theirs[::-1], group.shapes, group.split, group.join)
            else:
                yield group

    monkeypatch.setattr(export_module, "parameter_groups", lambda *arguments: list(swapped(*arguments)))
    with pytest.raises(ExportDiffers, match="transformers does not compute the same: largest difference of a logit"):
        export_checkpoint(open_model(run), tmp_path / "out", **quiet)
    assert left(tmp_path) == []


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tensor_too_few_is_found(run, tmp_path, quiet, monkeypatch, streamed):
    groups = export_module.parameter_groups
    monkeypatch.setattr(export_module, "parameter_groups", lambda *arguments: groups(*arguments)[:-1])
    if streamed:
        monkeypatch.setattr(parity, "available_memory", lambda: 1)
    with pytest.raises(ExportDiffers, match=r"not what transformers' LlamaForCausalLM has: .*lm_head\.weight"):
        export_checkpoint(open_model(run), tmp_path / "out", **quiet)
    assert left(tmp_path) == []


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tensor_of_another_shape_is_found(run, tmp_path, quiet, streamed):
    """As where config.json says another size than the files have."""
    source, out = open_model(run), tmp_path / "out"
    export_checkpoint(source, out, **quiet)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(ExportDiffers, match=r"not what transformers' LlamaForCausalLM has: .*gate_proj\.weight"):
        compare_logits(out, source, streamed=streamed)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tensor_of_no_use_is_found(run, tmp_path, quiet, streamed):
    source, out = open_model(run), tmp_path / "out"
    export_checkpoint(source, out, **quiet)
    weights = load_file(out / "model.safetensors")
    save_file(
        {**weights, "model.layers.9.mlp.up_proj.weight": torch.ones(2)}, out / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ExportDiffers, match=r"not what transformers' LlamaForCausalLM has: model\.layers\.9\."):
        compare_logits(out, source, streamed=streamed)


def test_an_import_comes_back_in_its_type(run, tmp_path, quiet):
    path = run / "checkpoints" / "step_00000003"
    manifest = read_manifest(path)
    manifest["global_state"]["imported_from"] = {"name": "some", "family": "mistral", "dtype": "fp16"}
    write_manifest(path, {key: manifest[key] for key in manifest if key not in ("format", "version", "sha256")})
    result = export_checkpoint(open_model(run), tmp_path / "out", **quiet)
    assert (result.dtype, result.family) == ("fp16", "mistral")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_that_no_arithmetic_computes_closer(tokenizer, tmp_path, quiet, monkeypatch, streamed):
    """Beyond the bound, transformers' own two ways to compute attention say how far apart two right ones are."""
    save_model(tmp_path / "run" / "checkpoints", random_model(model_config(tokenizer.vocab_size)), tokenizer)
    source, lines = open_model(tmp_path / "run"), []
    monkeypatch.setattr(parity, "BOUND", 1e-9)
    monkeypatch.setattr(parity, "available_memory", lambda: 1 if streamed else 1 << 40)
    right = parity._their_logits

    def theirs(folder, ids, streamed, attention=None):
        return right(folder, ids, streamed, attention) + (2e-3 if attention == "eager" else 1e-3)

    monkeypatch.setattr(parity, "_their_logits", theirs)
    check = export_checkpoint(source, tmp_path / "out", report=lines.append).logits_check
    assert check.passed and check.streamed == streamed and 9e-4 < check.max_difference <= check.rounding < 1.2e-3
    assert "sdpa and eager attention differ by 0.001" in lines[-1] and f"up to {check.largest_logit:.3g}" in lines[-1]
    monkeypatch.setattr(parity, "_their_logits", lambda *some, **attention: right(*some, **attention) + 1e-3)
    with pytest.raises(ExportDiffers, match="transformers does not compute the same: .*; transformers' sdpa and eager"):
        export_checkpoint(source, tmp_path / "other", **quiet)


def test_a_tokenizer_that_transformers_reads_otherwise_is_found(run, tmp_path, quiet, monkeypatch):
    other = train_bpe(["another text with other merges\n"] * 4, vocab_size=280)
    source = open_model(run)
    save = Tokenizer.save
    monkeypatch.setattr(Tokenizer, "save", lambda self, folder: save(other, folder))
    with pytest.raises(ExportDiffers, match="AutoTokenizer gives other ids"):
        export_checkpoint(source, tmp_path / "out", **quiet)
    assert left(tmp_path) == []


def test_another_fingerprint_is_found(run, tmp_path, quiet):
    path = run / "checkpoints" / "step_00000003"
    manifest = read_manifest(path)
    manifest["fingerprint"]["loss"] += 0.01
    write_manifest(path, {key: manifest[key] for key in manifest if key not in ("format", "version", "sha256")})
    with pytest.raises(ExportDiffers, match=r"does not compute what it computed when .* was saved: the loss"):
        export_checkpoint(open_model(run), tmp_path / "out", **quiet)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "value,dtype,message", [(float("nan"), "bf16", "not finite"), (1e5, "fp16", "fp16 cannot hold")]
)
def test_weights_that_cannot_be_exported(tokenizer, tmp_path, quiet, value, dtype, message):
    model = random_model(model_config(tokenizer.vocab_size))
    with torch.no_grad():
        model.decoder.blocks[1].feed_forward.down.weight[3, 5] = value
    save_model(tmp_path / "run" / "checkpoints", model, tokenizer)
    with pytest.raises(UserError, match=message):
        export_checkpoint(open_model(tmp_path / "run"), tmp_path / "out", dtype=dtype, **quiet)
    assert left(tmp_path) == []


def test_a_changed_file_is_found_beside_the_conversion(run, tmp_path, quiet):
    source = open_model(run, verify=False)
    file = run / "checkpoints" / "step_00000003" / "weights_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match="weights_00000.safetensors is not what was written"):
        export_checkpoint(source, tmp_path / "out", **quiet)
    assert left(tmp_path) == []


def test_no_tokenizer(tokenizer, tmp_path, quiet):
    save_model(tmp_path / "run" / "checkpoints", random_model(model_config(tokenizer.vocab_size)), None)
    source = open_model(tmp_path / "run")
    with pytest.raises(UserError, match="there is no tokenizer with .*--tokenizer FOLDER.*--without_tokenizer"):
        export_checkpoint(source, tmp_path / "out", **quiet)
    with pytest.raises(UserError, match="needs a tokenizer"):
        export_checkpoint(source, tmp_path / "out", without_tokenizer=True, text="some", **quiet)
    check = export_checkpoint(source, tmp_path / "out", without_tokenizer=True, **quiet).logits_check
    assert check.passed and check.tokenizer_equal is None and check.tokens == 64 and check.text == "random tokens"
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert "AutoTokenizer" not in (tmp_path / "out" / "README.md").read_text()


def test_the_text_is_the_users(run, tmp_path, quiet):
    source = open_model(run)
    text = "the quick brown fox <|endoftext|> jumps over some other animal"  # a special token written in a text is text
    check = export_checkpoint(source, tmp_path / "out", text=text, **quiet).logits_check
    assert check.tokens == len(source.tokenizer.encode(text)) and check.text == "given text"
    lines: list[str] = []
    with pytest.raises(UserError, match=r"gives 0 tokens, and so few prove nothing: give one of 32 or more"):
        export_checkpoint(source, tmp_path / "other", text="", report=lines.append)
    assert lines == []  # before the work


def test_what_is_in_the_way_of_an_output(run, tmp_path, quiet):
    source, out = open_model(run), tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        export_checkpoint(source, out, overwrite=True, **quiet)
    out.unlink()
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(UserError, match="is not empty, and not an export of megaslm"):
        export_checkpoint(source, out, overwrite=True, **quiet)
    assert left(tmp_path) == ["out"] and left(out) == ["mine"]
    (out / "mine").unlink()
    export_checkpoint(source, out, **quiet)  # empty
    with pytest.raises(UserError, match="--overwrite"):
        export_checkpoint(source, out, **quiet)
    assert export_checkpoint(source, out, dtype="fp32", overwrite=True, **quiet).dtype == "fp32"
    assert left(tmp_path) == ["out"] and verify_export(out) == []


def test_a_full_disk(run, tmp_path, quiet, monkeypatch):
    source, out = open_model(run), tmp_path / "out"
    export_checkpoint(source, out, check=False, **quiet)
    write = export_module.write_safetensors

    def full(path, tensors):
        if "00002" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(export_module, "write_safetensors", full)
    with pytest.raises(UserError, match=r"could not write the export .*: No space left on device; .*; free \d"):
        export_checkpoint(source, out, max_shard_bytes=60_000, overwrite=True, **quiet)
    assert left(tmp_path) == ["out"] and verify_export(out) == []  # the old one
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="no room for the export"):
        export_checkpoint(source, tmp_path / "new", **quiet)
    assert left(tmp_path) == ["out"]


def test_an_export_says_what_is_wrong_with_it(run, tmp_path, quiet):
    out = tmp_path / "out"
    export_checkpoint(open_model(run), out, check=False, **quiet)
    (out / "config.json").write_text("{}")
    (out / "README.md").unlink()
    (out / "model-00001-of-00002.safetensors").touch()  # of an older export
    found = verify_export(out)
    assert len(found) == 3 and found[0] == "README.md is missing" and found[1].startswith("config.json has 2 bytes")
    assert found[2] == "model-00001-of-00002.safetensors is no file of this export"
    record = json.loads((out / EXPORT_RECORD).read_text())
    for content, message in (({**record, "version": 2}, "version 2"), ({}, "not the record"), (None, "not an export")):
        (out / EXPORT_RECORD).unlink()
        if content is not None:
            (out / EXPORT_RECORD).write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            verify_export(out)
    (out / EXPORT_RECORD).write_text("{")
    with pytest.raises(UserError, match="can't be read"):
        verify_export(out)


LARGE = """
import os, re, signal, sys
from pathlib import Path
import torch
from megaslm.checkpoint import (Fingerprint, LazyTensor, Piece, compare_logits, export_checkpoint, open_model,
                                write_checkpoint)
from megaslm.checkpoint.huggingface import export
from megaslm.config import ModelConfig
from megaslm.model import LanguageModel

def largest_memory():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder = Path(sys.argv[1])
config = ModelConfig(vocab_size=150_000, context_length=16, num_layers=1, hidden_size=1000, num_heads=4,
                     ffn_hidden_size=1000, tie_embeddings=True)
with torch.device("meta"):
    shapes = {name: tuple(p.shape) for name, p in LanguageModel(config).named_parameters()}
pieces = [Piece.whole(name, LazyTensor(torch.float32, shape, lambda shape=shape: torch.full(shape, 0.01)))
          for name, shape in shapes.items()]
write_checkpoint(folder, {"weights": pieces}, step=1, optimizer=None, global_state={},
                 run_config={"name": "large", "model": config.model_dump(mode="json")},
                 fingerprint=Fingerprint([0, 1, 2], "bf16", 0.0, [0.0]))
options = {"without_tokenizer": True, "check": False, "dtype": "bf16"}
source = open_model(folder, verify=False)
Path("/proc/self/clear_refs").write_text("5")
export_checkpoint(source, folder / "out", **options)
print("conversion", largest_memory())
lines = []
try:
    export._check_fingerprint(source, lines.append)
except export.ExportDiffers as error:
    lines.append(str(error))
print("fingerprint", largest_memory(), flush=True)
assert compare_logits(folder / "out", source, streamed=True).passed
print("check", largest_memory(), flush=True)
export.flush_to_disk = lambda file: os.kill(os.getpid(), signal.SIGKILL)  # after the weights, before the name
export_checkpoint(source, folder / "killed", **options)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_a_kill(tmp_path):
    """600 MB in one tensor: that and 1 GB is all that conversion and check take. Then a kill before it has its name."""
    finished = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert finished.returncode == -9 and finished.stderr == ""  # not a word of the libraries that it imports
    parts = ("conversion", "fingerprint", "check")
    figures = dict(line.split() for line in finished.stdout.splitlines() if line.startswith(parts))
    assert set(figures) == set(parts)
    assert all(int(used) < 600e6 + 1e9 for used in figures.values()), figures
    assert (tmp_path / "out").exists() and (tmp_path / ".killed.export").exists() and not (tmp_path / "killed").exists()
