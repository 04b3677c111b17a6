"""The largest micro-batch that fits: by running, never by a formula alone."""

from collections.abc import Callable, Sequence

import torch

from megaslm.resources import available_memory

# Of the memory that there is: what an allocator leaves between blocks, and what grows later in a run.
SHARE_OF_GPU, SHARE_OF_CPU = 0.95, 0.8
STRIDE = 8  # at most so many times the largest size that has run: memory that small sizes do not show is bounded


def memory_limit(device: torch.device, ranks: int) -> float:
    """Bytes that a rank may take: of what is free on its GPU now, or in the machine's memory, which `ranks` share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return SHARE_OF_GPU * (free + torch.cuda.memory_reserved(device))
    return SHARE_OF_CPU * available_memory() / ranks


def largest_micro_batch(
    sizes: Sequence[int], probe: Callable[[int], int], limit: float, say: Callable[[str], None] = lambda line: None
) -> int | None:
    """The largest of `sizes` (ascending) that fits; None: not even the first.

    First the smallest runs, and a size of at most twice that. From then on the next to run is the largest that should
    stay below `limit` if memory goes on to grow as it did between the last two, and is at most STRIDE times the last.
    Where the next of `sizes` is further away, what runs is none of them, and shows how memory grows up to there. After
    one that did not fit, the middle one of those in between. So whatever is returned has run.

    Args:
        probe: runs a size in new processes and returns the peak bytes; raises torch.OutOfMemoryError where it does not
            fit. A size whose peak is over `limit` does not fit either.
        limit: bytes of one rank.
    """
    fits: list[tuple[int, int]] = []  # (size, bytes), ascending
    left = list(sizes)
    failed = False
    while left:
        size = left[len(left) // 2] if failed else _next(left, fits, limit)
        if size is None:
            say(f"micro-batch {left[0]} would need more than {limit / 2**30:.1f} GiB by the growth so far: not tried")
            break
        try:
            used = probe(size)
        except torch.OutOfMemoryError:
            used = None
        if used is not None and used <= limit:
            say(f"micro-batch {size} fits: {used / 2**30:.2f} GiB of {limit / 2**30:.1f}")
            fits.append((size, used))
            left = [one for one in left if one > size]
        else:
            found = "ran out of memory" if used is None else f"took {used / 2**30:.2f} GiB of {limit / 2**30:.1f}"
            say(f"micro-batch {size} {found}")
            failed = True
            left = [one for one in left if one < size]
    return max((size for size, _ in fits if size in sizes), default=None)


def _next(left: list[int], fits: list[tuple[int, int]], limit: float) -> int | None:
    """The size to run after those that fit; None: there is none that should fit."""
    if not fits:
        return left[0]
    last, bytes_last = fits[-1]
    if len(fits) == 1:
        return min(left[0], 2 * last)
    before, bytes_before = fits[-2]
    growth = max(0.0, (bytes_last - bytes_before) / (last - before))
    within = [size for size in left if bytes_last + growth * (size - last) <= limit]
    if not within:
        return None
    reach = STRIDE * last
    return max((size for size in within if size <= reach), default=reach)
