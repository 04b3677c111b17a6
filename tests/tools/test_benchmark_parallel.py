"""tools/benchmark_parallel.py on a network so small that nothing of its figures is of interest."""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_parallel.py"


def test_figures_of_every_layout_are_printed_and_written(fork_ranks, tmp_path):
    """As a process without a launcher, which starts its ranks by itself. The blocks are recomputed, as in a run."""
    options = ["--quick", "--steps", 2, "--json", tmp_path / "figures.json", "train.activation_checkpointing=true"]
    finished = fork_ranks(TOOL, options, None)
    assert finished.code == 0, finished.err
    text = (tmp_path / "figures.json").read_text()
    figures = json.loads(text)
    assert str(tmp_path) not in text and figures["environment"]["torch"] in finished.out
    assert figures["environment"]["kernels"] == "reference" and "kernels reference" in finished.out
    one, zero_3, tensor = figures["results"]
    assert [r["layout"] for r in figures["results"]] == [
        "1 rank, ZeRO-1", "2 ranks, ZeRO-3", "2 ranks, ZeRO-1, TP 2, SP",
    ]  # fmt: skip
    for result in figures["results"]:
        assert result["layout"] in finished.out
        assert len(result["seconds"]) == 2 and result["ms"] == pytest.approx(500 * sum(result["seconds"]))
        assert [len(of_ranks) for of_ranks in result["cpu_seconds"]] == 2 * [result["arrangement"]["world_size"]]
        assert result["cpu_ms"] == pytest.approx(500 * sum(map(sum, result["cpu_seconds"]))) and result["host_ms"] > 0
    assert one["calls"] == 0 and {group for _, group, *_ in zero_3["traffic"]} == {"data"}
    # Of 4 micro-batches: of x for one block and its recomputation, the embedding and the head; the loss's statistics.
    kinds = {operation: calls for operation, group, calls, *_ in tensor["traffic"] if group == "tensor"}
    assert kinds["all_gather"] == 4 * (6 + 2 + 2 + 1) and kinds["reduce_scatter"] == 4 * (4 + 1 + 2)
    assert tensor["sent_bytes"] < tensor["bytes"] < 2.01 * tensor["sent_bytes"]


def test_no_layout_is_compiled_unless_all_are():
    """train.compile=auto would compile all but ZeRO-3 on a GPU."""
    load = runpy.run_path(str(TOOL))["load"]
    assert load(None, []).train.compile is False and load("megaslm_125m", []).train.compile is False
    assert load(None, ["train.compile=true"]).train.compile is True


def test_the_tables_on_paper_need_no_ranks(run_tool):
    finished = run_tool("benchmark_parallel.py", "--paper")
    assert finished.code == 0 and "**megaslm_3b**" in finished.out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--rounds", 0), "--rounds 0: give 1 or more"),
        (("--world_sizes", 2, 0), "--world_sizes 0: give 1 or more"),
        (("--world_sizes", 3), "train.global_batch_size"),
        (
            ("model.num_heads=6", "model.num_kv_heads=2", "--world_sizes", 4),
            "does not divide among 4 tensor-parallel",
        ),
        (("data.seq_length=6", "--world_sizes", 4), "data.seq_length 6 is no multiple of 4"),
        (("--json", "not/there/x.json"), "a folder that is there"),
        (("--world_sizes", 1), "one rank is what the others are compared with"),
        (("parallel.tensor_parallel_size=2",), "parallel.tensor_parallel_size=2: this command chooses the layouts"),
        (("train.precision=bf16",), "see --precision"),
        (("train.kernels=triton",), "use train.kernels=auto or reference"),
        (("--paper", "--json", "x.json", "--preset", "nosuch"), "leave out --preset, --json"),
        (("--paper", "--rounds", 0, "train.seed=1"), "leave out --rounds, train.seed=1"),
        (("--quick", "--world_sizes", 0), "--world_sizes 0: give 1 or more"),  # not its own
    ],
)
def test_mistakes(run_tool, arguments, says):
    assert says in run_tool("benchmark_parallel.py", *arguments).message()


@pytest.mark.parametrize("starting", [True, False])
def test_a_command_that_is_told_to_end_leaves_no_ranks_behind(starting, monkeypatch):
    """Also one that is told so when its ranks have been forked and it has not heard of it yet."""
    main = runpy.run_path(str(TOOL))["main"]
    start = torch.multiprocessing.start_processes

    def start_and_be_told(*arguments, **options):
        context = start(*arguments, **options)
        signal.raise_signal(signal.SIGTERM)
        return context

    def ask_to_end(job) -> None:
        if not starting and os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)

    if starting:
        monkeypatch.setattr(torch.multiprocessing, "start_processes", start_and_be_told)
    monkeypatch.setitem(main.__globals__, "measure_all", ask_to_end)
    monkeypatch.setattr(sys, "argv", ["benchmark_parallel.py", "--quick"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert multiprocessing.active_children() == [] and time.monotonic() - started < 50
