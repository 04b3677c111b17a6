"""launch/node.sh, cluster.sh and slurm.sbatch as a user starts them, on one machine without a GPU.

Two "nodes" are two launchers, the cluster's commands (ssh, pdsh, srun, scontrol) are stubs.
"""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megaslm.cluster import Node, read_hostfile

ROOT = Path(__file__).resolve().parents[2]
STEPS, SEEN = 60, 10
KEYS = ("step", "loss", "grad_norm", "lr")


@pytest.fixture(scope="module")
def shell(environment):
    """shell(script, argument, ..., env=) -> Popen with text pipes, in a process group of its own.

    env: variables beside those of the tests; None takes one away.
    """
    started = []
    paths = os.pathsep.join((str(Path(sys.executable).parent), environment["PATH"]))

    def start(script, *arguments, env=None):
        variables = environment | {"PATH": paths, "USER": "me"} | (env or {})
        process = subprocess.Popen(
            ["bash", str(ROOT / "launch" / script), *map(str, arguments)],
            env={name: value for name, value in variables.items() if value is not None},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=ROOT,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def finished(shell):
    """finished(script, argument, ...) -> (exit code, stdout, stderr)"""

    def run(*arguments, **options):
        process = shell(*arguments, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return run


@pytest.fixture
def hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    return path


@pytest.fixture
def stubs(tmp_path):
    """stubs(name=script, ...) -> environment in whose PATH these commands come first."""

    def make(**scripts) -> dict[str, str]:
        folder = tmp_path / "stubs"
        folder.mkdir(exist_ok=True)
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
            (folder / name).chmod(0o755)
        found = (str(folder), str(Path(sys.executable).parent), os.environ["PATH"])
        return {"PATH": os.pathsep.join(found)}

    return make


# --- what would be started ----------------------------------------------------------------------------------------

NODE = """
deepspeed --log_level error --hostfile /dev/null --num_gpus 8 --master_port 29500{silent} launch/{script}
 --preset slm_tiny train.max_steps=3
"""
CLUSTER = """
deepspeed --log_level error --hostfile HOSTFILE --master_addr 127.0.0.1 --master_port 29500
 --no_ssh --node_rank 1{silent} launch/{script} --preset slm_tiny train.max_steps=3
"""
SLURM = """
srun --nodes=1 --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 PYTHON -m megaslm.cluster.elastic
 --nnodes 1 --nproc_per_node 8 --master_addr HOST --master_port 20000 launch/{script}
 --preset slm_tiny train.max_steps=3
"""
CHECKS = {
    NODE: """check.py --device cuda --hosts '{"localhost":8}' --timeout 300 --""",
    CLUSTER: """check.py --device cuda --hosts '{"127.0.0.1":1,"localhost":1}' --timeout 300 --""",
    SLURM: """check.py --device cuda --hosts '{"HOST":8}' --timeout 300 --""",
}
ENVIRONMENT = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "OMP_NUM_THREADS": "8",
    "TRITON_CACHE_DIR": "/tmp/megaslm_me/triton",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/megaslm_me/inductor",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    "DEEPSPEED_TIMEOUT": "30",
    "NCCL_DEBUG": "INFO",  # the user's own
    "TORCH_CUDA_ARCH_LIST": "9.0",
}


@pytest.mark.parametrize(
    ("script", "golden", "options"),
    [
        ("node.sh", NODE, ["--gpus", "8"]),
        ("cluster.sh", CLUSTER, ["--hostfile", "HOSTFILE", "--node_rank", "1"]),
        ("slurm.sbatch", SLURM, ["--gpus", "8"]),
    ],
)
def test_a_dry_run_prints_the_environment_and_the_commands(finished, hostfile, script, golden, options):
    options = [hostfile if option == "HOSTFILE" else option for option in options]
    env = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "8"}
    # torch sets some of the others when it compiles, as another test of this process may have let it.
    clean = dict.fromkeys(ENVIRONMENT) | env
    code, out, err = finished(script, *options, "--dry_run", "--preset", "slm_tiny", "train.max_steps=3", env=clean)
    assert (code, err) == (0, "")
    for path, name in (
        (str(hostfile), "HOSTFILE"),
        (sys.executable, "PYTHON"),
        (str(ROOT / ".venv" / "bin" / "python"), "PYTHON"),
        (socket.gethostname(), "HOST"),
    ):
        out = re.sub(rf"(?<![\w.]){re.escape(path)}(?!\w)", name, out)
    *exports, check, training = out.splitlines()
    expected = ENVIRONMENT | ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"} if golden is SLURM else {})
    # Those that were set already, then those that are set here.
    given = [name for name in ENVIRONMENT if name in env]
    names = [*given, *(name for name in expected if name not in given)]
    assert exports == [f"export {name}={expected[name]}" for name in names]
    joined = golden.strip().replace("\n", "")
    silent = "" if golden is SLURM else " --log_level critical"
    assert training == joined.format(script="pretrain.py", silent="")
    assert check == joined.format(script=CHECKS[golden], silent=silent)


def test_cpu_ranks_go_without_the_defaults_for_gpus(finished):
    code, out, err = finished("node.sh", "--cpu_ranks", 2, "--dry_run", env={"NCCL_DEBUG": "INFO"})
    assert (code, err) == (0, "")
    exports = [line for line in out.splitlines() if line.startswith("export ")]
    assert "export OMP_NUM_THREADS=8" not in exports
    assert {"export DS_ACCELERATOR=cpu", "export NCCL_DEBUG=INFO"} <= set(exports)


# --- several nodes through pdsh --------------------------------------------------------------------------------------


def test_what_pdsh_is_told_to_run_and_how_it_is_ended(shell, hostfile, tmp_path, stubs):
    """Through deepspeed's own front end: one command for all nodes, which a shell there splits into the right words.
    SIGTERM during the checks reaches the nodes, by pkill, and no training is started."""
    pdsh = f"""case "$*" in
        *pkill*) printf "%s\\n" "$@" >"{tmp_path}/pkill" ;;
        *) printf "%s\\n" "$@" >"{tmp_path}/now"; mv "{tmp_path}/now" "{tmp_path}/seen"; exec sleep 60 ;;
    esac"""
    env = stubs(ssh="exit 0", pdsh=pdsh)
    arguments = ["--preset", "slm_tiny", 'data.train=["a b$HOME", "b"]']
    process = shell("cluster.sh", "--hostfile", hostfile, "--cpu", *arguments, env=env)
    wait_for((tmp_path / "seen").exists)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert "pkill -f" in (tmp_path / "pkill").read_text()

    words = (tmp_path / "seen").read_text().splitlines()
    assert words[words.index("-w") + 1] == ",".join(node.host for node in read_hostfile(hostfile))
    remote = " ".join(words[words.index("-w") + 2 :])
    assert "--node_rank=%n --master_addr=127.0.0.1" in remote
    command = remote[remote.index(" -m ") + 1 :]
    printed = subprocess.run(["bash", "-c", 'printf "%s\n" ' + command], capture_output=True, text=True)
    *_, module, word = printed.stdout.splitlines()
    assert module == "megaslm.cluster.remote"
    environment, told = json.loads(base64.urlsafe_b64decode(word))
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert told[0] == "launch/check.py" and told[-len(arguments) :] == arguments


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- two nodes ------------------------------------------------------------------------------------------------------


def run_nodes(shell, arguments: list, stop=None) -> list[tuple[int, str, str]]:
    """(exit code, out, err) of cluster.sh on both nodes; stop(processes) when the first one has printed step SEEN."""
    nodes = [shell("cluster.sh", "--node_rank", rank, *arguments) for rank in (0, 1)]
    ended = {}

    def read(rank: int) -> None:
        out = []
        for line in nodes[rank].stdout:
            out.append(line)
            if stop is not None and line.startswith(f"step {SEEN:>2}/{STEPS}"):
                stop(nodes)
        err = nodes[rank].stderr.read()
        ended[rank] = nodes[rank].wait(timeout=60), "".join(out), err

    readers = [threading.Thread(target=read, args=(rank,)) for rank in (0, 1)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=200)
    return [ended[0], ended[1]]


def test_two_nodes_train_stop_and_resume(shell, pretrain_in_turn, preset, hostfile, free_port, metrics, tmp_path):
    """Stopped by a SIGTERM to the command on one of them; resumed, the numbers are those of a run that was not."""
    arguments = ["--preset", preset, f"train.max_steps={STEPS}", "--ds_config", ROOT / "ds_configs" / "zero1.json"]
    start = ["--hostfile", hostfile, "--cpu"]
    run = [*arguments, "--run_dir", tmp_path / "run"]

    first, second = run_nodes(
        shell,
        [*start, "--master_port", free_port(), *run],
        stop=lambda nodes: os.kill(nodes[1].pid, signal.SIGTERM),
    )
    assert re.search(r"  ok +all-reduce +[\d.]+ GB/s of bus bandwidth across nodes", first[1]), first
    stopped = re.search(rf"stopped by launcher gone at step (\d+) of {STEPS}; the same command continues", first[1])
    assert stopped and first[0] == 0, first
    assert SEEN <= int(stopped[1]) < STEPS

    first, second = run_nodes(shell, [*start, "--skip_checks", "--master_port", free_port(), *run])
    assert (first[0], second[0]) == (0, 0), first
    assert f"at step {stopped[1]}" in first[1] and f"{STEPS} of {STEPS} (end of the run)" in first[1]

    pretrain_in_turn([{"arguments": [*arguments, "--run_dir", tmp_path / "whole"]}], 2)
    cut, whole = ([[r[key] for key in KEYS] for r in metrics(tmp_path / name)] for name in ("run", "whole"))
    assert cut == whole and len(whole) == STEPS


def test_a_signal_during_the_checks_ends_all_of_them(shell, hostfile, free_port):
    """The first of two nodes, which waits for the second: launcher and rank are gone with the command."""
    port = free_port()
    process = shell("cluster.sh", "--hostfile", hostfile, "--cpu", "--node_rank", 0, "--master_port", port)

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(listens)
    os.kill(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert out == "checks of 2 ranks: 1 on 127.0.0.1, 1 on localhost\n"
    assert not listens()


# --- Slurm ----------------------------------------------------------------------------------------------------------

# A step with a task for every node. As Slurm's: a SIGTERM to srun kills all of its processes by SIGKILL, and so does a
# task that fails; a signal from scancel goes to the tasks alone, which are torchrun.
SRUN = """
while [ "${1#--}" != "$1" ]; do case "$1" in --nodes=*) nodes="${1#*=}" ;; esac; shift; done
tasks=()
end() {
    for task in "${tasks[@]}"; do
        kill -KILL $(cat "/proc/$task/task/$task/children" 2>/dev/null) "$task" 2>/dev/null
    done
}
trap end TERM
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
echo "${tasks[@]}" >"$TASKS"
code=0
for task in "${tasks[@]}"; do
    wait -n; one=$?
    if [ "$one" -ne 0 ] && [ "$code" -eq 0 ]; then code=$one; end; fi
done
exit $code
"""
SCANCEL = """
[ "$*" = "--signal=TERM 4711" ] || exit 1
kill -TERM $(cat "$TASKS")
"""


def test_a_slurm_job_on_two_nodes_is_queued_again_ahead_of_its_limit(
    shell, stubs, preset, free_port, metrics, tmp_path
):
    """Checks, training, USR1, a checkpoint, requeue; the second start continues, ends, and is not queued again."""
    scontrol = f"""case "$1" in
        show) printf "%s\\n" ${{3//,/ }} ;;
        *) echo "$*" >>"{tmp_path}/requeued" ;;
    esac"""
    env = stubs(srun=SRUN, scancel=SCANCEL, scontrol=scontrol) | {"TASKS": str(tmp_path / "tasks")}
    env |= {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "localhost,127.0.0.1", "SLURM_SUBMIT_DIR": str(ROOT)}
    run = ["--cpu_ranks", 1, "--preset", preset, "--run_dir", tmp_path / "run"]
    run.append(f"train.max_steps={STEPS}")

    process = shell("slurm.sbatch", *run, "--master_port", free_port(), env=env)
    out = []
    for line in process.stdout:
        out.append(line)
        if line.startswith(f"step  1/{STEPS}"):
            os.kill(process.pid, signal.SIGUSR1)
    err = process.stderr.read()
    code = process.wait(timeout=60)
    text = "".join(out)
    assert re.search(r"  ok +all-reduce +[\d.]+ GB/s of bus bandwidth across nodes", text), f"{text}\n{err}"
    stopped = re.search(rf"stopped by SIGTERM at step (\d+) of {STEPS}", text)
    assert stopped, f"{text}\n{err}"
    assert code not in (0, 2) and (tmp_path / "requeued").read_text() == "requeue 4711\n"
    assert "ahead of the job's limit; job 4711 is queued again" in text

    env["SLURM_JOB_NODELIST"] = "localhost"  # it may be given other nodes
    process = shell("slurm.sbatch", *run, "--skip_checks", "--master_port", free_port(), env=env)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert f"at step {stopped[1]}" in out and f"{STEPS} of {STEPS} (end of the run)" in out
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n", "a run that has ended is not queued again"


def test_nodes_of_a_hostfile_are_those_of_the_launcher(hostfile):
    """Ours and DeepSpeed's reading of the same file."""
    from deepspeed.launcher.runner import fetch_hostfile

    assert [Node(*item) for item in fetch_hostfile(str(hostfile)).items()] == read_hostfile(hostfile)


# --- the image ------------------------------------------------------------------------------------------------------


def test_the_image_says_that_it_is_untested_and_installs_one_cuda():
    text = (ROOT / "launch" / "Dockerfile").read_text()
    assert text.startswith("# UNTESTED")
    (cuda,) = re.findall(r"^FROM nvidia/cuda:(\d+)\.", text, re.MULTILINE)
    assert f'torch.version.cuda.startswith("{cuda}.")' in text
    assert set(re.findall(r"python(3\.\d+)", text)) == {"3.12"}
    for source in re.findall(r"^COPY ((?:[\w./]+ )+)", text, re.MULTILINE):
        assert [name for name in source.split() if not (ROOT / name).exists()] == []
