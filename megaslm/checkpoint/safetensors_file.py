"""Safetensors files: written tensor by tensor, hashed on the way; read in parts.

The format (github.com/huggingface/safetensors): the header's length (u64, little-endian), the header (JSON: type, shape
and place of every tensor, padded with spaces), then the tensors' bytes back to back, in C order.
"""

import contextlib
import hashlib
import json
import math
import os
import queue
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaslm.files import flush_to_disk

# Bytes that are converted, written and hashed at a time: they stay in the processor's cache from one to the next, and
# the memory of one conversion serves the next. A write of 16 MiB takes twice the processor's time of 16 of 1 MiB.
CHUNK = 2**20
DEVICE_CHUNK = 64 * 2**20  # of a tensor that is not in host memory
SERIAL = 2**15 - 1  # elements that torch converts without a pool of threads, which would wait where the hashes compute
CHUNKS_AHEAD = 16  # that the hash may be behind
WRITEBACK = 32 * 2**20  # bytes that are written before the disk is told to begin on them
LARGE = 128 * 2**20  # bytes of a tensor that must be gone before the next is read
TYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
BITS = {4: torch.int32, 2: torch.int16}  # by bytes of an element: numpy has no bfloat16


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when its turn to be written comes.

    dtype: in the file: float32, bfloat16 or float16.
    shape: in the file.
    read: gives it: of this shape, any float type, any strides, any device.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * self.numel()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor | LazyTensor]) -> dict[str, Any]:
    """Write tensors as a safetensors file, hashed on the way and fsynced.

    Ours instead of safetensors' own since that copies every tensor to bytes, and hides the errno of a full disk. At any
    moment there is one tensor that was read, and no second copy of it: conversion goes chunk by chunk.

    Args:
        tensors: those of torch are written as fp32, wherever they are; lazy ones in their own type.

    Returns:
        {"bytes": size of the file, "sha256": hex digest}.

    Raises:
        OSError: the disk is full, the file too large, ...
    """
    digest, size, begun = hashlib.sha256(), 0, 0
    chunks: queue.Queue[memoryview | None] = queue.Queue(maxsize=CHUNKS_AHEAD)

    def hash_chunks() -> None:
        while (chunk := chunks.get()) is not None:
            digest.update(chunk)
            del chunk  # and with it the tensor that it lies in
            chunks.task_done()

    # A chunk is hashed beside its write and the conversion of the next; all of it leaves the interpreter's lock.
    hasher = threading.Thread(target=hash_chunks, daemon=True)
    with open(path, "wb") as file:
        hasher.start()
        try:
            for chunk in _file_chunks(tensors, hashed=chunks.join):
                chunks.put(chunk)
                file.write(chunk)
                size += len(chunk)
                if size - begun >= WRITEBACK:
                    _start_writeback(file, begun, size - begun)
                    begun = size
        finally:
            chunks.put(None)
            hasher.join()
        flush_to_disk(file)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _file_chunks(tensors: Mapping[str, Tensor | LazyTensor], hashed: Callable[[], None]) -> Iterator[memoryview]:
    """All bytes of the file, header and tensors.

    Args:
        hashed: waits until nobody needs the chunks given so far.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        dtype = _file_type(tensor)
        start, end = end, end + dtype.itemsize * tensor.numel()
        header[name] = {"dtype": TYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    yield memoryview(struct.pack("<Q", len(text)) + text)
    for name, tensor in tensors.items():
        data = tensor.read() if isinstance(tensor, LazyTensor) else tensor
        assert tuple(data.shape) == tuple(tensor.shape), f"{name} is {tuple(data.shape)}, not {tuple(tensor.shape)}"
        large = data.nbytes > LARGE
        yield from _tensor_chunks(data.detach(), _file_type(tensor))
        del data
        if large:
            hashed()  # so that it is gone before the next is read


def _file_type(tensor: Tensor | LazyTensor) -> torch.dtype:
    return tensor.dtype if isinstance(tensor, LazyTensor) else torch.float32


def _tensor_chunks(tensor: Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The elements in C order as bytes of type `dtype`, at most CHUNK at a time."""
    if tensor.is_contiguous():
        tensor = tensor.view(-1)
    length = tensor.shape[0] if tensor.dim() else 1
    most = CHUNK if tensor.device.type == "cpu" else DEVICE_CHUNK
    rows = most * length // max(dtype.itemsize * tensor.numel(), 1)  # that fit in a chunk
    if rows >= length:
        if tensor.numel():
            yield memoryview(_converted(tensor, dtype).view(BITS[dtype.itemsize]).numpy()).cast("B")
    elif rows == 0:  # not even one does
        for row in tensor:
            yield from _tensor_chunks(row, dtype)
    else:
        for start in range(0, length, rows):
            yield from _tensor_chunks(tensor[start : start + rows], dtype)


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In host memory, contiguous; the tensor itself where it is so already."""
    if tensor.dim() != 1 or tensor.dtype == dtype or tensor.device.type != "cpu":
        return tensor.to("cpu", dtype).contiguous()
    out = torch.empty_like(tensor, dtype=dtype)
    for target, part in zip(out.split(SERIAL), tensor.split(SERIAL), strict=True):
        target.copy_(part)
    return out


def _start_writeback(file, start: int, length: int) -> None:
    """Let the disk begin on what was written, beside the hash and the next chunk.

    Linux starts by itself only when much of the memory is dirty, and the fsync would then wait for everything: 1.1 GB/s
    became 3 GB/s on the disk where this was measured.
    """
    if hasattr(os, "posix_fadvise"):
        file.flush()
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)


class SafetensorsFile:
    """A safetensors file, whose tensors are read in parts.

    Ours instead of safetensors' own, which maps the whole file: every page that was ever looked at counts as memory of
    this process until the file is closed. It is opened anew for every read, since a model may lie in more files than a
    process may have open. Reads are independent of each other: threads may share it.

    Args:
        hold: keep it open: it can then be read until `close`, even if it is deleted meanwhile.

    Attributes:
        shapes: of the tensors, by name.
        types: of the tensors, by name, as the format spells them ("F32", "BF16", ...).

    Raises:
        OSError: it can't be opened or read.
        ValueError: it is not a safetensors file.
    """

    def __init__(self, path: Path, hold: bool = False) -> None:
        self.path = path
        self._held: FileIO | None = None
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "rb", buffering=0))
            self._read_header(file)
            if hold:
                stack.pop_all()
                self._held = file
                weakref.finalize(self, file.close)

    def _read_header(self, file: FileIO) -> None:
        self._size = size = os.fstat(file.fileno()).st_size
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("its header reaches past its end")
            header = json.loads(file.read(length))
            self._data = 8 + length
            self._entries = {
                name: (entry["dtype"], math.prod(map(index, entry["shape"])), self._data + entry["data_offsets"][0])
                for name, entry in header.items()
                if name != "__metadata__"
            }
            self.shapes = {name: tuple(header[name]["shape"]) for name in self._entries}
            self.types: dict[str, str] = {name: header[name]["dtype"] for name in self._entries}
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it is not a safetensors file: {error}") from error

    def map(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Elements [start, stop) of a flattened tensor, mapped: its pages are memory of this process while it lives.

        What is written to it does not reach the file. Reading maps at the rate of memory; memory of our own would first
        have to be got from the system, page by page, which takes longer than the copy. The file must stay whole, which
        a file of a checkpoint does: where it is cut short, or its disk is lost, the look at a lost page ends the
        process (SIGBUS). Deleting it does no harm, on a local disk.

        Raises:
            OSError: it can't be read.
            ValueError: the file has no such elements of this type.
        """
        place = self._place(name, start, stop, dtype)
        if start == stop:
            return torch.empty(0, dtype=dtype)
        length = (stop - start) * dtype.itemsize
        with self._opened() as file:
            pages = np.memmap(file, np.uint8, mode="c", offset=place, shape=(length,))
        return torch.from_numpy(pages).view(dtype)

    def read_into(self, out: Tensor, name: str, start: int) -> None:
        """Fill `out` (n,), contiguous in host memory, with elements [start, start + n) of a flattened tensor.

        Raises as `map`.
        """
        place = self._place(name, start, start + out.numel(), out.dtype)
        left = memoryview(out.view(torch.uint8).numpy())
        with self._opened() as file:
            while left:
                count = os.preadv(file.fileno(), [left], place)  # a part of it, where there are gigabytes to read
                if not count:
                    raise ValueError(f"it ends within {name}")
                left, place = left[count:], place + count

    @contextlib.contextmanager
    def _opened(self) -> Iterator[FileIO]:
        if self._held is not None:
            yield self._held
        else:
            with open(self.path, "rb", buffering=0) as file:
                yield file

    def _place(self, name: str, start: int, stop: int, dtype: torch.dtype) -> int:
        """Where in the file the elements begin, in bytes."""
        stored, numel, place = self._entries.get(name, (None, 0, 0))
        if stored != TYPE_NAMES[dtype] or stop > numel:
            raise ValueError(f"it lacks elements {start} to {stop} of a {TYPE_NAMES[dtype]} tensor {name}")
        if not self._data <= place <= self._size - numel * dtype.itemsize:
            raise ValueError(f"{name} is not within it")
        return place + start * dtype.itemsize

    def close(self) -> None:
        """Let go of a file that is held; it can be read as long as it is there."""
        if self._held is not None:
            self._held.close()
            self._held = None
