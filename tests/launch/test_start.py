"""launch/start.py in this process, with stubs of the commands that it starts: mistakes that are told before anything
starts, a failed check that keeps the training from starting, and when a Slurm job is queued again."""

import contextlib
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from megaslm.cluster import elastic, local, slurm

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Started(SystemExit):
    """Instead of another program in this process's place: its command, as the exit code."""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """stubs(name=script, ...): these commands come first in PATH."""

    def make(**scripts) -> None:
        folder = tmp_path / "stubs"
        folder.mkdir(exist_ok=True)
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return make


@pytest.fixture
def start(monkeypatch, capfd):
    """start(kind, argument, ...) -> (exit code, or the command that this process would become; stdout; stderr)"""

    def become(program, command, *environment):
        raise Started(list(command))

    monkeypatch.syspath_prepend(ROOT / "launch")
    for name in ("execvpe", "execv"):
        monkeypatch.setattr(os, name, become)
    monkeypatch.setattr(local, "count_gpus", lambda: 2)
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGUSR1, lambda *_: None)  # by default it would end this process

    def run(kind, *arguments):
        monkeypatch.setattr(sys, "argv", ["start.py", kind, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "launch" / "start.py"), run_name="__main__")
        return end.value.code, *capfd.readouterr()

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def hosts(tmp_path):
    """Hostfiles by name."""
    texts = {
        "HOSTS": "127.0.0.1 slots=1\nlocalhost slots=1\n",
        "MANY": "127.0.0.1 slots=8\nlocalhost slots=8\n",
        "BROKEN": "a slots=1\nb\n",
        "LIST": "localhost,b slots=1\n",
        "ELSEWHERE": "192.0.2.1 slots=1\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return {name: tmp_path / name for name in texts}


@pytest.fixture
def job(stubs, monkeypatch):
    """A Slurm job of one node."""
    stubs(scontrol="echo localhost")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost")


@pytest.fixture
def taken():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


def mistake(ended) -> str:
    """The one message of a user's mistake."""
    code, out, err = ended
    assert (code, out) == (2, ""), ended
    assert err.count("error: ") == 1 and "Traceback" not in err
    return err


CPU = ("--cpu_ranks", "1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["node", "--gpus", "8"], ["8 GPUs are asked for, and this machine has 2"]),
        (["node", "--gpus", "0"], ["--gpus"]),
        (["node", *CPU, "--nonsense"], ["usage: launch/node.sh", "unrecognized arguments: --nonsense"]),
        (["node", *CPU, "train.max_step=3"], ["did you mean train.max_steps?"]),
        (["node", *CPU, "--ds_config", "nowhere.json"], ["nowhere.json"]),
        (["node", *CPU, "--resume", "weights"], ["--resume weights and --from"]),
        (["node", *CPU, "--master_port", "99999"], ["99999 is not a port, from 1 to 65535"]),
        (["node", *CPU, "--master_port", "-5"], ["-5 is not a port"]),
        (["node", *CPU, "--master_port", "0"], ["0 is not a port"]),
        (["node", *CPU, "--check_timeout", "-3"], ["-3 is not a number of seconds above 0"]),
        (["node", *CPU, "--check_timeout", "nan"], ["nan is not a number of seconds above 0"]),
        (["node", *CPU, "--skip_checks", "--check_only"], ["leave nothing to do"]),
        (["cluster"], ["arguments are required: --hostfile"]),
        (["cluster", "--hostfile", "BROKEN"], ["BROKEN:2: 'b' is not `HOST slots=N`"]),
        (["cluster", "--hostfile", "LIST", "--node_rank", "0"], ["LIST:1: 'localhost,b slots=1' is not"]),
        (["cluster", "--hostfile", "HOSTS", "--node_rank", "2", "--cpu"], ["--node_rank 2", "2 nodes"]),
        (["cluster", "--hostfile", "MANY", "--node_rank", "1"], ["8 GPUs are asked for, and this machine has 2"]),
        (["cluster", "--hostfile", "MANY"], ["8 GPUs are asked for, and this machine has 2"]),
        (["cluster", "--hostfile", "ELSEWHERE"], ["192.0.2.1 is not this machine", "launch/node.sh"]),
        (["slurm", "--gpus", "8"], ["this is no Slurm job"]),
    ],
)
def test_a_mistake_is_told_before_anything_starts(start, stubs, hosts, arguments, words):
    stubs(ssh="exit 0", pdsh="exit 1", deepspeed="echo started", srun="echo started")
    message = mistake(start(*(hosts.get(argument, argument) for argument in arguments)))
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("arguments", [["node", *CPU], ["cluster", "HOSTS", "--node_rank", "0"], ["slurm", *CPU]])
def test_a_port_in_use(start, hosts, job, taken, arguments):
    if "HOSTS" in arguments:
        arguments = ["cluster", "--hostfile", hosts["HOSTS"], "--cpu", *arguments[2:]]
    assert f"error: port {taken} of this machine is in use" in mistake(start(*arguments, "--master_port", taken))


def test_the_port_is_that_of_the_first_node(start, hosts, stubs, taken):
    stubs(ssh="exit 0", pdsh="exit 1")
    options = ["--hostfile", hosts["HOSTS"], "--cpu", "--skip_checks", "--master_port", taken]
    assert "is in use" in mistake(start("cluster", *options))  # through pdsh, from the first node
    command, _, _ = start("cluster", *options, "--node_rank", 1)
    assert command[0] == "deepspeed"


@pytest.mark.parametrize(
    ("scontrol", "words"),
    [
        ("echo 'no such thing' >&2; exit 1", "does not name the nodes of the job: no such thing"),
        ("exit 0", "does not name the nodes of the job"),
        (None, "scontrol, which names the nodes of the job, can't be started"),
    ],
)
def test_a_job_whose_nodes_slurm_does_not_name(start, job, stubs, monkeypatch, scontrol, words):
    stubs(scontrol=scontrol) if scontrol else monkeypatch.setenv("PATH", "/nonexistent")
    assert words in mistake(start("slurm", *CPU))
    monkeypatch.delenv("SLURM_JOB_NODELIST")
    assert "SLURM_JOB_NODELIST is not" in mistake(start("slurm", *CPU))


def test_more_gpus_than_a_job_has(start, job, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    assert "--gpus 8: the job has 4 GPUs on a node" in mistake(start("slurm", "--gpus", 8))
    assert "4 GPUs are asked for, and this machine has 2" in mistake(start("slurm"))


def test_gpus_that_deepspeed_would_not_use(start, hosts, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert "would be ignored" in mistake(start("cluster", "--hostfile", hosts["HOSTS"], "--node_rank", 0))
    command, out, _ = start("node", "--gpus", 2, "--skip_checks")
    assert command[command.index("--include") + 1] == "localhost:4,5"


def test_nodes_that_cannot_be_reached_are_named_all_at_once(start, tmp_path, stubs):
    hosts = tmp_path / "hosts"
    hosts.write_text("good slots=8\ngone slots=8\nempty slots=8\n")
    ssh = """case "$*" in
        *" good "*) exit 0 ;;
        *" gone "*) echo "ssh: connect to host gone port 22: No route to host" >&2; exit 255 ;;
        *) exit 1 ;;
    esac"""
    stubs(ssh=ssh, pdsh="exit 1")
    message = mistake(start("cluster", "--hostfile", hosts))
    assert "2 of 3 nodes can't be used" in message and "good:" not in message
    assert "gone: ssh: connect to host gone port 22: No route to host" in message
    assert f"empty: it has no {ROOT}" in message
    assert "the first one too; without ssh give the same command with --node_rank K" in message


# --- the checks and the training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "options", "trains", "told"),
    [(0, [], True, ""), (0, ["--check_only"], False, ""), (2, [], False, ""), (7, [], False, "ended with exit code 7")],
)
@pytest.mark.parametrize("kind", ["node", "slurm"])
def test_a_failed_check_keeps_the_training_from_starting(
    start, stubs, job, tmp_path, kind, code, options, trains, told
):
    stub = f'case "$*" in *check.py*) exit {code} ;; esac; touch "{tmp_path}/trained"'
    stubs(deepspeed=stub, srun=stub)
    ended, out, err = start(kind, *CPU, *options, "--preset", "slm_tiny", "--run_dir", tmp_path / "run")
    assert out == "checks of 1 ranks: 1 on localhost\n"
    assert told in err and bool(told) == bool(err)
    if kind == "node" and trains:
        assert ended[0] == "deepspeed" and ended[-5:-3] == ["launch/pretrain.py", "--preset"]
    else:
        assert ended == code and (tmp_path / "trained").exists() == trains


def test_options_reach_the_commands(start, hosts):
    options = ["--hostfile", hosts["HOSTS"], "--node_rank", 1, "--cpu", "--master_addr", "other-name"]
    code, out, _ = start("cluster", *options, "--check_timeout", 7, "--dry_run")
    *_, check, training = out.splitlines()
    assert code == 0 and " --timeout 7 -- " in f"{check} "
    assert " --master_addr other-name " in check and " --master_addr other-name " in training
    assert " --log_level critical " in check and " --log_level critical " not in training


@pytest.mark.parametrize("option", ["--list_presets", "--print_config", "--help_config"])
def test_what_only_informs_starts_nothing(start, option):
    command, out, _ = start("node", *CPU, option)
    assert (command, out) == ([sys.executable, "launch/pretrain.py", option], "")


# --- Slurm -----------------------------------------------------------------------------------------------------------

AGAIN = "job 4711 is queued again\n"


@pytest.fixture
def step(stubs, tmp_path):
    """step(script, leave): a step whose srun runs `script` and then `leave`. As Slurm's, srun itself saves nothing on a
    SIGTERM: it is scancel that lets the ranks `leave`."""

    def make(script: str, leave: str, scancel: str | None = None) -> None:
        pid = tmp_path / "srun"
        stubs(
            srun=f"echo $$ >{pid}; trap '{leave}' USR2; {script}; {leave}",
            scancel=scancel or f'[ "$*" = "--signal=TERM 4711" ] && kill -USR2 $(cat {pid})',
        )

    return make


@pytest.mark.parametrize(
    ("number", "code", "saves", "told"),
    [
        (None, 2, True, None),  # a mistake of the user
        (None, 1, True, None),  # a crash
        ("USR1", 143, True, AGAIN),
        ("USR1", 0, True, None),  # the run had come to its end before it heard of it
        ("USR1", 143, False, "job 4711 is not queued again, since it has saved nothing new"),
        ("TERM", 1, True, None),  # scancel; a job that it preempts Slurm queues again by itself
    ],
)
def test_when_a_slurm_job_is_queued_again(start, stubs, step, job, tmp_path, number, code, saves, told):
    run_dir, requeued = tmp_path / "run", tmp_path / "requeued"
    (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
    save = f'mkdir "{run_dir}/checkpoints/step_00000002"' if saves else ":"
    signals = {None: ":", "USR1": "kill -USR1 $PPID; kill -USR1 $PPID; sleep 20 & wait", "TERM": "kill -TERM $PPID"}
    step(signals[number], f"{save}; kill %1 2>/dev/null; exit {code}")
    stubs(scontrol=f'case "$1" in show) echo localhost ;; *) echo "$*" >>"{requeued}" ;; esac')
    ended, out, err = start("slurm", *CPU, "--skip_checks", "--preset", "slm_tiny", "--run_dir", run_dir)
    assert ended == code
    assert requeued.exists() == (told == AGAIN)
    assert out == "" if told is None else told in out
    if told == AGAIN:
        assert requeued.read_text() == "requeue 4711\n"


def test_a_job_that_slurm_does_not_queue_again(start, stubs, step, job, tmp_path):
    """What is said is what happened."""
    save = f'mkdir -p "{tmp_path}/checkpoints/step_00000002"; kill %1; exit 143'
    step("kill -USR1 $PPID; sleep 20 & wait", save)
    stubs(scontrol='case "$1" in show) echo localhost ;; *) echo "not permitted" >&2; exit 1 ;; esac')
    _, out, _ = start("slurm", *CPU, "--skip_checks", "--preset", "slm_tiny", "--run_dir", tmp_path)
    assert "scontrol requeue 4711 failed: not permitted; submit the job again" in out and "is queued again" not in out


def test_a_job_whose_ranks_are_not_told_of_the_limit(start, stubs, step, job, tmp_path, monkeypatch, capfd):
    """It goes on, and how it ends is no reason to queue it again."""
    requeued, tried = tmp_path / "requeued", tmp_path / "tried"
    save = f'mkdir -p "{tmp_path}/checkpoints/step_00000002"; exit 143'
    wait = f"kill -USR1 $PPID; until [ -e {tried} ]; do sleep 0.05; done"
    step(wait, save, scancel=f"echo no controller >&2; touch {tried}; exit 1")
    stubs(scontrol=f'case "$1" in show) echo localhost ;; *) touch "{requeued}" ;; esac')
    code, out, _ = start("slurm", *CPU, "--skip_checks", "--preset", "slm_tiny", "--run_dir", tmp_path)
    assert code == 143 and not requeued.exists()
    words = "the ranks can't be told of the job's limit: scancel --signal=TERM 4711 failed: no controller; "
    assert out.startswith(f"slurm.sbatch: {words}") and out.count("\n") == 1

    monkeypatch.setenv("PATH", "/nonexistent")
    assert not slurm._end_step()
    assert "scancel --signal=TERM 4711 can't be started: No such file" in capfd.readouterr().out


def test_a_job_whose_limit_comes_during_the_checks(start, stubs, job, tmp_path):
    """It would be queued again for ever. Nothing of the checks is left."""
    stubs(
        srun=f'echo $$ >"{tmp_path}/pid"; kill -USR1 $PPID; sleep 30 & wait',
        scontrol=f'case "$1" in show) echo localhost ;; *) touch "{tmp_path}/requeued" ;; esac',
    )
    started = time.monotonic()
    code, _, err = start("slurm", *CPU, "--preset", "slm_tiny", "--run_dir", tmp_path / "run")
    assert code == 2 and time.monotonic() - started < 10
    assert "error: job 4711 was told of its limit before the training began; it is not queued again" in err
    assert not (tmp_path / "requeued").exists()
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(int((tmp_path / "pid").read_text())).status() == psutil.STATUS_ZOMBIE


def test_the_step_of_a_job_leaves_with_the_code_of_its_rank(fork_ranks, free_port, tmp_path):
    """elastic.py in the place of torchrun: one line where the rank can't have spoken itself, none where it has."""
    task, rank = tmp_path / "task.py", tmp_path / "rank.py"
    task.write_text("import os\nfrom megaslm.cluster.elastic import main\nos.environ['SLURM_NODEID'] = '0'\nmain()\n")
    rank.write_text(
        "import os, sys\nos.kill(os.getpid(), 9) if sys.argv[1] == 'kill' else sys.exit(int(sys.argv[1]))\n"
    )
    of_rank = (("0", 0, ""), ("2", 2, ""), ("3", 3, "rank 0 ended by exit code 3"), ("kill", 137, "ended by SIGKILL"))
    for how, code, message in of_rank:
        address = ["--master_addr", "localhost", "--master_port", free_port()]
        ended = fork_ranks(task, ["--nnodes", 1, "--nproc_per_node", 1, *address, rank, how], None)
        assert ended.code == code, ended
        assert ended.err.count("\n") == bool(message) and message in ended.err, ended


@pytest.mark.parametrize(
    ("agent", "told"),
    [(lambda spec, shutdown_timeout=30: None, False), (lambda spec, exit_barrier_timeout=300: None, True)],
)
def test_a_torchrun_that_does_not_wait_for_a_checkpoint_is_told_of(monkeypatch, capsys, agent, told):
    """The agent of torch 2.12, and that of the versions before."""
    from torch.distributed.elastic.agent.server import local_elastic_agent

    monkeypatch.setattr(local_elastic_agent, "LocalElasticAgent", agent)
    elastic.warn_of_little_time()
    message = capsys.readouterr().err
    assert message.startswith("warning: told to end, torchrun of torch ") == ("train.max_seconds" in message) == told
