"""Inside a Slurm job: its nodes, and its training step, after which the job may be queued again."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megaslm.errors import UserError

POLL_SECONDS = 0.1


def hosts_of_job() -> list[str]:
    """The nodes of this job, in the order of their tasks.

    Raises UserError: Slurm does not say.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise UserError("SLURM_JOB_ID is set and SLURM_JOB_NODELIST is not: submit with `sbatch launch/slurm.sbatch`")
    try:
        ended = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"scontrol, which names the nodes of the job, can't be started: {error.strerror}") from error
    hosts = ended.stdout.split()
    if ended.returncode or not hosts:
        reason = ended.stderr.strip() or f"exit code {ended.returncode}, no names"
        raise UserError(f"`scontrol show hostnames {nodes}` does not name the nodes of the job: {reason}")
    return hosts


def train_in_job(command: Sequence[str], environment: Mapping[str, str], run_dir: Path) -> int:
    """Run the training step; where Slurm announces the job's limit (USR1), let it save and queue the job again.

    Of a SIGTERM, by a preemption or an scancel, Slurm tells the ranks itself, and queues again what it must.
    Returns the step's exit code; 128 + its number where a signal ended it.
    """
    told: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda number, _: told.append(number))
    before = _names(run_dir)
    step = subprocess.Popen(command, env=environment)
    passed_on = None
    while step.poll() is None:
        if signal.SIGUSR1 in told and passed_on is None:
            passed_on = _end_step()  # once: torchrun takes a second SIGTERM for the wish not to wait for its ranks
        time.sleep(POLL_SECONDS)
    code = step.returncode if step.returncode >= 0 else 128 - step.returncode
    # Told to end, torchrun leaves with a code of its own; 0 is a run that had come to its end before it heard of it.
    if passed_on and set(told) == {signal.SIGUSR1} and code != 0:
        print(f"slurm.sbatch: stopped ahead of the job's limit; {_queue_again(run_dir, before)}", flush=True)
    return code


def _end_step() -> bool:
    """Send SIGTERM to the tasks of the job's step, which are torchrun, and so to the ranks; whether that was done.

    Not to srun, which passes a SIGTERM on as SIGKILL (src/srun/libsrun/srun_job.c, _srun_signal_mgr). scancel leaves
    the batch shell out, which is this process, unless it is given --batch or --full; of the job's steps the training is
    the only one, the checks having ended.
    """
    failure = _failure(["scancel", "--signal=TERM", os.environ["SLURM_JOB_ID"]])
    if failure:
        text = "it may end at its limit without a last checkpoint, and is not queued again"
        print(f"slurm.sbatch: the ranks can't be told of the job's limit: {failure}; {text}", flush=True)
    return failure is None


def _failure(command: Sequence[str]) -> str | None:
    """Run a command of Slurm's; what went wrong, or None."""
    name = " ".join(command)
    try:
        ended = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return f"{name} can't be started: {error.strerror}"
    if ended.returncode:
        return f"{name} failed: {ended.stderr.strip() or f'exit code {ended.returncode}'}"
    return None


def _names(run_dir: Path) -> set[str]:
    folder = run_dir / "checkpoints"
    return set(os.listdir(folder)) if folder.is_dir() else set()


def _queue_again(run_dir: Path, before: set[str]) -> str:
    """Queue the job again if it has come further than it was; what became of that."""
    from megaslm.checkpoint import list_checkpoints

    job = os.environ["SLURM_JOB_ID"]
    if all(checkpoint.name in before for checkpoint in list_checkpoints(run_dir / "checkpoints")):
        return f"job {job} is not queued again, since it has saved nothing new: submit it with a longer --time"
    failure = _failure(["scontrol", "requeue", job])
    return f"{failure}; submit the job again" if failure else f"job {job} is queued again"
