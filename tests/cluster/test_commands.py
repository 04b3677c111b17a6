"""The exact command and environment of each way to start, and that their words survive the shells on their way."""

import base64
import json
import os
import shlex
import subprocess
import sys

import pytest

from megaslm.cluster import (
    Node,
    decided_environment,
    describe,
    hosts_of_ranks,
    launch_in_slurm,
    launch_on_hosts,
    launch_on_node,
)
from megaslm.cluster.commands import DEFAULTS, GIVEN, encode
from megaslm.errors import UserError

NODES = [Node("one", 8), Node("two", 8)]
DECIDED = {"NCCL_DEBUG": "WARN"}


def test_what_is_decided_for_gpus_is_not_for_cpu_ranks(monkeypatch):
    """But what the user has set himself is for both. As launch/env_h200.sh leaves it."""

    def decide() -> None:
        for name, value in {DEFAULTS: " A B", GIVEN: " C", "A": "1", "B": "2", "C": "3"}.items():
            monkeypatch.setenv(name, value)

    decide()
    assert decided_environment("cuda") == {"C": "3", "A": "1", "B": "2"}
    assert os.environ["A"] == "1" and DEFAULTS not in os.environ and GIVEN not in os.environ
    decide()
    assert decided_environment("cpu") == {"C": "3", "DS_ACCELERATOR": "cpu"}
    assert "A" not in os.environ and os.environ["C"] == "3"


def test_one_node():
    launch = launch_on_node(8, "cuda", 29500, None, DECIDED)
    assert shlex.join(launch.command("launch/pretrain.py", ["--preset", "x"])) == (
        "deepspeed --log_level error --hostfile /dev/null --num_gpus 8 --master_port 29500 launch/pretrain.py "
        "--preset x"
    )
    assert (launch.environment, launch.here) == (DECIDED, 0)
    assert "--num_accelerators 2" in shlex.join(launch_on_node(2, "cpu", 29500, "4,5", DECIDED).launcher)


def test_one_node_with_some_of_its_gpus():
    """deepspeed drops CUDA_VISIBLE_DEVICES where it is given a number of GPUs."""
    launch = launch_on_node(2, "cuda", 29500, "4, 5,6", DECIDED)
    assert "--include localhost:4,5 " in shlex.join(launch.launcher)
    assert describe(launch.environment)[-1] == "unset CUDA_VISIBLE_DEVICES"
    with pytest.raises(UserError, match="GPU-8f.*nvidia-smi -L"):
        launch_on_node(1, "cuda", 29500, "GPU-8f", DECIDED)


def on_hosts(node_rank: int | None, visible: str | None = None, device: str = "cuda"):
    return launch_on_hosts("hosts", NODES, device, "one", 29500, node_rank, visible, DECIDED)


def test_nodes_without_ssh():
    launch = on_hosts(1)
    assert shlex.join(launch.launcher) == (
        "deepspeed --log_level error --hostfile hosts --master_addr one --master_port 29500 --no_ssh --node_rank 1"
    )
    assert launch.command("s.py", ['data.train=["a"]'])[-2:] == ["s.py", 'data.train=["a"]']
    assert launch.here == 1
    for rank in (-1, 2):
        with pytest.raises(UserError, match=f"--node_rank {rank}: hosts has 2 nodes, from 0 to 1"):
            on_hosts(rank)


@pytest.mark.parametrize("node_rank", [None, 0])
def test_other_gpus_than_the_first_are_refused_where_deepspeed_would_ignore_them(node_rank):
    for visible in ("4,5,6,7,0,1,2,3", "0,1", "GPU-8f"):
        with pytest.raises(UserError, match="would be ignored.*slots in hosts.*--include"):
            on_hosts(node_rank, visible)
    for visible in (None, "", "0,1,2,3,4,5,6,7", "0,1,2,3,4,5,6,7,8,9"):
        on_hosts(node_rank, visible)
    on_hosts(node_rank, "4,5", device="cpu")


def test_nodes_through_pdsh():
    """DeepSpeed passes NCCL's variables on, and not OMP_NUM_THREADS: all of ours go along, in the one word."""
    launch = on_hosts(None)
    command = launch.command("launch/pretrain.py", ["--preset", "x y"])
    assert shlex.join(command[:-1]).endswith(
        "--launcher pdsh --no_ssh_check --module --no_local_rank megaslm.cluster.remote"
    )
    assert json.loads(base64.urlsafe_b64decode(command[-1])) == [DECIDED, ["launch/pretrain.py", "--preset", "x y"]]


WORDS = [
    "train.lr=1",
    'data.train=["a", "b"]',
    "a b$HOME",
    "x `id` y",
    'back\\"x y',
    "it's",
    "%n %h",
    "",
    "ünï\tcödé\n",
]


def test_words_survive_the_shell_of_a_node(tmp_path):
    script = tmp_path / "told.py"
    script.write_text("import json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n")
    word = encode({"NCCL_DEBUG": "IN FO", "CUDA_VISIBLE_DEVICES": ""}, [str(script), *WORDS])
    shell = f"CUDA_VISIBLE_DEVICES=4 {shlex.quote(sys.executable)} -u -m megaslm.cluster.remote {word}"
    ended = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert ended.stderr == ""
    words, environment = json.loads(ended.stdout)
    assert words == WORDS
    assert environment["NCCL_DEBUG"] == "IN FO" and "CUDA_VISIBLE_DEVICES" not in environment


def test_slurm(monkeypatch):
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    launch = launch_in_slurm(["n1", "n2"], 8, "cuda", 23000, DECIDED)
    assert (launch.world_size, launch.here) == (16, 0)
    assert shlex.join(launch.command("launch/pretrain.py", ["--preset", "x"])) == (
        "srun --nodes=2 --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 "
        f"{sys.executable} -m megaslm.cluster.elastic --nnodes 2 --nproc_per_node 8 "
        "--master_addr n1 --master_port 23000 launch/pretrain.py --preset x"
    )
    assert launch.environment == DECIDED | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}


def test_the_check_is_started_as_the_training_is():
    launch = launch_in_slurm(["n1", "n2"], 2, "cuda", 23000, DECIDED)
    check = launch.check_command(["--preset", "x"], timeout=7)
    assert check[: len(launch.launcher)] == list(launch.launcher)
    end = check[len(launch.launcher) :]
    assert end[:3] == ["launch/check.py", "--device", "cuda"]
    assert end[-5:] == ["--timeout", "7", "--", "--preset", "x"]
    assert hosts_of_ranks(end[end.index("--hosts") + 1]) == ["n1", "n1", "n2", "n2"]
