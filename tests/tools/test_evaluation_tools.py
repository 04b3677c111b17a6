"""tools/evaluate.py and tools/validate_model.py as the user runs them, in this process."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from megaslm.checkpoint import Piece, export_checkpoint, open_model, take_fingerprint, write_checkpoint
from megaslm.config import ModelConfig
from megaslm.data import TokenFile, build_token_file, load_tokenizer, train_bpe
from megaslm.data.sources import TextSource
from megaslm.model import LanguageModel, build_model, count_parameters

CONTEXT = 32


@pytest.fixture(scope="module")
def model(corpus) -> LanguageModel:
    config = ModelConfig(
        vocab_size=corpus.vocab_size,
        context_length=CONTEXT,
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        ffn_hidden_size=64,
    )
    return build_model(config, seed=1).eval()


def write(model: LanguageModel, directory: Path, **values) -> Path:
    """A checkpoint of the weights of `model`."""
    weights = {name: Piece.whole(value.detach()) for name, value in model.named_parameters()}
    config = {"name": "tiny", "model": model.config.model_dump(mode="json")}
    values = {"global_state": {}, "run_config": config, **values}
    return write_checkpoint(directory, {"weights": weights}, step=1, optimizer=None, **values)


@pytest.fixture(scope="module")
def checkpoint(model, corpus, tmp_path_factory) -> Path:
    """Of `model`, with its tokenizer and fingerprint."""
    tokenizer = load_tokenizer(corpus.tokenizer)
    return write(
        model,
        tmp_path_factory.mktemp("checkpoints"),
        global_state={"identity": {"tokenizer": tokenizer.fingerprint}},
        fingerprint=take_fingerprint(model, range(16), "fp32", "cpu"),
        tokenizer_files=tokenizer.files,
    )


@pytest.fixture(scope="module")
def export(checkpoint, corpus, tmp_path_factory) -> Path:
    return export_checkpoint(open_model(checkpoint), tmp_path_factory.mktemp("exports") / "tiny", dtype="fp32").path


# --- evaluate --------------------------------------------------------------------------------------------------------


def test_a_run_is_evaluated_as_it_evaluates_itself(command, preset, metrics, run_tool, tmp_path):
    changes = ["train.max_steps=4", "eval.interval=4", "eval.max_sequences=11", "data.mask_documents=true"]
    finished = command("--preset", preset, "--run_dir", tmp_path / "run", *changes)
    assert finished.code == 0, finished.err
    (logged,) = metrics(tmp_path / "run", "eval")
    finished = run_tool("evaluate.py", "--model", tmp_path / "run", "--json", tmp_path / "out.json", "--batch_size", 3)
    assert finished.code == 0, finished.err
    found = json.loads((tmp_path / "out.json").read_text())["overall"]
    assert found["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=1e-6)
    assert found["targets"] == logged["targets"] == 11 * CONTEXT


def test_a_run_of_another_version(run_tool, model, tmp_path):
    config = {"name": "tiny", "model": model.config.model_dump(mode="json"), "data": {"train": "x", "weather": "fair"}}
    path = write(model, tmp_path, run_config=config)
    message = run_tool("evaluate.py", "--model", path).message()
    assert f"checkpoint {path}" in message and "data.weather" in message


def test_token_files_and_text_and_all_together(run_tool, checkpoint, export, corpus, tmp_path):
    windows = ["--data", corpus.prefix, "--text", corpus.text, "--max_sequences", 20, "--stride", 8]
    results = {}
    for path in (checkpoint, export):
        finished = run_tool("evaluate.py", "--model", path, *windows, "--json", tmp_path / "out.json")
        assert finished.code == 0, finished.err
        assert "together" in finished.out and corpus.prefix in finished.out
        results[path] = json.loads((tmp_path / "out.json").read_text())
    sets = results[checkpoint]["sets"]
    # The token file was made of that text.
    assert sets[corpus.prefix]["loss"] == pytest.approx(sets[str(corpus.text)]["loss"], rel=1e-6)
    assert sets[corpus.prefix]["targets"] == CONTEXT + 19 * 8
    assert results[checkpoint]["overall"]["targets"] == 2 * sets[corpus.prefix]["targets"]
    assert results[export]["overall"]["loss"] == pytest.approx(results[checkpoint]["overall"]["loss"], rel=1e-5)


def test_data_that_is_not_of_this_model(run_tool, checkpoint, corpus, tmp_path):
    from megaslm.data import ascii_tokenizer

    foreign = str(tmp_path / "foreign")
    build_token_file(iter(TextSource([corpus.text])), ascii_tokenizer(), foreign)
    finished = run_tool("evaluate.py", "--model", checkpoint, "--data", foreign)
    assert "fingerprint" in finished.message() and foreign in finished.message()
    larger = str(tmp_path / "larger")
    shutil.copy(f"{foreign}.bin", f"{larger}.bin")  # without a manifest, that says which tokenizer it was
    shutil.copy(f"{foreign}.idx", f"{larger}.idx")
    assert TokenFile(larger).tokens.max() >= corpus.vocab_size
    message = run_tool("evaluate.py", "--model", checkpoint, "--data", larger).message()
    assert f"outside the model's vocabulary of {corpus.vocab_size} tokens" in message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "says nothing of data: give --data, --text or --tasks"),
        (["--stride", 4], "--stride is of --data or --text"),
        (["--tasks", "x", "--mask_documents"], "--mask_documents is of --data or --text"),
        (["--data", "x", "--limit", 4], "--limit is of --tasks"),
        (["--tasks", "x", "--max_sequences", 4], "--max_sequences is not of --tasks"),
        (["--tasks", "x", "--num_fewshot", -1], "--num_fewshot -1: give 0 or more"),
        (["--tasks", "x", "--include_path", "nowhere"], "there is no folder nowhere"),
        (["--data", "{prefix}", "--stride", 33], "stride 33: give 1 to 32"),
        (["--data", "{prefix}", "--batch_size", 0], "--batch_size 0: give 1 or more"),
        (["--data", "{prefix}", "--seq_length", 64], "longer than the model's context of 32"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--data", "{prefix}", "--device", "nowhere"], "the device nowhere is not there"),
        (["--data", "{prefix}", "--json", "nowhere/out.json"], "--json nowhere/out.json: give the name of a file"),
    ],
)
def test_mistakes_in_the_command(run_tool, checkpoint, corpus, arguments, says):
    arguments = [str(one).format(prefix=corpus.prefix) for one in arguments]
    assert says in run_tool("evaluate.py", "--model", checkpoint, *arguments).message()


# --- validate_model --------------------------------------------------------------------------------------------------


def validate(run_tool, tmp_path, path: Path, *arguments, code: int = 0) -> dict[str, dict]:
    """The checks by name; the table says the same."""
    finished = run_tool("validate_model.py", path, "--max_tokens", 256, "--json", tmp_path / "v.json", *arguments)
    assert finished.code == code, f"{finished.out}\n{finished.err}"
    report = json.loads((tmp_path / "v.json").read_text())
    checks = {check["name"]: check for check in report["checks"]}
    assert report["passed"] == all(check["passed"] is not False for check in checks.values()) == (code == 0)
    assert finished.out.count("FAIL ") == sum(check["passed"] is False for check in checks.values())
    return checks


def test_a_sound_checkpoint(run_tool, checkpoint, corpus, tmp_path):
    checks = validate(run_tool, tmp_path, checkpoint)
    judged = ("files", "parameters", "weights on disk", "opens", "fingerprint", "generates", "perplexity")
    assert [name for name, check in checks.items() if check["passed"]] == list(judged)
    figures = json.loads((tmp_path / "v.json").read_text())["figures"]
    assert figures["decode_tokens_per_s"] > 0 and figures["prefill_tokens_per_s"] > 0
    assert figures["peak_memory_bytes"] > 1e8 and figures["targets"] == 256
    # An untrained model is about as good as a guess.
    checks = validate(run_tool, tmp_path, checkpoint, "--data", corpus.prefix, "--max_perplexity", 5, code=1)
    assert [name for name, check in checks.items() if check["passed"] is False] == ["perplexity"]
    validate(run_tool, tmp_path, checkpoint, "--text", corpus.text, "--max_perplexity", 40)


def test_a_model_that_is_worse_than_a_guess(run_tool, model, tmp_path):
    """Of text that it should know: source code, with a tokenizer that holds it."""
    texts = [(Path(json.__file__).parent / name).read_text() for name in ("decoder.py", "encoder.py")]
    train_bpe(iter(texts), 300).save(tmp_path / "tokenizer")
    config = model.config.model_copy(update={"vocab_size": 300, "init_std": 1.0})
    path = write(build_model(config, seed=1), tmp_path / "checkpoints")
    checks = validate(run_tool, tmp_path, path, "--tokenizer", tmp_path / "tokenizer", code=1)
    assert [name for name, check in checks.items() if check["passed"] is False] == ["perplexity"]
    assert checks["perplexity"]["expected"] == "at most 300, a uniform guess"


def test_an_export_is_compared_with_transformers(run_tool, export, tmp_path):
    checks = validate(run_tool, tmp_path, export)
    assert checks["files"]["passed"] and checks["transformers"]["passed"] and checks["opens"]["passed"]
    figures = json.loads((tmp_path / "v.json").read_text())["figures"]
    assert figures["bytes_of_weights"] == 4 * count_parameters(open_model(export).config)
    assert "transformers" not in validate(run_tool, tmp_path, export, "--quick")


def test_a_folder_of_others_has_no_record(run_tool, export, tmp_path):
    foreign = shutil.copytree(export, tmp_path / "foreign")
    (foreign / "megaslm_export.json").unlink()
    checks = validate(run_tool, tmp_path, foreign, "--quick")
    assert checks["files"]["passed"] is None and "no record" in checks["files"]["value"]


def test_every_check_is_made_after_one_that_failed(run_tool, checkpoint, export, tmp_path):
    """A bit of the weights is not as it was written: all the rest can still be said."""
    for path, weights in ((checkpoint, "weights_00000.safetensors"), (export, "model.safetensors")):
        broken = shutil.copytree(path, tmp_path / path.name)
        data = bytearray((broken / weights).read_bytes())
        first = 8 + int.from_bytes(data[:8], "little")
        data[first : first + 4] = b"\x00\x00\x80\x7f"  # an infinite number
        (broken / weights).write_bytes(data)
        checks = validate(run_tool, tmp_path, broken, "--quick", code=1)
        assert weights in checks["files"]["value"] and checks["files"]["passed"] is False
        assert checks["parameters"]["passed"] and checks["weights on disk"]["passed"] and checks["opens"]["passed"]
        assert checks["generates"]["value"] == "logits that are not finite" and checks["generates"]["passed"] is False
        assert checks["perplexity"]["passed"] is False
        assert checks["speed"]["value"]


@torch.no_grad()
def test_a_model_that_says_one_thing_for_ever(run_tool, model, tmp_path):
    """All tokens look alike to it, and the head knows one answer to that."""
    model = copy.deepcopy(model)
    model.decoder.embedding.weight[:] = model.decoder.embedding.weight[0].clone()
    hidden = model.decoder(torch.zeros(1, 1, dtype=torch.int64))[0, 0]
    model.head.weight.zero_()
    model.head.weight[5] = 10 * hidden
    checks = validate(run_tool, tmp_path, write(model, tmp_path / "checkpoints"), code=1)
    assert [name for name, check in checks.items() if check["passed"] is False] == ["generates"]
    assert checks["generates"]["value"].endswith("1 different ones")


def test_what_does_not_open(run_tool, checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "step_00000001")
    (broken / "weights_00000.safetensors").unlink()
    checks = validate(run_tool, tmp_path, broken, code=1)
    assert "weights_00000.safetensors" in checks["opens"]["value"] and list(checks) == ["files", "opens"]
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        assert str(path) in run_tool("validate_model.py", path).message()


def test_mistakes_are_no_verdict_on_the_model(run_tool, checkpoint, corpus, tmp_path):
    (tmp_path / "one.txt").write_text("t")
    for arguments, says in (
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", tmp_path / "one.txt"], "two are the least"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", corpus.prefix, "--max_perplexity", 0.5], "--max_perplexity 0.5: give 1 or more"),
    ):
        assert says in run_tool("validate_model.py", checkpoint, *arguments).message()
