"""tools/inspect_dataset.py, verify_dataset.py, merge_datasets.py and split_dataset.py as the user runs them."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megaslm.data import Document, TokenFile, build_token_file, train_bpe

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NAMES = ("inspect_dataset.py", "verify_dataset.py", "merge_datasets.py", "split_dataset.py")


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the quick brown fox jumps over the lazy dog\n"] * 4, vocab_size=280)


@pytest.fixture
def datasets(tokenizer, tmp_path, monkeypatch):
    """Token files `a` and `b` in the current folder, of 20 and 10 documents."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 20), ("b", 10)):
        texts = (Document(f"document {i} of {name}: the fox" + " jumps" * i, name, i + 1) for i in range(count))
        build_token_file(texts, tokenizer, name, options={"text_key": "text"})
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """run(tool, argument, ...) -> exit code, stdout and stderr of the tool in this process."""

    def in_process(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        out, err = capsys.readouterr()
        return SimpleNamespace(code=end.value.code, out=out, err=err)

    return in_process


def test_merged_split_verified_and_inspected(datasets, run):
    merged = run("merge_datasets.py", "--input", "a", "b", "--output", "all")
    assert (merged.code, merged.err) == (0, "") and "all: 30 documents" in merged.out
    split = run("split_dataset.py", "--input", "all", "--output", "parts/all", "--split", "80,10,10")
    assert split.out.splitlines()[1].startswith("parts/all_validation: 3 documents")
    sound = run("verify_dataset.py", "a", "all", "parts/all_train", "parts/all_test")
    assert sound.code == 0 and sound.out.count(": sound, hashes and tokenizer agree; ") == 4 and "MB/s" in sound.out
    shown = run("inspect_dataset.py", "parts/all_test", "--documents", 1)
    assert "document 7 of b: the fox" in shown.out and "<|endoftext|>" in shown.out
    assert "merged       a, b\n" in shown.out and "part test" in shown.out
    for tool, arguments in (
        ("merge_datasets.py", "--input a b --output all"),
        ("split_dataset.py", "--input all --output parts/all --split 80,20"),
    ):
        again = run(tool, *arguments.split())
        assert again.code == 2 and "exists and would be overwritten" in again.err
        assert run(tool, *arguments.split(), "--overwrite").code == 0


def test_inspection(datasets, run):
    found = run("inspect_dataset.py", "a", "--at", 5, "--documents", 2, "--histogram", "lengths.png")
    file = TokenFile("a")
    assert (found.code, found.err) == (0, "")
    assert f"tokens       {file.num_tokens:,} of uint16" in found.out
    assert "ends         20 x token 0" in found.out and "sources" not in found.out
    assert "options      eod_id 0, text_key text" in found.out
    assert "--- document 5," in found.out and "--- document 6," in found.out and "--- document 7," not in found.out
    assert "document 5 of a: the fox jumps jumps" in found.out
    assert f"\n   32 to  63  10  {'#' * 40}\n   64 to 127   5  {'#' * 20}\n" in found.out
    assert (datasets / "lengths.png").stat().st_size > 1000
    cut = run("inspect_dataset.py", "a", "--at", 19, "--characters", 10)
    assert cut.out.startswith("--- document 19, ") and "\ndocument 1 ...\n\ntoken file   a\n" in cut.out


def test_what_takes_long_can_be_left_out(datasets, run):
    Path("a.bin").write_bytes(bytes([255]) * Path("a.bin").stat().st_size)
    found = run("inspect_dataset.py", "a", "--no_counts", "--documents", 1)
    assert found.code == 0 and "document 0," in found.out and "<id 65535><id 65535>" in found.out
    assert "vocabulary   280 tokens" in found.out and "percentiles" in found.out and "ids used" not in found.out
    counted = run("inspect_dataset.py", "a").out
    assert "vocabulary   1 of 280 ids used (0.4 %), the largest 65,535\n" in counted


def test_json(datasets, run):
    found = json.loads(run("inspect_dataset.py", "a", "--json").out)
    assert found["documents"] == 20 and found["manifest"]["options"]["text_key"] == "text"
    assert [one["document"] for one in found["excerpts"]] == [0, 6, 13]
    assert found["lengths"]["longest"] == max(map(len, (TokenFile("a").document(i) for i in range(20))))


def test_files_without_a_manifest(datasets, run):
    Path("a.json").unlink()
    vocab_size = TokenFile("b").vocab_size
    assert "no manifest" in run("verify_dataset.py", "a", "--vocab_size", vocab_size).out
    wrong = run("verify_dataset.py", "a", "--vocab_size", 10)
    assert wrong.code == 2 and "outside the vocabulary of 10 tokens" in wrong.err
    shown = run("inspect_dataset.py", "a", "--documents", 1)
    assert shown.code == 0 and "manifest     none" in shown.out and "document 0 of" not in shown.out
    assert "document 0 of a" in run("inspect_dataset.py", "a", "--tokenizer", "b.tokenizer").out
    merged = run("merge_datasets.py", "--input", "a", "b", "--output", "all")
    assert merged.code == 0 and "a does not say which tokenizer made it: all will name none, and whether" in merged.err
    alone = run("merge_datasets.py", "--input", "a", "--output", "all", "--overwrite")
    assert alone.code == 0 and alone.err.endswith("all will name none\n")


def test_the_tokenizer_beside_the_file_is_checked(datasets, run):
    Path("a.tokenizer").rename("kept")
    gone = run("verify_dataset.py", "a")
    assert gone.code == 0 and "hashes agree, its tokenizer (a.tokenizer) is not there" in gone.out
    train_bpe(["other text entirely"] * 3, vocab_size=270).save("a.tokenizer")
    other = run("verify_dataset.py", "a")
    assert other.code == 2 and "is not the tokenizer that a was built with" in other.err


def test_a_damaged_file_is_named_and_the_others_are_checked(datasets, run):
    content = bytearray(Path("a.bin").read_bytes())
    content[5] ^= 1
    Path("a.bin").write_bytes(content)
    found = run("verify_dataset.py", "a", "absent", "b")
    assert found.code == 2 and found.out.startswith("b: sound")
    assert found.err.startswith("error: a.bin") and "absent.bin does not exist" in found.err


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("inspect_dataset.py", "absent", "token file absent.bin does not exist"),
        ("inspect_dataset.py", "a --at 20", "there is no document 20 in a"),
        ("inspect_dataset.py", "a --documents -1", "--documents -1: give 0 or more"),
        ("inspect_dataset.py", "a.bin", "PREFIX has no ending: try a\n"),
        ("inspect_dataset.py", "a --histogram absent/lengths.png", "absent/lengths.png: there is no such folder"),
        ("verify_dataset.py", "a --vocab_size -3", "--vocab_size -3: give 1 or more"),
        ("merge_datasets.py", "--input a absent --output x", "token file absent.bin does not exist"),
        ("merge_datasets.py", "--input a b --output b", "b is an input and the output"),
        ("split_dataset.py", "--input a --output x --split 100", "two or three shares above zero"),
        ("split_dataset.py", "--input a --output x --split 99,1", "validation part of split 99,1 is empty"),
        ("verify_dataset.py", "a --tokenizer ./absent", "tokenizer folder ./absent"),
    ],
)
def test_mistakes_are_one_message(datasets, run, tool, arguments, message):
    found = run(tool, *arguments.split())
    assert found.code == 2 and message in found.err and found.err.count("error: ") == found.err.count("\n") == 1
    assert not list(datasets.glob("*x_*")) + list(datasets.glob("x.*"))


@pytest.mark.parametrize("tool", NAMES)
def test_help(run, tool):
    found = run(tool, "--help")
    assert found.code == 0 and "PREFIX" in found.out
