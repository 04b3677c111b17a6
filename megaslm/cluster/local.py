"""What this machine alone can say before any rank is started (its ports, its GPUs, whom it reaches), and how the check
of the ranks is run from it."""

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import psutil

from megaslm.cluster.commands import Launch
from megaslm.cluster.facts import ROOT
from megaslm.cluster.hostfile import Node
from megaslm.errors import UserError

CONNECT_SECONDS = 10
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # that processes have to leave after a SIGTERM
SSH_FAILED = 255  # the exit code of ssh itself; any other is that of the command


def check_locally(launch: Launch) -> None:
    """Whether what this machine is to do in `launch` can be done: all nodes reached from it, its GPUs, its port.

    Raises UserError.
    """
    here = launch.here
    if here is None:
        here = next((place for place, node in enumerate(launch.nodes) if is_here(node.host)), None)
        if len(launch.nodes) == 1 and here is None:
            # deepspeed would start the ranks of a single host on this machine, whatever its name.
            raise UserError(
                f"{launch.nodes[0].host} is not this machine, as far as it knows: for one node, run launch/node.sh "
                "there; with --node_rank 0 this machine is taken for it"
            )
    if launch.through_pdsh:
        check_reachable(launch.nodes)
    if here is not None and launch.device == "cuda":
        check_gpus(launch.nodes[here].slots)
    if here == 0:
        check_port(launch.port)


def check_port(port: int) -> None:
    """Raise UserError where another process listens on this machine's port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store of rank 0 does
        try:
            listener.bind(("", port))
            listener.listen()
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"can't be opened ({error.strerror})"
            raise UserError(f"port {port} of this machine {reason}: take another --master_port") from None


def count_gpus() -> int:
    """GPUs that torch can use here, of those in CUDA_VISIBLE_DEVICES if it is set."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_gpus(asked: int) -> None:
    """Raise UserError where this machine has fewer GPUs than are asked for."""
    present = count_gpus()
    if asked > present:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        of = f" (of CUDA_VISIBLE_DEVICES={visible})" if visible else ""
        raise UserError(
            f"{asked} GPUs are asked for, and this machine has {present}{of} that torch can use: ask for fewer, or "
            "rehearse on CPU ranks (--cpu_ranks N, or --cpu with a hostfile)"
        )


def is_here(host: str) -> bool:
    """Whether `host` is a name or an address of this machine: one that it can listen on."""
    if host == socket.gethostname():
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:  # not a name that is known here
        return False
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as listener:
            listener.bind((address[0], 0))
            return True
    return False


def check_reachable(nodes: Sequence[Node]) -> None:
    """Whether this machine can start processes on every node through ssh, and the repository and Python are there.

    Raises UserError that names every node at fault.
    """
    if shutil.which("pdsh") is None:
        raise UserError(
            "pdsh, by which deepspeed starts several nodes, is not installed: install it, or give the same command "
            "with --node_rank K on every node K = 0, 1, ..."
        )
    with ThreadPoolExecutor(len(nodes)) as pool:
        faults = list(pool.map(_reach, (node.host for node in nodes)))
    told = [f"{node.host}: {fault}" for node, fault in zip(nodes, faults, strict=True) if fault]
    if told:
        raise UserError(
            f"{len(told)} of {len(nodes)} nodes can't be used: {'; '.join(told)}. pdsh starts every node by ssh, the "
            "first one too; without ssh give the same command with --node_rank K on every node K = 0, 1, ..."
        )


def _reach(host: str) -> str | None:
    """What stands in the way of a process there, None if nothing does."""
    look = f"test -f '{ROOT}/launch/pretrain.py' && test -x '{sys.executable}'"
    # BatchMode: a question for a password would wait for ever.
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"]
    try:
        ended = subprocess.run(
            ["ssh", *options, host, look],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=3 * CONNECT_SECONDS,
        )
    except FileNotFoundError:
        return "ssh is not installed here"
    except subprocess.TimeoutExpired:
        return f"ssh did not answer within {3 * CONNECT_SECONDS} s"
    if ended.returncode == SSH_FAILED:
        return ended.stderr.strip().splitlines()[-1] if ended.stderr.strip() else "ssh failed without a message"
    if ended.returncode:
        return f"it has no {ROOT} with launch/pretrain.py, or no {sys.executable}: install megaslm at the same path"
    return None


def run_check(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the check of the ranks to its end, and return its exit code; 128 + its number where a signal ended it.

    It is a process group of its own: a terminal's Ctrl-C comes to this process alone. A signal that this process
    handles first ends the launcher and the ranks; then its handler is called.
    """
    told: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS if callable(signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, _: told.append(number))  # an exception might come in the midst of Popen
    check = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, process_group=0)
    while check.poll() is None and not told:
        time.sleep(POLL_SECONDS)
    if told:
        _end_group(check)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for number in told[:1]:
        signal.raise_signal(number)
    return check.returncode if check.returncode >= 0 else 128 - check.returncode


def _end_group(check: subprocess.Popen) -> None:
    """End `check` and all that it has started here; the launcher itself ends what it started elsewhere (srun by
    SIGKILL: there is nothing to save)."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(check.pid, number)
        deadline = time.monotonic() + GRACE_SECONDS
        while check.poll() is None or _is_alive(check.pid):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return


def _is_alive(group: int) -> bool:
    """Whether a process of the group runs. One that has ended may be in it for long where nobody asks for its code."""
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False
