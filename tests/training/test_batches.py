"""The thread that reads ahead: the same batches as without it, in bounded memory, its errors where they are seen."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from megaslm.config import BatchLayout
from megaslm.data import IGNORED_TARGET, TokenFileWriter, TrainingData
from megaslm.data.dataset import Batch
from megaslm.errors import UserError
from megaslm.training.batches import PinnedRing, StepBatches, first_samples, widen, without_unsigned

SEQ, EOD = 6, 3


class Rank:
    """Stands in for Ranks: one of `size` on a device."""

    def __init__(self, rank=0, size=1, device="cpu"):
        self.data_parallel_rank, self.data_parallel_size, self.device = rank, size, torch.device(device)


@pytest.fixture
def prefix(tmp_path) -> str:
    """Ids over 32,767, which int16 has not."""
    with TokenFileWriter(str(tmp_path / "corpus"), 65_000) as writer:
        writer.extend_flat(np.arange(64_000, 65_000), np.full(100, 10))
        writer.finish()
    return writer.prefix


def take(data, layout, ranks, first_sample, steps, **options):
    with StepBatches(data, layout, ranks, first_sample, steps, **options) as batches:
        return [batches.next() for _ in range(steps)]


@pytest.mark.parametrize(("size", "micro", "accumulation"), [(1, 4, 1), (1, 2, 3), (2, 3, 2), (3, 1, 2)])
@pytest.mark.parametrize("mask_documents", [False, True])
def test_steps_are_those_of_the_data(prefix, size, micro, accumulation, mask_documents):
    data = TrainingData([(prefix, 1)], SEQ, 1, mask_documents=mask_documents)
    layout, step = BatchLayout(micro, accumulation), size * micro * accumulation
    seen = []
    for rank in range(size):
        steps = take(data, layout, Rank(rank, size), 7, 5)
        for number, batches in enumerate(steps):
            firsts = list(first_samples(7 + number * step, layout, Rank(rank, size)))
            assert len(batches) == len(firsts) == accumulation
            for first, batch in zip(firsts, batches, strict=True):
                expected = data.batch(first, micro)
                assert batch.tokens.dtype == batch.targets.dtype == torch.int64
                assert np.array_equal(batch.tokens, expected.tokens[:, :-1])
                assert np.array_equal(batch.targets, expected.tokens[:, 1:])
                assert (batch.positions is not None) == mask_documents
                if mask_documents:
                    assert np.array_equal(batch.positions, expected.positions)
                    assert batch.num_documents == (expected.positions == 0).sum()
                seen += range(first, first + micro)
        resumed = take(data, layout, Rank(rank, size), 7 + 3 * step, 1)
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(resumed[0], steps[3], strict=True))
    assert sorted(seen) == list(range(7, 7 + 5 * step))


class Rows:
    """Stands in for TrainingData: sample k is k all along. Counts what was read; fails at sample `bad`."""

    ignore_repeated_eod = None

    def __init__(self, bad=None, error=None, wait=None):
        self.reads, self.bad, self.error, self.wait = [], bad, error, wait

    def batch(self, first, count):
        if self.wait is not None:
            assert self.wait.wait(10)
        if self.bad is not None and first <= self.bad < first + count:
            raise self.error
        self.reads.append(first)
        return Batch(np.repeat(np.arange(first, first + count)[:, None], SEQ + 1, axis=1), None)


def settle(reads: list) -> list:
    """What was read once nothing more is."""
    before = None
    while before != len(reads):
        before = len(reads)
        time.sleep(0.05)
    return list(reads)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_reads_ahead_and_no_further(depth):
    data = Rows()
    with StepBatches(data, BatchLayout(2, 3), Rank(), 0, 100, depth=depth) as batches:
        assert settle(data.reads) == list(range(0, 6 * depth, 2))
        for taken in range(1, 5):
            assert batches.next()[0].tokens[0, 0] == 6 * (taken - 1)
            assert settle(data.reads) == list(range(0, 6 * (depth + taken), 2))


def test_the_end_of_the_run_is_not_read_past():
    data = Rows()
    with StepBatches(data, BatchLayout(2, 1), Rank(), 4, 3, depth=9) as batches:
        assert settle(data.reads) == [4, 6, 8]
        assert [int(batches.next()[0].tokens[0, 0]) for _ in range(3)] == [4, 6, 8]
        with pytest.raises(AssertionError, match="no more steps"):
            batches.next()


@pytest.mark.parametrize("error", [UserError("token 5 has id 99"), ValueError("a fault of ours"), SystemExit("gone")])
def test_an_error_of_the_thread_comes_in_its_turn(error):
    data = Rows(bad=5, error=error)
    with StepBatches(data, BatchLayout(2, 1), Rank(), 0, 100, depth=4) as batches:
        settle(data.reads)
        assert [int(batches.next()[0].tokens[0, 0]) for _ in range(2)] == [0, 2]
        for _ in range(2):  # and does not hang where it is asked again
            with pytest.raises(type(error), match=str(error)) as raised:
                batches.next()
        assert getattr(raised.value, "on_one_rank", None) == (True if isinstance(error, UserError) else None)


def test_closing_early_ends_the_thread():
    """While it waits for room, while it reads, after it failed; the block's own exception comes through."""
    for data in (Rows(), Rows(bad=0, error=ValueError())):
        batches = StepBatches(data, BatchLayout(1, 1), Rank(), 0, 100)
        settle(data.reads)
        batches.close()
        batches.close()
        assert not batches._thread.is_alive()
    reading = threading.Event()
    batches = StepBatches(Rows(wait=reading), BatchLayout(1, 1), Rank(), 0, 100)
    closing = threading.Thread(target=batches.close)
    closing.start()
    reading.set()
    closing.join(10)
    assert not closing.is_alive() and not batches._thread.is_alive()
    with pytest.raises(AssertionError, match="no more steps"):
        batches.next()
    with pytest.raises(KeyboardInterrupt):
        with StepBatches(Rows(), BatchLayout(1, 1), Rank(), 0, 100) as batches:
            raise KeyboardInterrupt
    assert not batches._thread.is_alive()


def test_closing_leaves_a_read_that_hangs_behind(monkeypatch):
    monkeypatch.setattr("megaslm.training.batches.CLOSING_SECONDS", 0.1)
    reading = threading.Event()
    ahead = StepBatches(Rows(wait=reading), BatchLayout(1, 1), Rank(), 0, 100)
    ahead.close()
    assert ahead._thread.is_alive() and ahead._thread.daemon
    reading.set()
    ahead._thread.join(10)
    assert not ahead._thread.is_alive()


def test_padding_is_no_target(tmp_path):
    """Of packed files: targets that repeat the end-of-document token; the tokens stay as they are."""
    with TokenFileWriter(str(tmp_path / "packed"), 100, boundaries=True) as writer:
        writer.add_tokens(np.array([5, 6, EOD, 7, EOD, EOD, EOD]))
        writer.add_sequences(np.array([3, 2, 2]))
        writer.add_documents(np.array([3]))
        writer.finish(packing={"length": SEQ + 1, "bins": 1, "padding": 2, "eod_id": EOD})
    data = TrainingData([(writer.prefix, 1)], SEQ, 0, mask_documents=True)
    ((batch,),) = take(data, BatchLayout(1, 1), Rank(), 0, 1)
    assert batch.tokens.tolist() == [[5, 6, EOD, 7, EOD, EOD]]
    assert batch.targets.tolist() == [[6, EOD, 7, EOD, IGNORED_TARGET, IGNORED_TARGET]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]] and batch.num_documents == 3


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_ids_are_widened_to_what_they_were(dtype):
    limits = np.iinfo(dtype)
    ids = np.array([0, 1, limits.max // 2 + 1, limits.max], dtype)
    widened = widen(torch.from_numpy(without_unsigned(ids)), unsigned=dtype == np.uint16)
    assert widened.dtype == torch.int64 and widened.tolist() == ids.tolist()


class Copies:
    """Stands in for a GPU's stream: copies that are enqueued happen when an event behind them is waited for."""

    def __init__(self):
        self.pending, self.done = [], []

    def enqueue(self, buffer):
        self.pending.append(buffer)

    def event(self):
        copies = self

        class Event:
            def record(self):
                self.behind = len(copies.pending) + len(copies.done)

            def synchronize(self):
                while len(copies.done) < self.behind:
                    copies.done.append(copies.pending.pop(0).clone())

        return Event()


def test_a_buffer_is_written_again_only_once_it_was_read():
    copies = Copies()
    ring = PinnedRing(copies.event, pin_memory=False)
    shapes = itertools.cycle([(2, 3), (2, 3), (1, 3)])
    arrays = [np.full(next(shapes), number, np.int16) for number in range(12)]
    for array in arrays:
        with ring.filled(array) as buffer:
            copies.enqueue(buffer)
    assert len({tensor.data_ptr() for tensor in copies.pending}) <= 2 * PinnedRing.TURNS
    copies.done += [tensor.clone() for tensor in copies.pending]
    assert all(np.array_equal(done, array) for done, array in zip(copies.done, arrays, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mask_documents", [False, True])
def test_the_same_on_a_gpu(prefix, mask_documents):
    """Taken as fast as they come, with work on the stream that computes, and used after the next ones arrived."""
    data, layout = TrainingData([(prefix, 1)], SEQ, 1, mask_documents=mask_documents), BatchLayout(64, 4)
    here = take(data, layout, Rank(), 0, 50)
    busy = torch.randn(2048, 2048, device="cuda")
    there = []
    with StepBatches(data, layout, Rank(device="cuda"), 0, 50) as batches:
        for _ in range(50):
            busy = busy @ busy / 2048
            there.append([replace_device(batch) for batch in batches.next()])
    for ours, theirs in zip(itertools.chain(*here), itertools.chain(*there), strict=True):
        for name in ("tokens", "targets", "positions"):
            if getattr(ours, name) is not None:
                assert torch.equal(getattr(ours, name), getattr(theirs, name).cpu()), name


def replace_device(batch):
    """A copy that the computing stream makes in its turn, so that `batch` itself is let go at once."""
    assert batch.tokens.is_cuda and batch.tokens.dtype == torch.int64
    return batch._replace(
        tokens=batch.tokens.clone(),
        targets=batch.targets.clone(),
        positions=None if batch.positions is None else batch.positions.clone(),
    )
