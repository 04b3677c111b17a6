"""The benchmark's sections on small files: that they run, and what they make of what they measure."""

import json
import runpy
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sections_on_small_files(tmp_path, ranks, monkeypatch, capsys):
    import megaslm.parallel

    monkeypatch.setattr(megaslm.parallel, "init_distributed", lambda: ranks)
    monkeypatch.syspath_prepend(str(TOOLS))
    sizes = ["--index_documents", "1e6", "--loader_gigabytes", "0.01", "--loader_batches", "3"]
    arguments = ["--sections", "index", "loader", "coverage", "--directory", str(tmp_path), "--json"]
    monkeypatch.setattr(sys, "argv", ["benchmark_data.py", *sizes, *arguments, str(tmp_path / "figures.json")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOLS / "benchmark_data.py"), run_name="__main__")
    report = json.loads((tmp_path / "figures.json").read_text())
    found = {section: content["figures"] for section, content in report["sections"].items()}
    assert [len(found[section]) for section in ("index", "loader", "coverage")] == [5, 6, 8]
    windows = report["sections"]["coverage"]["windows"]
    assert windows > 900 and all(
        f"{windows} of {windows} in {windows}," in row["measured"] for row in found["coverage"]
    )
    assert all(row["met"] for row in found["coverage"])
    missed = [row for rows in found.values() for row in rows if row["met"] is False]
    out = capsys.readouterr().out
    assert end.value.code == bool(missed) and out.count("MISSED") == len(missed)
    assert report["sections"]["index"]["documents"] == {"large": 10**6, "small": 1000}
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
