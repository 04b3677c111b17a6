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
    assert "copy / conversion" in finished.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {part: len(values) for part, values in figures["seconds"].items()} == {"copy": 1, "conversion": 1}
    assert figures["largest_tensor_bytes"] == 4 * 128 * 32 and figures["memory_bytes"] < 1e9
    assert figures["copy / conversion"] == figures["seconds"]["copy"][0] / figures["seconds"]["conversion"][0]
    assert list(disk.iterdir()) == [] and str(tmp_path) not in (tmp_path / "figures.json").read_text()
