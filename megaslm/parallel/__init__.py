"""Process groups and what ranks do together."""

from megaslm.parallel import host
from megaslm.parallel.distributed import Ranks, init_distributed
from megaslm.parallel.memory import memory_used

__all__ = ["Ranks", "host", "init_distributed", "memory_used"]
