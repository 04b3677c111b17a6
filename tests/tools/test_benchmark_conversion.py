"""The benchmark of the conversion, as a command: what it prints and keeps, and what it leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_conversion.py"


@pytest.mark.skipif(sys.platform != "linux", reason="empties the page cache")
def test_figures_of_a_tiny_model(preset, environment, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, TOOL, "--preset", preset, "--rounds", "1", "--directory", disk]
    command += ["--json", tmp_path / "figures.json", "model.vocab_size=64"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "copy / to fp32" in finished.stdout and "copy / to bf16" in finished.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    measured = figures["measured"]
    assert all(len(values) == 1 for part in measured.values() for values in part.values())
    assert figures["largest_tensor_bytes"] == 4 * 128 * 32
    for part, ratio in figures["copy / conversion"].items():
        assert ratio == measured["copy"]["seconds"][0] / measured[part]["seconds"][0]
        assert measured[part]["memory_bytes"][0] < 1e9
    assert list(disk.iterdir()) == [] and str(tmp_path) not in (tmp_path / "figures.json").read_text()
