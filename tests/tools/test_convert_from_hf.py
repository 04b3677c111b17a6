"""tools/convert_from_hf.py as the user runs it, and the commands that it prints."""

import json
import runpy
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from megaslm.checkpoint import open_checkpoint
from megaslm.checkpoint.huggingface import importing
from megaslm.data import train_bpe

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TEXT = "".join(f"line {i} of a text that is rather long, with some words in it\n" for i in range(20))


@pytest.fixture
def run(monkeypatch, capfd):
    """run(tool, argument, ...) -> exit code, stdout and stderr of the tool in this process."""

    def in_process(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        out, err = capfd.readouterr()
        return SimpleNamespace(code=end.value.code or 0, out=out, err=err)

    return in_process


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A folder `llama` of a model with its tokenizer, and a folder `texts`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, dtype="bfloat16",
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained("llama")
    train_bpe([TEXT], 290).save("llama")
    Path("texts").mkdir()
    for i in range(30):
        (Path("texts") / f"{i}.txt").write_text(TEXT)
    return Path("llama")


def test_the_printed_commands_continue_the_pretraining(llama, run, command, metrics):
    done = run("convert_from_hf.py", "--model", llama, "--output", "checkpoints/my model's")
    assert done.code == 0, done.err
    assert "largest difference of a logit" in done.out and "checkpoints/my model's: the checkpoint" in done.out
    preprocess, pretrain = (shlex.split(line) for line in done.out.splitlines() if line.startswith("    python "))
    assert (preprocess[1], pretrain[1]) == ("tools/preprocess_data.py", "launch/pretrain.py")
    tokenized = run("preprocess_data.py", *["texts" if word == "TEXT" else word for word in preprocess[2:]])
    assert tokenized.code == 0, tokenized.err
    finished = command(
        *pretrain[2:], "train.max_steps=3", "train.global_batch_size=4", "logging.interval=1", "optimizer.lr=1e-30",
        "schedule.warmup_steps=0", "logging.tensorboard=false",
    )  # fmt: skip
    assert finished.code == 0, finished.out + finished.err
    assert "a new run from the weights of checkpoints/my model's\n" in finished.out
    run_dir = Path("runs/my_model_s-continued")
    assert [record["step"] for record in metrics(run_dir)] == [1, 2, 3]
    # At such a rate no weight moves.
    before, after = (
        open_checkpoint("checkpoints/my model's"),
        open_checkpoint(run_dir / "checkpoints" / "step_00000003"),
    )
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.shapes)
    assert after.tokenizer().same_files(before.tokenizer())


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda folder, config: config.update(hidden_act="relu"), "llama/config.json: hidden_act is 'relu'"),
        (lambda folder, config: config.update(model_type="gemma"), "llama/config.json: model_type is 'gemma'"),
        (lambda folder, config: (folder / "model.safetensors").unlink(), "llama has no weights"),
        (lambda folder, config: Path("out").mkdir(), "out is there already"),
    ],
)
def test_a_mistake_is_one_message(llama, run, break_it, message):
    config = json.loads((llama / "config.json").read_text())
    break_it(llama, config)
    (llama / "config.json").write_text(json.dumps(config))
    before = sorted(Path().iterdir())
    done = run("convert_from_hf.py", "--model", llama, "--output", "out")
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("error: ") == 1
    assert message in done.err and sorted(Path().iterdir()) == before


@pytest.fixture
def handlers():
    """Those of this process, put back afterwards; until then, of a process that does nothing about signals."""

    def ends(number, frame):
        pytest.fail(f"signal {number} would have ended the process at once")

    numbers = [signal.SIGTERM, signal.SIGHUP]
    before = [signal.signal(number, ends) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_an_import_that_is_ended_leaves_nothing(name, llama, run, monkeypatch, handlers):
    real = importing.compare_logits

    def ended(*arguments, **options):
        assert Path(".out.import/out").is_dir()
        signal.raise_signal(getattr(signal, name))
        return real(*arguments, **options)

    monkeypatch.setattr(importing, "compare_logits", ended)
    before = sorted(Path().iterdir())
    done = run("convert_from_hf.py", "--model", llama, "--output", "out")
    assert done.code == 130 and sorted(Path().iterdir()) == before
