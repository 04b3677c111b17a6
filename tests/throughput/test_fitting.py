"""The search for the largest micro-batch, in memories that are made up."""

import pytest
import torch

from megaslm.throughput.case import divisors
from megaslm.throughput.fitting import SHARE_OF_GPU, STRIDE, largest_micro_batch, memory_limit

GIB = 2**30


class Memory:
    """Runs a size as a device does that has room for sizes up to `most`: a fixed part, one that grows with the size,
    and a peak elsewhere that hides it while it is small."""

    def __init__(self, most: int | None = None, fixed: float = 2.0, each: float = 0.5, hidden_below: float = 0.0):
        self.most, self.fixed, self.each, self.hidden_below = most, fixed, each, hidden_below
        self.runs: list[int] = []

    def __call__(self, size: int) -> int:
        assert size not in self.runs, "a size is run once"
        self.runs.append(size)
        if self.most is not None and size > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return int(GIB * max(self.hidden_below, self.fixed + self.each * size))


def search(memory: Memory, share: int, limit: float = 64 * GIB) -> tuple[int, list[str]]:
    said: list[str] = []
    found = largest_micro_batch(divisors(share), memory, limit, said.append)
    assert found in memory.runs and share % found == 0
    ascending = [1, *memory.runs]
    assert all(size <= STRIDE * max(ascending[: i + 1]) for i, size in enumerate(memory.runs)), "in strides"
    return found, said


@pytest.mark.parametrize("share", [1, 2, 7, 48, 480, 512])
@pytest.mark.parametrize("most", [1, 2, 5, 8, 30, 31, 512])
def test_the_largest_that_does_not_run_out_of_memory_is_found(share, most):
    """Memory that shows nothing before it is full."""
    memory = Memory(most, each=0.0)
    assert search(memory, share)[0] == max(size for size in divisors(share) if size <= most)
    assert len(memory.runs) <= 8


@pytest.mark.parametrize("share", [1, 2, 7, 12, 11 * 13, 509, 512])
@pytest.mark.parametrize("limit", [3, 4, 10, 63, 500])
def test_what_the_growth_forbids_is_not_run(share, limit):
    """As on a processor, where running out of memory ends other processes: it never happens."""
    memory = Memory()
    found, said = search(memory, share, limit * GIB)
    fitting = [size for size in divisors(share) if 2 + 0.5 * size <= limit]
    assert found == fitting[-1]
    assert all(2 + 0.5 * size <= limit for size in memory.runs)
    assert len(memory.runs) <= 6 and any(f"micro-batch {found} fits" in line for line in said)
    assert (found == share) != any("not tried" in line for line in said)


def test_a_peak_that_hides_the_growth_at_small_sizes_is_seen_through_in_time():
    memory = Memory(hidden_below=20.0)  # from size 36 on it grows
    assert search(memory, 1024, 60 * GIB)[0] == 64
    assert max(memory.runs) <= 8 * 16, "a step of at most eight times what ran"


def test_over_the_limit_does_not_fit_though_it_ran():
    assert search(Memory(fixed=0.0, each=1.0), 2, 1.5 * GIB)[0] == 1


def test_where_not_even_one_fits():
    assert largest_micro_batch(divisors(8), Memory(most=0), 64 * GIB) is None


def test_ranks_of_a_machine_share_its_memory():
    cpu = torch.device("cpu")
    assert 0 < memory_limit(cpu, 4) == pytest.approx(memory_limit(cpu, 1) / 4, rel=0.2)


def test_of_a_gpu_what_is_free_counts(monkeypatch):
    """And what this process's allocator holds already; other processes have the rest of the 80."""
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (30 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    device = torch.device("cuda", 3)
    assert memory_limit(device, 4) == SHARE_OF_GPU * 32 * GIB and asked == [device]
