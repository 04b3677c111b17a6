"""torchrun as one task of srun: `python -m megaslm.cluster.elastic ARGUMENTS`, with the node's rank from Slurm.

torchrun itself tells of a rank that failed in a page, and leaves with exit code 1 whatever the rank's was. Here it is
the rank's code, and one line where the rank can't have said why itself.
"""

import inspect
import logging
import os
import signal
import sys
from typing import NoReturn

from megaslm.cluster.commands import PRETRAIN
from megaslm.errors import USER_ERROR_EXIT_CODE, first_line


def main() -> NoReturn:
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    options = parse_args(["--node_rank", os.environ["SLURM_NODEID"], *sys.argv[1:]])
    if options.training_script == PRETRAIN and os.environ["SLURM_NODEID"] == "0":
        warn_of_little_time()
    logging.disable(logging.ERROR)  # in this process alone: what it logs of a rank that fails
    try:
        run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"exit code {code}" if code > 0 else f"{signal.Signals(-code).name}; the kernel's log may say why"
        leave(code, None if code == USER_ERROR_EXIT_CODE else f"rank {rank} ended by {how}")
    except SignalException as error:
        leave(-error.sigval)
    except (DistNetworkError, DistStoreError) as error:
        where = f"{options.master_addr}:{options.master_port}"
        leave(1, f"the nodes could not meet at {where}, or one of them was lost ({first_line(error)})")
    leave(0)


def warn_of_little_time() -> None:
    """Where torchrun kills the ranks soon after a SIGTERM, whatever TORCH_ELASTIC_SHUTDOWN_TIMEOUT says."""
    import torch
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    if "shutdown_timeout" not in inspect.signature(LocalElasticAgent).parameters:
        print(
            f"warning: told to end, torchrun of torch {torch.__version__} leaves the ranks 30 s for their last "
            "checkpoint (from 2.12 on, 600 s): where a step and a save take longer, set train.max_seconds below the "
            "job's limit",
            file=sys.stderr,
            flush=True,
        )


def leave(code: int, message: str | None = None) -> NoReturn:
    """code: of the failed rank, negative where a signal ended it."""
    if message:
        print(f"error: node {os.environ['SLURM_NODEID']}: {message}", file=sys.stderr, flush=True)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
