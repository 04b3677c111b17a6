"""Process groups and what ranks do together."""

from megaslm.parallel import host
from megaslm.parallel.distributed import Ranks, init_distributed

__all__ = ["Ranks", "host", "init_distributed"]
