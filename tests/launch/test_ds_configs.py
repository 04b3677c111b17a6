"""Every engine config of ds_configs/ trains on two CPU ranks, on a machine that has no compiler."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "ds_configs").glob("*.json"))
CASES = [(path.stem, "fp32") for path in FILES] + [(path.stem, "bf16") for path in FILES if path.stem != "zero0"]
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "clang++", "nvcc", "icpx", "ninja")


@pytest.fixture(scope="module")
def runs(preset, pretrain_in_turn, without_compiler, tmp_path_factory):
    """Run folders by (file, precision), and how the command ended; one start of two ranks for all."""
    assert [name for name in COMPILERS if shutil.which(name, path=without_compiler["PATH"])] == []
    folders = {case: tmp_path_factory.mktemp("engine") / "run" for case in CASES}
    commands = []
    for (name, precision), folder in folders.items():
        engine = ["--ds_config", ROOT / "ds_configs" / f"{name}.json", f"train.precision={precision}"]
        commands.append({"arguments": ["--preset", preset, *engine, "--run_dir", folder]})
    finished = pretrain_in_turn(commands, 2, env=without_compiler)
    return folders, finished


def test_there_are_configs_for_every_stage_and_for_offload():
    assert {path.stem for path in FILES} == {"zero0", "zero1", "zero2", "zero3", "zero3_offload"}


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_it_trains_on_two_ranks(runs, metrics, name, precision):
    records = metrics(runs[0][name, precision])
    assert len(records) == 20
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_every_stage_learns_alike(runs, metrics, name, precision):
    """fp32 to rounding; bf16 to what 8 bits of mantissa leave."""
    reference = metrics(runs[0]["zero1", precision])
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    losses = [record["loss"] for record in metrics(runs[0][name, precision])]
    assert losses == pytest.approx([record["loss"] for record in reference], rel=tolerance)


def test_nothing_was_compiled_and_no_rank_said_more_than_the_first(runs, without_compiler):
    _, finished = runs
    for key in ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert [path for path in Path(without_compiler[key]).rglob("*") if path.is_file()] == []
    assert [line for line in finished.err.splitlines() if not re.match(r"\[\d{4}-", line)] == []
    assert finished.out.count("tiny\n") == len(CASES)
