"""tools/benchmark_parallel.py on a network so small that nothing of its figures is of interest."""

import json
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_parallel.py"


def test_figures_of_every_layout_are_printed_and_written(fork_ranks, tmp_path):
    """As a process without a launcher, which starts its ranks by itself."""
    finished = fork_ranks(TOOL, ["--quick", "--json", tmp_path / "figures.json"], None)
    assert finished.code == 0, finished.err
    text = (tmp_path / "figures.json").read_text()
    figures = json.loads(text)
    assert str(tmp_path) not in text and figures["environment"]["torch"] in finished.out
    one, zero_3, tensor = figures["results"]
    assert [r["layout"] for r in figures["results"]] == [
        "1 rank, ZeRO-1", "2 ranks, ZeRO-3", "2 ranks, ZeRO-1, TP 2, SP",
    ]  # fmt: skip
    for result in figures["results"]:
        assert result["layout"] in finished.out
        assert len(result["seconds"]) == 1 and result["ms"] == 1000 * result["seconds"][0] > 0
        (of_ranks,) = result["cpu_seconds"]
        assert len(of_ranks) == result["arrangement"]["world_size"]
        assert result["cpu_ms"] == pytest.approx(1000 * sum(of_ranks)) and result["host_ms"] > 0
    assert one["calls"] == 0 and {group for _, group, *_ in zero_3["traffic"]} == {"data"}
    # Of 4 micro-batches: of x for one block, the embedding and the head, and of the loss's statistics.
    kinds = {operation: calls for operation, group, calls, *_ in tensor["traffic"] if group == "tensor"}
    assert kinds["all_gather"] == 4 * (4 + 2 + 1) and kinds["reduce_scatter"] == 4 * (4 + 2)
    assert tensor["sent_bytes"] < tensor["bytes"] < 2.01 * tensor["sent_bytes"]


def test_the_tables_on_paper_need_no_ranks(run_tool):
    finished = run_tool("benchmark_parallel.py", "--paper")
    assert finished.code == 0 and "**megaslm_3b**" in finished.out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--rounds", 0), "--rounds 0: give 1 or more"),
        (("--world_sizes", 2, 0), "--world_sizes 0: give 1 or more"),
        (("--world_sizes", 3), "train.global_batch_size"),
        (("model.num_heads=6", "model.num_kv_heads=2", "--world_sizes", 4), "6 attention heads do not divide among 4"),
        (("data.seq_length=6", "--world_sizes", 4), "data.seq_length 6 is no multiple of 4"),
        (("--json", "not/there/x.json"), "a folder that is there"),
    ],
)
def test_mistakes(run_tool, arguments, says):
    assert says in run_tool("benchmark_parallel.py", *arguments).message()
