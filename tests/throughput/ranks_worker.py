"""A command that starts ranks of its own, for test_ranks.py: prints what comes back from them, as JSON."""

import json
import os
import signal
import time

import torch
from torch.multiprocessing import ProcessRaisedException

from megaslm.errors import UserError
from megaslm.parallel import host, init_distributed
from megaslm.throughput import start_ranks


def ranks_from(first: int) -> list[int]:
    init_distributed()
    return [first, *host.gather(first + host.rank())]


def fail_on_rank_1(error: Exception | None) -> None:
    """While rank 0 waits for it. None: as the kernel ends a process that took too much memory."""
    if os.environ["RANK"] == "1":
        if error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise error
    time.sleep(60)


def main() -> None:
    found = {"result": start_ranks(ranks_from, (5,), 2, on_gpus=False), "raised": []}
    errors = [
        UserError("no data"),
        torch.OutOfMemoryError("no memory\nat all"),
        RuntimeError("CUDA error: out of memory"),
    ]
    for error in [*errors, None, RuntimeError("a fault of ours")]:
        started = time.perf_counter()
        try:
            start_ranks(fail_on_rank_1, (error,), 2, on_gpus=False)
        except (UserError, torch.OutOfMemoryError, ProcessRaisedException) as raised:
            seconds = time.perf_counter() - started
            found["raised"].append([type(raised).__name__, str(raised), seconds])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
