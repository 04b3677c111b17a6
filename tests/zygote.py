"""Ranks without their imports: one process imports torch and DeepSpeed, and is forked for every rank of every launch.

Importing them takes a rank about 5 s of a core, a fork takes milliseconds. What a rank is, is in `_become_rank`:
a script as `__main__`, with the environment of torchrun. Tests of launchers, signals and kills start real processes.
"""

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from megaslm import launchers
from megaslm.commands import mute_native_exit

# What a rank of launch/pretrain.py has imported by its first step: the last two with its engine.
PRELOADED = ("deepspeed", "megaslm.training", "torch._inductor.compile_fx", "torch.utils.cpp_extension")
STREAMS = {"out": 1, "err": 2}  # of a rank: file in its folder, descriptor
SECONDS_BETWEEN_LOOKS = 0.005


class Zygote:
    """The process that is forked, from the side of the tests. It ends with this one."""

    def __init__(self, environment: dict[str, str], log: Path):
        self._log = log
        self._requests, theirs = socket.socketpair()
        # Of one thread: in the child of a fork the others are missing. torchrun gives each rank one as well.
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        one_thread["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else a pool of processes, each with its imports
        with theirs, open(log, "w") as output:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=environment | one_thread,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def fork(self, ranks: int | None, port: int, script: Path, arguments: list, folder: Path, timeout: float):
        """Run `script` as `ranks` processes (None: one without a launcher) in `folder`, which gets their output.

        A rank that fails ends the others. After `timeout` seconds every rank prints where it stands, and fails.
        Returns the exit code of the rank that failed first (0: none did), stdout and stderr of all, rank 0's first.
        """
        request = {"ranks": ranks, "port": port, "script": str(script), "arguments": list(map(str, arguments))}
        request |= {"folder": str(folder), "timeout": timeout}
        try:
            self._requests.sendall(json.dumps(request).encode() + b"\n")
            with self._requests.makefile() as answers:
                answer = answers.readline()
        except ConnectionError:
            answer = ""
        except BaseException:
            self.close()  # this test is out of time: its ranks must not answer the next one
            raise
        if not answer:
            raise RuntimeError(f"the process that forks ranks is gone:\n{self._log.read_text()}")
        out, err = ("".join((folder / f"{rank}.{name}").read_text() for rank in range(ranks or 1)) for name in STREAMS)
        return json.loads(answer), out, err

    @property
    def is_open(self) -> bool:
        return self._process.poll() is None and self._requests.fileno() >= 0

    def close(self) -> None:
        self._requests.close()
        self._process.wait(timeout=30)


def _serve(requests: socket.socket) -> str:
    """Answer requests until the tests are gone. Returns in the ranks alone: the script that this one is to run."""
    with requests.makefile() as lines:
        for line in lines:
            request = json.loads(line)
            alive = set()
            for rank in range(request["ranks"] or 1):
                pid = os.fork()
                if pid == 0:
                    requests.close()
                    return _become_rank(rank, **request)
                alive.add(pid)
            code = _wait(alive, requests)
            requests.sendall(json.dumps(code).encode() + b"\n")
    os._exit(0)


def _become_rank(
    rank: int, ranks: int | None, port: int, script: str, arguments: list, folder: str, timeout: float
) -> str:
    os.setpgid(0, 0)  # whatever it starts ends with it
    for name, descriptor in STREAMS.items():
        os.dup2(os.open(f"{folder}/{rank}.{name}", os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    faulthandler.dump_traceback_later(timeout, exit=True)
    launchers.AT_START = launchers.find_launchers()
    if ranks is not None:
        of_machine = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in (of_machine | address).items()})
    os.chdir(folder)
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    return script


def _wait(alive: set[int], requests: socket.socket) -> int:
    """Exit code of the rank that failed first. The others, and all once the tests are gone, are killed."""
    code = 0
    while alive:
        tests_are_gone = select.select([requests], [], [], SECONDS_BETWEEN_LOOKS)[0]
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            alive.remove(pid)
            code = code or os.waitstatus_to_exitcode(status)
        if code or tests_are_gone:
            for other in alive:
                with contextlib.suppress(ProcessLookupError):  # not in a group of its own yet
                    os.killpg(other, signal.SIGKILL)
    return code


def main() -> None:
    mute_native_exit()
    for name in PRELOADED:
        importlib.import_module(name)
    assert psutil.Process().num_threads() == 1, "a fork has one thread, and waits for the others for ever"
    gc.freeze()  # no rank need look through what all share
    runpy.run_path(_serve(socket.socket(fileno=int(sys.argv[1]))), run_name="__main__")


if __name__ == "__main__":
    main()
