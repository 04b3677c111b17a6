"""train.compile: compiled losses are eager losses, and without a compiler the run says so and trains on."""

import shutil

import pytest
import torch
from layout_engines import as_run, run_config

from megaslm.model import build_model
from megaslm.training.engine import compile_blocks


@pytest.fixture
def arguments(preset) -> list:
    # One small block: a compiler takes seconds for each kernel.
    return ["--preset", preset, "train.max_steps=4", "model.num_layers=1", "model.qk_norm=false", "--run_dir"]


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler on a CPU")
def test_compiled_losses_equal_eager_ones(pretrain, command, arguments, metrics, tmp_path):
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    compiled = pretrain(*arguments, tmp_path / "run", "train.compile=true", env=cache)
    assert compiled.code == 0, compiled.err
    assert "compile every block" in compiled.out
    assert list((tmp_path / "cache").rglob("*.so")), "nothing was compiled"
    assert command(*arguments, tmp_path / "eager").code == 0
    losses = [[record["loss"] for record in metrics(tmp_path / folder)] for folder in ("run", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_blocks_with_documents_are_one_graph_each(monkeypatch):
    """Without what Inductor makes of it, which takes long: that is the same for these graphs as for any."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="eager", fullgraph=True))
    run = as_run(run_config(data={"mask_documents": True}))
    model = build_model(run.model, 0, torch.device("cpu"))
    tokens = torch.arange(32).reshape(2, 16)
    positions = torch.arange(16).remainder(7).repeat(2, 1).int()
    eager = model(tokens, tokens, positions)[0].item()
    assert compile_blocks(model, run, 2, torch.float32) is None
    assert model(tokens, tokens, positions)[0].item() == eager


def test_without_a_compiler_the_run_says_so_and_trains_on(pretrain, arguments, metrics, without_compiler, tmp_path):
    finished = pretrain(*arguments, tmp_path / "run", "train.compile=true", env=without_compiler)
    assert finished.code == 0, finished.err
    assert "compile fell back to eager: " in finished.out
    assert len(metrics(tmp_path / "run")) == 4
