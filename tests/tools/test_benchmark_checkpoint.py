"""The benchmark of saves, as a command: what it prints and keeps, and what it leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_checkpoint.py"


def test_figures_of_a_tiny_model(preset, environment, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, TOOL, "--preset", preset, "--rounds", "2", "--directory", disk]
    command += ["--json", tmp_path / "figures.json", "model.vocab_size=64"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "disk copy / save at once" in finished.stdout and "warning" not in finished.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["seconds"]) == {"clone", "held", "written", "disk copy", "save at once"}
    assert all(len(values) == 2 and min(values) > 0 for values in figures["seconds"].values())
    assert list(disk.iterdir()) == []
