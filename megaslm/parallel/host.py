"""Small host-side messages between the ranks, over a gloo group of its own (`set_group`).

That group waits for long: rank 0 may be tokenizing a corpus or hashing a large checkpoint, which NCCL's watchdog would
take for a hang. A lost rank is noticed at once, by its closed socket. Without a process group every function is that of
one rank.

A thread that talks to the other ranks while the main thread does needs a group of its own (`new_group`, `using`):
messages of one group arrive in the order in which they were sent, and two threads have none.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from megaslm.errors import UserError

Result = TypeVar("Result")
TIMEOUT = timedelta(days=1)
_group: dist.ProcessGroup | None = None
_of_thread = threading.local()


def set_group(group: dist.ProcessGroup | None) -> None:
    """Send the messages over `group`; None: over the default group."""
    global _group
    _group = group


def new_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks that waits for long; None without a process group. Collective."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_available() and dist.is_initialized() else None


@contextlib.contextmanager
def using(group: dist.ProcessGroup | None) -> Iterator[None]:
    """In this thread alone, send the messages over `group`."""
    before = current_group()
    _of_thread.group = group
    try:
        yield
    finally:
        _of_thread.group = before


def current_group() -> dist.ProcessGroup | None:
    """What the messages of this thread go over; None: the default group."""
    return getattr(_of_thread, "group", _group)


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank in the default group."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """Number of ranks in the default group."""
    return dist.get_world_size() if _grouped() else 1


def gather(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of the ranks, on every rank. Collective."""
    if not _grouped():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=current_group())
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's `value` on every rank. Collective."""
    if not _grouped():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=current_group())
    return box[0]


def try_together(work: Callable[[], Result]) -> tuple[Result | None, list[tuple[int, Exception]]]:
    """Do `work` on every rank, and tell every rank who failed. Collective.

    A rank that raised alone would leave the others waiting in their next collective; so exceptions are caught here,
    and all ranks learn of all of them before any goes on.

    Returns:
        This rank's result (None where it failed), and the failures as (rank, exception), by rank; empty if all is well.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # any kind: the others must hear of it whatever it is
        failure = error
    # Only what is sure to survive the journey is sent as it is; the rank at fault keeps the traceback.
    told = failure if failure is None or isinstance(failure, (OSError, UserError)) else RuntimeError(repr(failure))
    told_by_all = gather(told)
    told_by_all[rank()] = failure
    return result, [(i, error) for i, error in enumerate(told_by_all) if error is not None]


def together(work: Callable[[], Result]) -> Result:
    """Do `work` on every rank; what one of them raises is raised on all. Collective."""
    result, failures = try_together(work)
    if failures:
        raise failures[0][1]
    return result


def on_first(work: Callable[[], Result]) -> Result:
    """Do `work` on rank 0 alone and give its (picklable) result, or what it raised, to all. Collective."""
    return broadcast(together(lambda: work() if rank() == 0 else None))
