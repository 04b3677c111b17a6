"""tools/evaluate.py and tools/validate_model.py as the user runs them, in this process."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megaslm.checkpoint import ModelSource, Piece, export_checkpoint, open_model, take_fingerprint, write_checkpoint
from megaslm.config import ModelConfig
from megaslm.data import TokenFile, build_token_file, character_tokenizer, load_tokenizer, train_bpe
from megaslm.data.sources import TextSource
from megaslm.errors import UserError
from megaslm.evaluation import Windows, open_sets, validation
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
    weights = [Piece.whole(name, value.detach()) for name, value in model.named_parameters()]
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


def evaluate(run_tool, tmp_path, path: Path, *arguments) -> dict:
    """The JSON of the command."""
    finished = run_tool("evaluate.py", "--model", path, "--json", tmp_path / "out.json", *arguments)
    assert finished.code == 0, finished.err
    return json.loads((tmp_path / "out.json").read_text())


def test_every_option_has_its_effect(run_tool, checkpoint, corpus, tmp_path):
    """The numbers are those of the library with that option."""
    text = tmp_path / "text.jsonl"
    records = [json.loads(line)["text"] for line in corpus.text.read_text().splitlines()[:20]]
    # Under another name the words backwards.
    text.write_text("".join(json.dumps({"text": one, "body": one[::-1]}) + "\n" for one in records))
    source, model = open_model(checkpoint), open_model(checkpoint).build()
    for arguments, windows in (
        (["--data", corpus.prefix, "--max_sequences", 7], Windows(CONTEXT, max_sequences=7)),
        (["--data", corpus.prefix, "--split", "90,10"], Windows(CONTEXT, split="90,10")),
        (["--data", corpus.prefix, "--mask_documents", "--seq_length", 16], Windows(16, mask_documents=True)),
        (["--text", text, "--mask_documents"], Windows(CONTEXT, mask_documents=True)),
        (["--text", text, "--text_key", "body"], Windows(CONTEXT, text_key="body")),
        (["--text", text, "--seq_length", 8, "--stride", 4], Windows(8, stride=4)),
    ):
        found = evaluate(run_tool, tmp_path, checkpoint, *arguments)["overall"]
        data, inputs = ([str(arguments[1])], []) if arguments[0] == "--data" else ([], [str(arguments[1])])
        (one,) = open_sets(source, data, inputs, windows)
        expected = one.evaluate(model, source.tokenizer, 8)
        assert (found["loss"], found["targets"]) == (pytest.approx(expected.mean.loss, rel=1e-9), expected.targets)
        (default,) = open_sets(source, data, inputs, Windows(CONTEXT))
        assert default.evaluate(model, source.tokenizer, 8).losses != pytest.approx(expected.losses, rel=1e-6)
    fp32 = evaluate(run_tool, tmp_path, checkpoint, "--text", text)
    bf16 = evaluate(run_tool, tmp_path, checkpoint, "--text", text, "--dtype", "bf16")
    assert bf16["arithmetic"].startswith("bf16") and bf16["overall"]["loss"] != fp32["overall"]["loss"]
    assert bf16["overall"]["loss"] == pytest.approx(fp32["overall"]["loss"], rel=0.05)


def test_tasks_to_their_end(run_tool, checkpoint, corpus, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": "the cat", "choices": [" sees", " runs"], "answer": index % 2} for index in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"task: our_task\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    ours = ["--tasks", "our_task", "--include_path", tmp_path]
    data = ["--data", corpus.prefix, "--max_sequences", 2]
    with monkeypatch.context() as patch:  # what is finished before a task fails is kept
        patch.setattr("megaslm.evaluation.HarnessTasks.run", lambda *_, **__: (_ for _ in ()).throw(UserError("no")))
        finished = run_tool("evaluate.py", "--model", checkpoint, *ours, *data, "--json", tmp_path / "out.json")
        assert finished.message() == "error: no\n" and corpus.prefix in finished.out
        assert list(json.loads((tmp_path / "out.json").read_text())["sets"]) == [corpus.prefix]
    finished = run_tool("evaluate.py", "--model", checkpoint, *ours, *data, "--json", tmp_path / "out.json")
    assert finished.code == 0, finished.err
    lines = [line.split() for line in finished.out.splitlines()]
    assert ["task", "metric", "filter", "examples", "value", "standard", "error"] in lines
    assert [line[:5] for line in lines if line[:1] == ["our_task"]] == [["our_task", "acc", "none", "0", "0.5000"]]
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["overall"]["targets"] == 2 * CONTEXT and found["tasks"]["results"]["our_task"]["acc,none"] == 0.5
    limited = evaluate(run_tool, tmp_path, checkpoint, *ours, "--limit", 1, "--num_fewshot", 2)["tasks"]
    assert limited["results"]["our_task"]["acc,none"] in (0.0, 1.0) and limited["n-shot"] == {"our_task": 2}


def test_mistakes_are_told_before_the_work(run_tool, checkpoint, corpus, monkeypatch):
    """Of the last thing that is asked for too."""
    monkeypatch.setattr(ModelSource, "build", lambda *_: pytest.fail("the model was built"))
    for arguments, says in (
        (["--data", corpus.prefix, "--text", "nowhere.txt"], "nowhere.txt"),
        (["--data", corpus.prefix, "nowhere"], "nowhere"),
        (["--data", corpus.prefix, "--tasks", "x", "--include_path", "nowhere"], "no folder nowhere"),
    ):
        assert says in run_tool("evaluate.py", "--model", checkpoint, *arguments).message()


def test_nothing_stays_behind_a_signal(checkpoint, tmp_path):
    """While a text is read, which standard input does not let end."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    tool = Path(__file__).resolve().parents[2] / "tools" / "evaluate.py"
    command = [sys.executable, tool, "--model", checkpoint, "--text", "-"]
    environment = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        while not list(folder.glob("megaslm_*/*")) and process.poll() is None:
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 130
        assert b"Traceback" not in process.stderr.read()
    assert os.listdir(folder) == []


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
        (["--tasks", ""], "the name of a task is empty"),
        (["--tasks", "a,"], "the name of a task is empty"),
        (["--text", ""], "the name of a set of data or text is empty"),
        (["--data", "{prefix}", "{prefix}"], "is given twice: {prefix}"),
        (["--data", "{prefix}", "--device", "meta"], "the device meta is not there"),
        (["--data", "{prefix}", "--json", ""], "--json : give the name of a file"),
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
    message = run_tool("evaluate.py", "--model", checkpoint, *arguments).message()
    assert says.format(prefix=corpus.prefix) in message and message.count("\n") == 1


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


def test_a_run_folder_is_its_newest_checkpoint(run_tool, checkpoint, tmp_path):
    newest = shutil.copytree(checkpoint, tmp_path / "run" / "checkpoints" / "step_00000001")
    validate(run_tool, tmp_path, tmp_path / "run")
    assert json.loads((tmp_path / "v.json").read_text())["path"] == str(newest)
    weights = bytearray((newest / "weights_00000.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "weights_00000.safetensors").write_bytes(weights)
    assert validate(run_tool, tmp_path, tmp_path / "run", code=1)["files"]["passed"] is False
    (newest / "weights_00000.safetensors").write_bytes(weights[:-4])
    checks = validate(run_tool, tmp_path, tmp_path / "run", code=1)
    assert list(checks) == ["files", "opens"] and not any(check["passed"] for check in checks.values())
    assert checks["files"]["value"].startswith("weights_00000.safetensors has ")


def test_weights_that_are_not_those_of_the_configuration(run_tool, model, tmp_path):
    changed = {"name": "tiny", "model": {**model.config.model_dump(mode="json"), "num_layers": 3}}
    checks = validate(run_tool, tmp_path, write(model, tmp_path / "c", run_config=changed), code=1)
    assert [name for name, check in checks.items() if check["passed"] is False] == [
        "parameters", "weights on disk", "opens",
    ]  # fmt: skip
    assert "decoder.blocks.2" in checks["opens"]["value"]


def test_a_model_that_computes_something_else_by_now(run_tool, model, corpus, tmp_path):
    fingerprint = take_fingerprint(model, range(16), "fp32", "cpu")
    fingerprint = dataclasses.replace(fingerprint, loss=fingerprint.loss + 0.01)
    path = write(model, tmp_path / "c", fingerprint=fingerprint)
    checks = validate(run_tool, tmp_path, path, "--tokenizer", corpus.tokenizer, code=1)
    assert [name for name, check in checks.items() if check["passed"] is False] == ["fingerprint"]
    assert "the loss in nats was" in checks["fingerprint"]["value"]


def test_a_check_that_breaks_off_is_a_row(run_tool, checkpoint, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("first line\nand much more")

    for name in ("check_fingerprint", "_random_ids", "memory_used", "standard_text"):
        monkeypatch.setattr(validation, name, broken)
    checks = validate(run_tool, tmp_path, checkpoint, code=1)
    failed = {name: check["value"] for name, check in checks.items() if check["passed"] is False}
    assert list(failed) == ["fingerprint", "generates", "perplexity", "speed", "peak memory"]
    assert set(failed.values()) == {"RuntimeError: first line"}


@pytest.mark.parametrize("alphabet", ["абвгдежз", "абвгдежз ийклмн\n"])
def test_a_tokenizer_that_refuses_the_default_text(run_tool, model, tmp_path, alphabet):
    tokenizer = character_tokenizer([alphabet], unknown="refuse")
    assert tokenizer.vocab_size <= model.config.vocab_size
    path = write(model, tmp_path / "c", tokenizer_files=tokenizer.files)
    checks = validate(run_tool, tmp_path, path)
    assert checks["generates"]["passed"] and checks["perplexity"]["passed"] is None
    assert "not measured" in checks["perplexity"]["value"] and "--text" in checks["perplexity"]["value"]


def test_samples_are_of_several_prompts_and_the_arithmetic_is_as_asked(run_tool, checkpoint, corpus, tmp_path):
    figures = {}
    for dtype in ("fp32", "bf16"):
        validate(run_tool, tmp_path, checkpoint, "--text", corpus.text, "--dtype", dtype, "--max_perplexity", 40)
        report = json.loads((tmp_path / "v.json").read_text())
        assert report["arithmetic"].startswith(dtype)
        figures[dtype] = report["figures"]
    prompts = [sample["prompt"] for sample in figures["fp32"]["samples"]]
    assert len(set(prompts)) == 4 and all(len(prompt) == 16 for prompt in prompts)
    assert figures["fp32"]["loss"] != figures["bf16"]["loss"] == pytest.approx(figures["fp32"]["loss"], rel=0.05)


def test_speed_is_tokens_by_seconds(checkpoint, monkeypatch):
    """By a clock of 2 s for the prompt, half a second for each token behind its first, and runs that are disturbed."""
    clock, runs = [100.0], []

    class Slow:
        def __init__(self, *_):
            pass

        def generate(self, prompts, options):
            runs.append((len(prompts[0]), options.max_new_tokens))
            clock[0] += 2 + 0.5 * (options.max_new_tokens - 1) + (50 if len(runs) in (2, 5) else 0)

    made = validation._Validation(open_model(checkpoint), validation.ValidationOptions(), None)
    monkeypatch.setattr(validation, "Generator", Slow)
    monkeypatch.setattr(validation.time, "perf_counter", lambda: clock[0])
    made._speed()
    assert set(runs) == {(16, 1), (16, 17)}
    assert made.figures == {"prefill_tokens_per_s": 16 / 2, "decode_tokens_per_s": 16 / (0.5 * 16)}
    made.config = made.config.model_copy(update={"context_length": 1})
    assert made._speed() == ("not measurable in a context of 1 token", None)
    assert set(made.figures.values()) == {None}


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


@pytest.fixture
def foreign(export, tmp_path) -> Path:
    """As others leave a model: without a record."""
    path = shutil.copytree(export, tmp_path / "foreign")
    (path / "megaslm_export.json").unlink()
    return path


def rewrite(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def with_buffers(tensors):
    return tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(40_000)}


def in_two_types(tensors):
    return {name: tensor if name == "lm_head.weight" else tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.mark.parametrize("change", [with_buffers, in_two_types])
def test_sound_folders_of_others(run_tool, foreign, tmp_path, change):
    rewrite(foreign, change)
    checks = validate(run_tool, tmp_path, foreign, "--quick")
    assert checks["parameters"]["passed"] and checks["weights on disk"]["passed"]


def test_a_tied_head_that_is_stored_all_the_same(run_tool, model, corpus, tmp_path):
    tied = build_model(model.config.model_copy(update={"tie_embeddings": True}), seed=1).eval()
    source = open_model(write(tied, tmp_path / "c"), corpus.tokenizer)
    path = export_checkpoint(source, tmp_path / "tied", dtype="fp32", check=False).path
    (path / "megaslm_export.json").unlink()
    rewrite(path, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    validate(run_tool, tmp_path, path, "--quick")
    assert json.loads((tmp_path / "v.json").read_text())["figures"]["parameters"] == count_parameters(tied.config)


def test_broken_folders_of_others(run_tool, foreign, tmp_path):
    whole = (foreign / "model.safetensors").read_bytes()
    (foreign / "model.safetensors").write_bytes(whole[: len(whole) * 3 // 4])
    checks = validate(run_tool, tmp_path, foreign, "--quick", code=1)
    assert not checks["weights on disk"]["passed"] and not checks["opens"]["passed"]
    (foreign / "model.safetensors").write_bytes(whole)
    rewrite(foreign, lambda tensors: {name: one for name, one in tensors.items() if "layers.1" not in name})
    checks = validate(run_tool, tmp_path, foreign, "--quick", code=1)
    assert list(checks) == ["files", "opens"] and "model.layers.1" in checks["opens"]["value"]


def test_a_tokenizer_that_stands_in(run_tool, export, corpus, tmp_path):
    """Transformers would find another one: its ids are no fault of the model."""
    character_tokenizer(["zyxw the cat"]).save(tmp_path / "other")
    checks = validate(run_tool, tmp_path, export, "--tokenizer", tmp_path / "other")
    assert checks["transformers"]["passed"]
    large = train_bpe(iter(["many words to have a vocabulary that is larger"] * 3), 300)
    large.save(tmp_path / "large")
    assert (
        "tokens and the model of" in run_tool("validate_model.py", export, "--tokenizer", tmp_path / "large").message()
    )


@pytest.mark.parametrize("change", [{"max_difference": 2e-4}, {"tokenizer_equal": False}])
def test_an_export_that_transformers_computes_otherwise(run_tool, export, tmp_path, monkeypatch, change):
    equal = validation.compare_logits
    monkeypatch.setattr(validation, "compare_logits", lambda *a, **k: dataclasses.replace(equal(*a, **k), **change))
    checks = validate(run_tool, tmp_path, export, code=1)
    assert [name for name, check in checks.items() if check["passed"] is False] == ["transformers"]


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
        (["--data", corpus.prefix, "--max_perplexity", "inf"], "max_perplexity inf: give a finite number"),
        (["--max_tokens", 0], "max_tokens 0: give 1 or more"),
        (["--device", "meta"], "the device meta is not there"),
        (["--data", corpus.prefix, corpus.prefix], "is given twice"),
        (["--data", corpus.prefix, "--max_perplexity", 0.5], "max_perplexity 0.5: give a finite number, 1 or more"),
    ):
        assert says in run_tool("validate_model.py", checkpoint, *arguments).message()
