"""tools/train_tokenizer.py and tools/preprocess_data.py as the user runs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megaslm.commands import run_command
from megaslm.data import find_tokenizer, load_tokenizer, verify
from megaslm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def run(tool: str, *arguments, cwd: Path, code: int = 0) -> str:
    """Run a tool in `cwd`, check its exit code, and return its stdout, or on failure its stderr."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr if code else result.stdout


@pytest.fixture
def workspace(tmp_path):
    lines = [{"text": f"document {i} about New York and {i * i}"} for i in range(30)] + [{"text": ""}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a note")
    (tmp_path / "notes" / "b.png").write_bytes(b"\xff")
    (tmp_path / "phrases.txt").write_text("New York\n\nabout \n")
    return tmp_path


def test_from_text_to_token_file(workspace):
    output = run(
        "train_tokenizer.py",
        *("--input", "corpus.jsonl", "notes", "--vocab_size", 280, "--keep_whole", "phrases.txt", "--output", "tok"),
        cwd=workspace,
    )
    assert "tok: bpe tokenizer of 280 tokens" in output
    tokenizer = load_tokenizer(workspace / "tok")
    assert tokenizer.encode("New York").size == 1 == tokenizer.encode("about ").size
    output = run(
        "preprocess_data.py",
        *("--input", "corpus.jsonl", "notes", "--tokenizer", "tok", "--output", "out/data", "--on_error", "skip"),
        cwd=workspace,
    )
    assert "out/data: 31 documents" in output and "bytes/token" in output and "MB/s" in output
    assert "left out 1 records, 1 of them empty" in output and "  corpus.jsonl:31: the document is empty" in output
    assert "left out 1 files" in output
    file = verify(workspace / "out" / "data")
    assert file.num_documents == 31 and file.manifest["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    shutil.rmtree(workspace / "tok")
    assert load_tokenizer(find_tokenizer(workspace / "out" / "data")).fingerprint == tokenizer.fingerprint
    assert {source["name"] for source in file.manifest["sources"]} == {"corpus.jsonl", "a.txt"}
    assert tokenizer.decode(file.document(0)) in ("a note", "document 0 about New York and 0")


def test_character_tokenizers(workspace):
    run("train_tokenizer.py", "--input", "notes/a.txt", "--type", "char", "--output", "char", cwd=workspace)
    run("train_tokenizer.py", "--type", "ascii", "--unknown", "refuse", "--output", "ascii", cwd=workspace)
    assert load_tokenizer(workspace / "char").vocab_size == len(set("a note"))
    (workspace / "u.txt").write_text("naïve")
    arguments = ("--input", "u.txt", "--tokenizer", "ascii", "--output", "u")
    error = run("preprocess_data.py", *arguments, cwd=workspace, code=2)
    assert error.startswith("error: u.txt: character 'ï' (U+00EF) at line 1, column 3") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("train_tokenizer.py", "--input absent.jsonl --output t", "error: input absent.jsonl does not exist"),
        ("train_tokenizer.py", "--input bad.jsonl --output t", "error: bad.jsonl:1: broken JSON"),
        ("train_tokenizer.py", "--input notes --vocab_size 99 --output t", "error: vocab_size 99 is too small"),
        ("train_tokenizer.py", "--input notes --keep_whole absent --output t", "error: cannot read the phrases"),
        ("preprocess_data.py", "--input notes --tokenizer ./absent --output t", "error: tokenizer folder ./absent"),
        ("preprocess_data.py", "--input notes --tokenizer notes --output t", "error: tokenizer folder notes has no"),
    ],
)
def test_mistakes_are_one_message(workspace, tool, arguments, message):
    (workspace / "bad.jsonl").write_text('{"text": \n')
    error = run(tool, *arguments.split(), cwd=workspace, code=2)
    assert error.startswith(message) and error.count("\n") == 1
    assert not (workspace / "t").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--output t", "--input is needed"),
        ("--type ascii --input notes --output t", "takes no --input"),
        ("--type char --input notes --vocab_size 300 --output t", "have no effect"),
        ("--input notes --unknown map --output t", "has no effect"),
    ],
)
def test_options_that_would_be_ignored(workspace, arguments, message):
    assert message in run("train_tokenizer.py", *arguments.split(), cwd=workspace, code=2)


def test_how_commands_end(capsys):
    def raise_(error):
        raise error

    for main, code in [
        (lambda: None, 0),
        (lambda: 3, 3),
        (lambda: raise_(UserError("mend it")), 2),
        (lambda: raise_(KeyboardInterrupt()), 130),
    ]:
        with pytest.raises(SystemExit) as left:
            run_command(main)
        assert left.value.code == code
    assert capsys.readouterr().err.splitlines() == ["error: mend it", "interrupted"]
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        run_command(lambda: 1 // 0)


def test_a_reader_that_has_seen_enough():
    """As of `| head`: no traceback."""
    script = "from megaslm.commands import run_command; run_command(lambda: print('a line\\n' * 100_000))"
    command = f"'{sys.executable}' -c \"{script}\" | head -1; exit ${{PIPESTATUS[0]}}"
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (finished.returncode, finished.stdout, finished.stderr) == (141, "a line\n", "")


@pytest.mark.parametrize("tool", ["train_tokenizer.py", "preprocess_data.py"])
def test_help(workspace, tool):
    assert "python-stdlib" in run(tool, "--help", cwd=workspace)
