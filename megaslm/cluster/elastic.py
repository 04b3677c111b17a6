"""torchrun as one task of srun: `python -m megaslm.cluster.elastic ARGUMENTS`, with the node's rank from Slurm.

torchrun itself tells of a rank that failed in a page, and leaves with exit code 1 whatever the rank's was. Here it is
the rank's code, and one line where the rank can't have said why itself.
"""

import logging
import os
import signal
import sys
from typing import NoReturn

from megaslm.errors import USER_ERROR_EXIT_CODE, first_line


def main() -> NoReturn:
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    options = parse_args(["--node_rank", os.environ["SLURM_NODEID"], *sys.argv[1:]])
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


def leave(code: int, message: str | None = None) -> NoReturn:
    """code: of the failed rank, negative where a signal ended it."""
    if message:
        print(f"error: node {os.environ['SLURM_NODEID']}: {message}", file=sys.stderr, flush=True)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
