"""tools/benchmark_memory.py: the formula of memory against real processes, on networks smaller than its own."""

import json
import runpy
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_memory.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/clear_refs")


def test_the_estimates_are_within_a_tenth(fork_ranks, tmp_path):
    """As a process without a launcher, which starts its ranks by itself."""
    path = tmp_path / "memory.json"
    finished = fork_ranks(TOOL, ["--quick", "--json", path], None)
    assert finished.code == 0, finished.err
    found = json.loads(path.read_text())["results"]
    assert len(found) == 2 and all(one["name"] in finished.out for one in found)
    for one in found:
        assert one["ratio"] == pytest.approx(1, abs=0.1), one["name"]
        # What the libraries take for larger products than those of the tiny network is not taken off: some 15 MB.
        assert one["estimated_held_bytes"] == pytest.approx(one["measured_held_bytes"], rel=0.1, abs=20e6), one["name"]
        # Had one of its parts been left out, it would show.
        assert max(one["parts"].values()) > 0.2 * one["estimated_bytes"]
    assert [one["moment"] for one in found] == ["reduction", "loss"]


def test_all_is_eager_as_the_formula_is():
    tool = runpy.run_path(str(TOOL))
    assert all(tool["load"](case, []).train.compile is False for case in tool["CASES"])


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("train.precision=bf16",), "this command chooses the layouts and the arithmetic by itself"),
        (("--json", "not/there/x.json"), "a folder that is there"),
        (("model.num_layers=0",), "num_layers"),
    ],
)
def test_mistakes_get_one_message(run_tool, arguments, says):
    assert says in run_tool("benchmark_memory.py", *arguments).message()
