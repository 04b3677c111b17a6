"""The card of an export: its snippet runs, and what it says is so."""

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megaslm.checkpoint import Piece, export_checkpoint, open_model, write_checkpoint
from megaslm.config import ModelConfig
from megaslm.data import train_bpe
from megaslm.model import build_model

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["Once upon a time the quick brown fox jumps over the lazy dog\n"] * 4, vocab_size=280)


@pytest.fixture
def export(tokenizer, tmp_path):
    """export(...) -> the card of an export of a tiny llama; see `write_checkpoint` for the options."""

    def run(step=3, without_tokenizer=False, run_config=None, **global_state) -> tuple[Path, str]:
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size,
            **{"context_length": 40, "num_layers": 1, "hidden_size": 32, "num_heads": 2, "ffn_hidden_size": 48},
            **{"rope_scaling": "yarn", "rope_scaling_factor": 4.0},
        )
        weights = [Piece.whole(name, tensor.detach()) for name, tensor in build_model(config, 1).named_parameters()]
        checkpoint = write_checkpoint(
            tmp_path / "checkpoints",
            {"weights": weights},
            step=step,
            run_config={"model": config.model_dump(mode="json"), **(run_config or {})},
            global_state=global_state,
            optimizer=None,
            tokenizer_files=tokenizer.files,
            marks={"validation_loss": 2.25, "epoch": None},
        )
        options = {"without_tokenizer": without_tokenizer, "report": lambda line: None}
        export_checkpoint(open_model(checkpoint), tmp_path / "out", **options)
        return tmp_path / "out", (tmp_path / "out" / "README.md").read_text()

    return run


@pytest.mark.parametrize("without_tokenizer", [False, True])
def test_the_snippet_runs(export, without_tokenizer):
    folder, card = export(without_tokenizer=without_tokenizer)
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "max_new_tokens=20" in snippet  # half of the context
    torch.manual_seed(0)
    printed = io.StringIO()
    with contextlib.chdir(folder.parent), contextlib.redirect_stdout(printed):
        exec(snippet, {})
    assert printed.getvalue().startswith("tensor([[" if without_tokenizer else "Once")


def test_facts(export):
    progress = {"tokens": 5000, "best_loss": 2.125, "best_step": 2}
    run = {"name": "fox", "data": {"train": [{"prefix": "/a/folder/foxes"}]}}
    _, card = export(run_config=run, progress=progress)
    assert "# fox\n" in card and "pretrained with megaslm" in card and "base_model" not in card
    for fact in (
        "| positions | rotary, theta 10000, yarn scaling by 4 from 10 tokens |",
        "| norm | rmsnorm, epsilon 1e-05 |",
        "| biases | none |",
        "| validation loss | 2.2500 nats per token |",
        "| best validation loss | 2.1250 nats per token, of step 2 |",
        "| data | foxes |",
        "| run | fox |",
    ):
        assert fact in card, fact
    assert "from weights rounded to bf16" in card
    assert re.search(r'Made from: `{"run": "fox", "step": 3, "manifest_sha256": "\w{64}"}`', card)


def test_an_import_names_its_model(export):
    _, card = export(step=0, imported_from={"name": "someone/llama", "dtype": "bf16"})
    assert "made from someone/llama with" in card and "\nbase_model: someone/llama\n" in card
    assert "# out\n" in card and "## Training" not in card  # without a name


@pytest.mark.parametrize("imported", ["someone/llama", None])
def test_continued_pretraining_names_where_it_began(export, imported):
    given = {"run": "first", "step": 1200, "imported_from": imported}
    _, card = export(progress={"weights_from": given})
    start = imported or "step 1,200 of first"
    assert f"whose training was continued from {start} with" in card and "pretrained with" not in card
    assert ("base_model: someone/llama" in card) == bool(imported)


def test_an_export_of_an_export(export, tmp_path):
    folder, _ = export()
    export_checkpoint(replace(open_model(folder)), tmp_path / "again", name="me/fox", report=lambda line: None)
    card = (tmp_path / "again" / "README.md").read_text()
    assert "# me/fox\n" in card and "made from out with" in card and 'from_pretrained("me/fox"' in card
