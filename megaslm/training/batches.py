"""Which samples a rank reads in a step, a pure function of the samples consumed, and a thread that reads them ahead."""

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megaslm.config import BatchLayout
from megaslm.data import IGNORED_TARGET, TrainingData
from megaslm.errors import UserError
from megaslm.parallel import Ranks


class MicroBatch(NamedTuple):
    """What one forward and backward pass reads, on the device."""

    tokens: Tensor  # [B, S] int64
    targets: Tensor  # [B, S] int64, -100 where there is nothing to predict
    positions: Tensor | None  # [B, S] int32, tokens since the start of the document; None: documents do not matter
    num_documents: int | None  # how many positions are 0


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Integer array to an int64 tensor on the device."""
    tensor = torch.from_numpy(array.astype(np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def first_samples(samples: int, layout: BatchLayout, ranks: Ranks) -> Iterator[int]:
    """The first sample of each of this rank's micro-batches in the step that starts at sample number `samples`.

    Micro-batch m of data-parallel rank r: samples + m micro dp + r micro and the micro - 1 that follow.
    """
    micro, size = layout.micro_batch_size, ranks.data_parallel_size
    for m in range(layout.accumulation_steps):
        yield samples + (m * size + ranks.data_parallel_rank) * micro


CLOSING_SECONDS = 5  # how long a thread that still reads is waited for


class StepBatches:
    """This rank's micro-batches of `steps` steps from `first_sample` on: a thread keeps up to `depth` of them ready.

        with StepBatches(data, layout, ranks, first_sample, steps) as batches:
            for _ in range(steps):
                engine.train_step(batches.next(), lr)

    On a GPU the thread also has them copied there, on a stream of its own and in the width in which they are stored.
    """

    def __init__(
        self, data: TrainingData, layout: BatchLayout, ranks: Ranks, first_sample: int, steps: int, depth: int = 2
    ):
        assert depth >= 1, "a step has to be made before it is taken"
        self._data, self._layout, self._ranks = data, layout, ranks
        self._samples, self._steps, self._left, self._depth = first_sample, steps, steps, depth
        self._transfer = CudaTransfer(ranks.device) if ranks.device.type == "cuda" else HostTransfer()
        self._ready: deque[list[Sent]] = deque()
        self._failure: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()  # of the three above
        # A daemon: a read that hangs on a lost file system must not keep a process that wants to end.
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    def next(self) -> list[MicroBatch]:
        """The next step's micro-batches; waits for them. What the thread raised comes out here, in its turn."""
        with self._changed:
            assert not self._closed and self._left > 0, "there are no more steps"
            while not self._ready and self._failure is None:
                self._changed.wait()
            if not self._ready:
                raise self._failure
            sent = self._ready.popleft()
            self._left -= 1
            self._changed.notify_all()
        return [self._finish(batch) for batch in sent]

    def close(self) -> None:
        """End the thread. One that hangs in a read is left behind after CLOSING_SECONDS. A second call does nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(CLOSING_SECONDS)

    def __enter__(self) -> "StepBatches":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _run(self) -> None:
        try:
            for _ in range(self._steps):
                if not self._has_room():
                    break
                step = self._read_step()
                with self._changed:
                    self._ready.append(step)
                    self._changed.notify_all()
        except UserError as error:  # an id over the vocabulary lies in one rank's samples
            failure = UserError(str(error), on_one_rank=True)
            failure.__cause__ = error
            self._fail(failure)
        except BaseException as error:  # a fault of ours, or an exit: `next` must not wait for what never comes
            self._fail(error)

    def _has_room(self) -> bool:
        """Wait until a step may be read: at most `depth` are ready or being read. False: closed."""
        with self._changed:
            while not self._closed and len(self._ready) >= self._depth:
                self._changed.wait()
            return not self._closed

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def _read_step(self) -> list["Sent"]:
        firsts = first_samples(self._samples, self._layout, self._ranks)
        micro = self._layout.micro_batch_size
        step = [self._transfer.send(*self._data.batch(first, micro)) for first in firsts]
        self._samples += micro * self._layout.accumulation_steps * self._ranks.data_parallel_size
        return step

    def _finish(self, sent: "Sent") -> MicroBatch:
        self._transfer.receive(sent)
        tokens, targets = sent.window[:, :-1], sent.window[:, 1:]
        padding = self._data.ignore_repeated_eod
        if padding is not None:
            # Not in place: tokens and targets are views of one window.
            targets = torch.where((tokens == padding) & (targets == padding), IGNORED_TARGET, targets)
        return MicroBatch(tokens, targets, sent.positions, sent.num_documents)


class Sent(NamedTuple):
    """A micro-batch on its way to the device, or there."""

    window: Tensor  # [B, S + 1] int64
    positions: Tensor | None  # [B, S] int32
    num_documents: int | None
    arrived: "torch.cuda.Event | None"


class HostTransfer:
    """To tensors of this process. With NumPy: torch would start a team of OpenMP threads for the one that reads."""

    def send(self, tokens: np.ndarray, positions: np.ndarray | None) -> Sent:
        window = torch.from_numpy(tokens.astype(np.int64))
        if positions is None:
            return Sent(window, None, None, None)
        return Sent(window, torch.from_numpy(positions), _count_documents(positions), None)

    def receive(self, sent: Sent) -> None:
        """Nothing is to be waited for."""


class CudaTransfer:
    """To a GPU: through pinned memory that is used in turn, on a stream beside the one that computes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.buffers = PinnedRing(torch.cuda.Event)

    def send(self, tokens: np.ndarray, positions: np.ndarray | None) -> Sent:
        # The current stream is a thread's own affair: that of the thread which computes stays as it is.
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            window = widen(self._copy(without_unsigned(tokens)), unsigned=tokens.dtype == np.uint16)
            there = None if positions is None else self._copy(positions)
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        return Sent(window, there, None if positions is None else _count_documents(positions), arrived)

    def _copy(self, array: np.ndarray) -> Tensor:
        with self.buffers.filled(array) as buffer:
            return buffer.to(self.device, non_blocking=True)

    def receive(self, sent: Sent) -> None:
        """Let the stream that computes wait for the copy; this process does not."""
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(sent.arrived)
        for tensor in (sent.window, sent.positions):
            if tensor is not None:
                # Made on the other stream, where its memory would be free for the next copy once it is let go.
                tensor.record_stream(computing)


class PinnedRing:
    """Page-locked buffers, one for each shape and type and turn, that are written again only once they were read.

    new_event: makes what `record` marks in the current stream and `synchronize` waits for (torch.cuda.Event).
    """

    TURNS = 2  # one is filled while the other is read

    def __init__(self, new_event, pin_memory: bool = True):
        self.new_event, self.pin_memory = new_event, pin_memory
        self.slots: dict[tuple, deque] = {}

    @contextlib.contextmanager
    def filled(self, array: np.ndarray) -> Iterator[Tensor]:
        """A buffer with the content of `array`; copies from it are to be enqueued before the block is left."""
        turns = self.slots.setdefault((array.dtype, array.shape), deque())
        if len(turns) < self.TURNS:
            buffer = torch.empty_like(torch.from_numpy(array), pin_memory=self.pin_memory)
            slot = buffer, buffer.numpy(), self.new_event()
        else:
            slot = turns.popleft()
            slot[2].synchronize()
        buffer, view, event = slot
        view[...] = array  # with NumPy, see HostTransfer
        yield buffer
        event.record()
        turns.append(slot)


def without_unsigned(tokens: np.ndarray) -> np.ndarray:
    """uint16 ids as int16 with the same bits: torch computes with hardly any unsigned type. Others as they are."""
    return tokens.view(np.int16) if tokens.dtype == np.uint16 else tokens


def widen(ids: Tensor, unsigned: bool) -> Tensor:
    """int64 ids; `unsigned`: the int16 are bits of uint16, see `without_unsigned`."""
    return ids.to(torch.int64) & 0xFFFF if unsigned else ids.to(torch.int64)


def _count_documents(positions: np.ndarray) -> int:
    return int(np.count_nonzero(positions == 0))
