"""tools/inspect_checkpoint.py: fingerprints and tokenizers, and how many tensors are in memory at a time."""

import json
import runpy
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaslm.checkpoint import (
    Checkpoint,
    Fingerprint,
    Piece,
    compare_checkpoints,
    comparison,
    inspect_path,
    inspection,
    write_checkpoint,
)
from megaslm.checkpoint.fingerprint import Figures
from megaslm.checkpoint.format import read_manifest, write_manifest
from megaslm.data import character_tokenizer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "inspect_checkpoint.py"


@pytest.fixture
def tool(monkeypatch, capsys):
    """tool(argument, ...) -> (exit code, output): the tool in this process."""

    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
        return end.value.code, capsys.readouterr().out

    return run


def write(directory: Path, **changes) -> Path:
    tensors = {"weights": [Piece.whole(name, torch.arange(6.0).view(2, 3)) for name in ("a", "b", "c")]}
    return write_checkpoint(
        directory, tensors, step=3, run_config={"name": "x"}, global_state={}, optimizer=None, **changes
    )


def facts(out: str) -> dict[str, str]:
    """What is said before the table, by name."""
    return {line[:13].strip(): line[13:] for line in out.split("\n\n")[0].splitlines()}


def test_fingerprint_and_tokenizer(tmp_path, tool):
    """Shown, and compared where both have one: a fingerprint within its tolerance, a tokenizer by its files."""
    tokenizer = character_tokenizer(["abc"])
    fingerprint = Fingerprint([1, 2, 3], "fp32", 2.5, [0.5, 1.0], {"bf16": Figures(2.4, [0.5])})
    a = write(tmp_path / "a", fingerprint=fingerprint, tokenizer_files=tokenizer.files)
    said = facts(tool(a)[1])
    assert said["fingerprint"] == "loss 2.500000 nats over 3 tokens, weights in fp32 (and rounded to bf16)"
    assert said["tokenizer"] == f"{tokenizer.kind}, {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint}"
    assert said["size"].endswith(f"in {len(tokenizer.files) + 2} files of 1 rank")
    contents = json.loads(tool(a, "--json")[1])["contents"]
    assert contents["fingerprint"] == {"precision": "fp32", "loss": 2.5, "tokens": 3, "rounded": ["bf16"]}
    older = write(tmp_path / "older")
    said = facts(tool(older)[1])
    assert said["fingerprint"] == said["tokenizer"] == "-"
    assert tool(a, older)[0] == tool(older, a)[0] == 0

    elsewhere = replace(fingerprint, loss=2.500001)
    near = write(tmp_path / "near", fingerprint=elsewhere, tokenizer_files=tokenizer.files)
    code, out = tool(a, near)
    assert code == 0 and "fingerprint: equal\ntokenizer: equal" in out
    other = {**tokenizer.files, "vocab.json": "{}"}
    far = write(tmp_path / "far", fingerprint=replace(fingerprint, loss=2.6), tokenizer_files=other)
    code, out = tool(a, far)
    assert code == 1 and "fingerprint: 1 difference\n  fp32.loss: 2.5 -> 2.6\n" in out
    assert "tokenizer: 1 difference\n  tokenizer/vocab.json: " in out
    elsewhere = write(tmp_path / "elsewhere", fingerprint=replace(fingerprint, tokens=[1, 2, 4], loss=9.0))
    code, out = tool(a, elsewhere)
    assert code == 0 and "\nfingerprint: not comparable (other tokens)\n" in out
    narrow = write(tmp_path / "narrow", fingerprint=replace(fingerprint, precision="bf16", loss=2.4, rounded={}))
    assert "fingerprint: not comparable (1 logits and 2)" in tool(a, narrow)[1]
    assert json.loads(tool(a, narrow, "--json")[1])["not_comparable"] == {"fingerprint": "1 logits and 2"}
    code, out = tool(far, "--quick")
    assert code == 0, out
    (far / "tokenizer" / "tokenizer.json").write_text("{")
    code, out = tool(far)
    assert code == 1 and "tokenizer.json" in facts(out)["tokenizer"]
    assert "tokenizer/tokenizer.json has 1 bytes" in out


def test_what_can_t_be_opened_is_shown_with_the_reason(tmp_path, tool):
    path = write(tmp_path, tokenizer_files={"tokenizer.json": "{}"})
    manifest = {key: value for key, value in read_manifest(path).items() if key != "sha256"}
    write_manifest(path, manifest | {"fingerprint": {"layout": 2}})
    code, out = tool(path)
    assert code == 0 and "tokenizer" in facts(out)["tokenizer"], "the files are as they were written"
    assert facts(out)["fingerprint"].startswith("a fingerprint that this megaslm does not understand")


def test_a_table_opens_no_tokenizer(tmp_path, tool, monkeypatch):
    write(tmp_path, tokenizer_files=character_tokenizer(["abc"]).files)
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda self: 1 / 0)
    code, out = tool(tmp_path)
    assert code == 0 and "1 checkpoint" in out


def test_tensors_are_held_one_at_a_time(tmp_path, monkeypatch):
    held, most, read = [], [], inspection.read_flattened

    def watched(*arguments) -> Tensor:
        tensor = read(*arguments)
        held.append(weakref.ref(tensor))
        most.append(sum(one() is not None for one in held))
        return tensor

    for module in (inspection, comparison):
        monkeypatch.setattr(module, "read_flattened", watched)
    path = write(tmp_path)
    compare_checkpoints(path, path)
    assert len(most) == 6 and max(most) == 2
    most.clear()
    inspect_path(path, tensors=True)
    assert len(most) == 3 and max(most) == 1
