"""train.compile: compiled losses are eager losses, and without a compiler the run says so and trains on."""

import json
import shutil

import pytest
import torch
from layout_engines import as_run, run_config
from torch._dynamo.utils import counters

from megaslm.config import compiles, load_run_config
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


@pytest.mark.parametrize("num_layers", [3, 5])
def test_all_blocks_share_their_graphs(num_layers):
    """One for the first block, which gets one term of the residual stream, and one for all others, which get two."""
    run = as_run(run_config(model={"num_layers": num_layers}))
    model = build_model(run.model, 0, torch.device("cpu"))
    torch.compiler.reset()
    counters.clear()
    for block in model.decoder.blocks:
        block.compile(backend="eager", fullgraph=True)
    tokens = torch.arange(32).reshape(2, 16)
    for _ in range(2):
        model(tokens, tokens)[0].backward()
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    ("setting", "on_gpu", "stage", "expected"),
    [
        ("auto", False, 1, False),
        ("auto", True, 0, True),
        ("auto", True, 2, True),
        ("auto", True, 3, False),
        (True, False, 3, True),
        (False, True, 1, False),
    ],
)
def test_auto_compiles_on_gpus_below_zero_3(preset, setting, on_gpu, stage, expected):
    run = load_run_config(preset, [f"train.compile={str(setting).lower()}"])
    assert compiles(run.train.compile, on_gpu, stage) is expected


def test_auto_is_the_default_and_off_on_a_cpu(command, preset, metrics, tmp_path):
    finished = command("--preset", preset, "--run_dir", tmp_path, "train.max_steps=1")
    assert "compile off, attention auto" in finished.out, finished.err
    environment = json.loads((tmp_path / "environment.json").read_text())
    expected = {"compile": "off", "attention": "auto", "float8": "off", "cuda_graphs": False}
    assert {key: environment[key] for key in expected} == expected


def test_without_a_compiler_the_run_says_so_and_trains_on(pretrain, arguments, metrics, without_compiler, tmp_path):
    finished = pretrain(*arguments, tmp_path / "run", "train.compile=true", env=without_compiler)
    assert finished.code == 0, finished.err
    assert "compile fell back to eager: " in finished.out
    assert len(metrics(tmp_path / "run")) == 4
