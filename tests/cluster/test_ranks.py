"""launch/check.py as two ranks, each a node of its own: what they say where all is well, and every fault."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("ranks_worker.py")
CHECK = Path(__file__).resolve().parents[2] / "launch" / "check.py"
TWO_NODES, ONE_NODE = '{"one":1,"two":1}', '{"one":2}'


@pytest.fixture(scope="module")
def check(fork_ranks, preset, corpus, tmp_path_factory):
    """check(fault, argument, ..., hosts=, timeout=) -> Finished"""
    folder = tmp_path_factory.mktemp("check")

    def run(fault, *arguments, hosts=TWO_NODES, timeout=30):
        options = ["--device", "cpu", "--hosts", hosts, "--timeout", timeout, "--"]
        command = [*options, "--preset", preset, "--run_dir", folder / "run", *arguments]
        return fork_ranks(WORKER, [fault, os.path.dirname(corpus.prefix), *command], 2)

    run.folder = folder
    return run


def test_two_nodes_that_are_alike(check):
    finished = check("none")
    assert finished.code == 0, finished.err
    lines = re.findall(r"^  ok +(\S+(?: \S+)?)  ", finished.out, re.MULTILINE)
    assert lines == ["settings", "code", "versions", "data", "run folder", "disk", "host memory", "all-reduce"]
    assert re.search(r"all-reduce +[\d.]+ GB/s of bus bandwidth across nodes", finished.out)
    assert list(check.folder.iterdir()) == [], "nothing is left of the look at the run folder"


def test_two_ranks_of_one_node(check):
    finished = check("none", hosts=ONE_NODE)
    assert finished.code == 0, finished.err
    assert "bus bandwidth within a node" in finished.out and "across nodes" not in finished.out


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("command", ["settings: the commands differ in train.max_steps: 20 on one, 7 on two"]),
        ("engine", ["settings: the commands differ in --ds_config zero_optimization.stage: 1 on one, 2 on two"]),
        ("code", ["code: two and one differ in megaslm/data/order.py"]),
        ("data", ["data: two: ", "tokens", "does not exist"]),
        ("blind", ["run folder: ", "is not what two sees", "--run_dir"]),
        ("sums", ["all-reduce: wrong sums on two"]),
    ],
)
def test_what_one_node_has_otherwise(check, corpus, fault, words):
    # A name that the first node's folder leads to, and the second's does not.
    data = [f"data.train={os.path.basename(corpus.prefix)}"] if fault == "data" else []
    finished = check(fault, *data)
    assert finished.code == 2 and "Traceback" not in finished.err
    (message,) = {line for line in finished.err.splitlines() if line.startswith("error: ")}
    assert [word for word in words if word not in message] == []
    assert len(re.findall(r"^  fault ", finished.out, re.MULTILINE)) == 1


def test_a_run_folder_that_cannot_be_is_one_fault(check, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, words in ((tmp_path / "file", "file is a file"), ("/proc/nope", "/proc can't be written")):
        finished = check("none", "--run_dir", folder, hosts=ONE_NODE)
        assert finished.code == 2 and "error: run folder: " in finished.err and words in finished.err
        assert len(re.findall(r"^  fault ", finished.out, re.MULTILINE)) == 1


def test_a_rank_that_cannot_reach_the_first_says_it_in_one_line(environment, preset):
    """A name that does not resolve: torch's store would add a screen of C++ frames."""
    address = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}
    command = [sys.executable, CHECK, "--device", "cpu", "--hosts", TWO_NODES, "--timeout", "1", "--"]
    ended = subprocess.run([*command, "--preset", preset], env=environment | address, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: rank 1 on two can't reach rank 0 at nowhere.invalid:1 within 1 s: is one ")
    assert ended.stderr.count("\n") == 1


def test_a_disk_that_is_too_small(check):
    """A model of 100 GB of parameters."""
    finished = check("none", "model.num_layers=1000", "model.ffn_hidden_size=100000", "model.num_kv_heads=4")
    assert finished.code == 2
    assert re.search(r"error: disk: .* free in .*, and 2 checkpoints of .* planned", finished.err)


def test_a_rank_that_does_not_come_is_named_with_its_machine(check):
    finished = check("absent", timeout=2)
    assert finished.code == 2
    assert "error: rank 1 (two) did not answer within 2 s" in finished.err


def test_a_rank_that_hangs_later_is_named_with_its_machine(check):
    finished = check("hangs", timeout=3)
    assert finished.code == 2
    assert "error: the all-reduce did not end within 3 s on one; rank 1 (two) never began it" in finished.err
