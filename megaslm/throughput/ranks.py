"""Ranks that a measuring command starts by itself, on this machine, as new processes for every measurement."""

import logging
import os
import pickle
import signal
import tempfile
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from megaslm.errors import UserError, first_line
from megaslm.parallel import free_port
from megaslm.signals import ENDING_SIGNALS, signals_held

FAILURES = (UserError, torch.OutOfMemoryError)
# Of RuntimeErrors: the driver, cuBLAS and the host's allocator say it in their own words.
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "can't allocate memory")


def start_ranks(work: Callable[..., Any], arguments: tuple, world_size: int, on_gpus: bool) -> Any:
    """What `work(*arguments)` returned on rank 0 of `world_size` ranks: forks of this process, which has imported
    everything, or where there are GPUs, which do not take that, processes from scratch (`work` and `arguments` are
    pickled). A rank finds its number in the environment and calls `init_distributed`.

    Raises:
        UserError, torch.OutOfMemoryError: a rank raised it; the other ranks are ended. A rank that was killed has run
            out of memory too: systems kill who takes the last of it.
        ProcessRaisedException, ProcessExitedException: a rank failed otherwise.
    """
    import deepspeed  # noqa: F401  # once for all forks

    # It warns of every rank that it ends when another one failed.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    others = set(multiprocessing.active_children())
    if on_gpus:  # or the first start of a process does it, and drops the signal mask
        resource_tracker.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        try:
            # An exception in the midst of a fork is dropped by Python, or the ranks are not known yet that are to end.
            with signals_held():
                context = multiprocessing.start_processes(
                    run_rank,
                    (work, arguments, world_size, free_port(), Path(folder)),
                    world_size,
                    join=False,
                    start_method="spawn" if on_gpus else "fork",
                )
            while not context.join():
                pass
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            for path in sorted(Path(folder).glob("failure*")):
                kind, text = pickle.loads(path.read_bytes())
                raise FAILURES[kind](text) from None
            if getattr(error, "signal_name", None) == "SIGKILL":
                raise torch.OutOfMemoryError("it was killed") from None
            raise
        finally:  # this process is told to end: the ranks may wait for one another, and hear nothing
            with signals_held():
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()
                    process.join()
        return pickle.loads((Path(folder) / "result").read_bytes())


def run_rank(rank: int, work: Callable[..., Any], arguments: tuple, world_size: int, port: int, folder: Path) -> None:
    """One process. Rank 0 leaves the result in `folder`, and a rank that fails what `start_ranks` is to raise."""
    for number in ENDING_SIGNALS:  # not this command's handlers: the process that started it speaks
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
    rank_of = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({key: str(value) for key, value in rank_of.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    try:
        result = work(*arguments)
    except (UserError, RuntimeError) as error:
        if isinstance(error, UserError):
            kind, text = 0, str(error)
        elif isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY):
            kind, text = 1, first_line(error)
        else:
            raise
        hidden = folder / f"hidden{rank}"
        hidden.write_bytes(pickle.dumps((kind, text)))
        hidden.rename(folder / f"failure{rank}")
        os._exit(1)  # at once: the others may wait for this rank in a collective
    if rank == 0:
        (folder / "result").write_bytes(pickle.dumps(result))
    torch.distributed.destroy_process_group()
