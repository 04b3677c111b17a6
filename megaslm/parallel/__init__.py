"""Process groups and what ranks do together."""

from megaslm.parallel.distributed import Ranks, init_distributed

__all__ = ["Ranks", "init_distributed"]
