"""tools/preprocess_data.py as a process: killed, continued, fed through a pipe; and its messages in this one."""

import gzip
import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megaslm.data import TokenFile, load_tokenizer, train_bpe, verify
from megaslm.data.sources import source

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
SAMPLE = "The quick brown fox jumps over the lazy dog; it's 12345 o'clock in New York. Zwölf Boxkämpfer jagen Viktor. "
# The command with units so small that a small input has many.
SMALL_UNITS = f"""
import runpy, sys
from megaslm.data.sources import source
if __name__ == "__main__":
    source.UNIT_BYTES = 10_000
    runpy.run_path({str(TOOL)!r}, run_name="__main__")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_bpe([SAMPLE] * 9, 300).save("tok")
    lines = [json.dumps({"q": f"what is {i}?", "text": f"{i}: {SAMPLE * 4}"}) + "\n" for i in range(6000)]
    Path("x.jsonl").write_text("".join(lines))
    Path("small.jsonl").write_text("".join(lines[:50]))
    Path("small_units.py").write_text(SMALL_UNITS)
    return tmp_path


@pytest.fixture
def tool(monkeypatch, capfd):
    """tool(argument, ...) -> (exit code, stdout, stderr) of the command in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), "--tokenizer", "tok", *map(str, arguments)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
        return (end.value.code or 0, *capfd.readouterr())

    return run


def test_killed_and_continued(folder, start, tool, monkeypatch):
    assert tool("--input", "x.jsonl", "--output", "whole/x")[0] == 0
    arguments = ("--input", folder / "x.jsonl", "--tokenizer", folder / "tok", "--output", folder / "x")
    journal = folder / "x.work" / "journal.jsonl"
    for end in (signal.SIGKILL, signal.SIGTERM):
        before = journal.stat().st_size if journal.exists() else 0
        process = start(*arguments, "--workers", 2, script=folder / "small_units.py")
        while not journal.exists() or journal.stat().st_size < before + 20_000:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        process.send_signal(end)
        out, err = process.communicate(timeout=30)
        assert "Traceback" not in err
        if end == signal.SIGTERM:
            assert process.returncode == 130 and "the same command goes on from here" in err
        assert psutil.wait_procs(workers, timeout=5)[1] == []  # none outlives the one that started it
    monkeypatch.setattr(source, "UNIT_BYTES", 10_000)
    code, out, err = tool(*arguments)
    assert code == 0 and f"going on from {folder / 'x.work'}" in out, err
    for ending in (".bin", ".idx", ".json"):
        assert (folder / f"x{ending}").read_bytes() == (folder / "whole" / f"x{ending}").read_bytes()
    assert not (folder / "x.work").exists() and verify(folder / "x").num_documents == 6000


def test_standard_input(folder, tool):
    command = [sys.executable, TOOL, "--input", "-", "--tokenizer", "tok", "--output", "piped"]
    data = (folder / "small.jsonl").read_bytes()
    finished = subprocess.run([*command, "--min_chars", "5"], input=data, capture_output=True, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    (folder / "small.jsonl.gz").write_bytes(gzip.compress(data))
    assert tool("--input", "small.jsonl.gz", "--output", "zipped", "--min_chars", 5)[0] == 0
    assert (folder / "piped.bin").read_bytes() == (folder / "zipped.bin").read_bytes()
    finished = subprocess.run(command, input=data[:-20], capture_output=True, cwd=folder, text=False)
    assert finished.returncode == 2 and b"piped exists and is of another build" in finished.stderr


def test_several_outputs_of_a_template(folder, tool):
    code, out, _ = tool(
        *("--input", "small.jsonl", "--format", r"Q: {q}\nA: {text}", "--output", "qa", "--split", "80,10,10"),
        *("--dedup", "--shuffle", 5, "--pack", 64, "--encoder", "huggingface"),
    )
    assert code == 0 and "encoder: huggingface" in out
    for part in ("train", "validation", "test"):
        file = TokenFile(f"qa_{part}")
        assert f"qa_{part}: {file.num_documents:,} documents" in out and "bins of 65 tokens" in out
    tokens = TokenFile("qa_train").document(0)
    assert load_tokenizer("tok").decode(tokens).startswith("Q: what is ")
    assert "\nA: " in load_tokenizer("tok").decode(tokens)


def test_what_it_says(folder, tool):
    (folder / "small.jsonl").write_text("".join(f'{{"text": "{"a b " * n}"}}\n' for n in range(1, 30)) + "[]\n")
    code, _, err = tool("--input", "small.jsonl", "--output", "x")
    assert code == 2 and err.startswith("error: small.jsonl:30: ") and err.count("\n") == 1
    code, out, _ = tool("--input", "small.jsonl", "--output", "x", "--on_error", "skip", "--max_chars", 40)
    assert code == 0 and "left out 19 documents for their length" in out and "  small.jsonl:30: " in out
    assert "x: 10 documents" in out and "MB/s" in out
    code, out, _ = tool("--input", "small.jsonl", "--output", "x", "--on_error", "skip", "--max_chars", 40)
    assert code == 0 and "nothing to do" in out
    (folder / "x.skipped.jsonl").unlink()
    code, out, _ = tool("--input", "small.jsonl", "--output", "x", "--on_error", "skip", "--max_chars", 40)
    assert code == 0 and "x.skipped.jsonl, the list of the records that were left out, cannot be read" in out
    for size in ("nan", "inf", "-1"):
        code, _, err = tool("--input", "small.jsonl", "--output", "y", "--max_document_mb", size)
        assert code == 2 and "is no size of a document" in err and err.count("\n") == 1
    code, _, err = tool("--input", "small.jsonl", "--output", "x", "--no_eod")
    assert code == 2 and "--overwrite" in err
    code, _, err = tool("--input", "small.jsonl", "--output", "y", "--max_document_mb", 0.00001, "--on_error", "skip")
    assert code == 2 and "there are no documents" in err and not list(folder.glob("y*"))
