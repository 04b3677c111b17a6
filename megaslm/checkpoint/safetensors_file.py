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
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaslm.files import flush_to_disk

CHUNK = 64 * 2**20  # bytes that are converted, written and hashed at a time
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
    digest, size = hashlib.sha256(), 0
    chunks: queue.Queue[memoryview | None] = queue.Queue(maxsize=1)

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
                _start_writeback(file, size, len(chunk))
                size += len(chunk)
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
        large = data.nbytes > CHUNK
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
    rows = CHUNK * length // max(dtype.itemsize * tensor.numel(), 1)  # that fit in a chunk
    if rows >= length:
        if tensor.numel():
            yield memoryview(tensor.to("cpu", dtype).contiguous().view(BITS[dtype.itemsize]).numpy()).cast("B")
    elif rows == 0:  # not even one does
        for row in tensor:
            yield from _tensor_chunks(row, dtype)
    else:
        for start in range(0, length, rows):
            yield from _tensor_chunks(tensor[start : start + rows], dtype)


def _start_writeback(file, start: int, length: int) -> None:
    """Let the disk begin on what was just written, beside the hash and the next chunk.

    Linux starts by itself only when much of the memory is dirty, and the fsync would then wait for everything: 1.1 GB/s
    became 3 GB/s on the disk where this was measured.
    """
    if length >= CHUNK // 2 and hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)


class SafetensorsFile:
    """An open safetensors file, whose tensors are read in parts.

    Ours instead of safetensors' own, which maps the whole file: every page that was ever looked at counts as memory of
    this process until the file is closed. What is open can be read to the end, even if it is deleted meanwhile.

    Attributes:
        shapes: of the tensors, by name.
        types: of the tensors, by name, as the format spells them ("F32", "BF16", ...).

    Raises:
        OSError: it can't be opened or read.
        ValueError: it is not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._size = size = os.fstat(self._file.fileno()).st_size
        try:
            (length,) = struct.unpack("<Q", self._file.read(8))
            if length > size - 8:
                raise ValueError("its header reaches past its end")
            header = json.loads(self._file.read(length))
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
        have to be got from the system, page by page, which takes longer than the copy.

        Raises:
            OSError: it can't be read.
            ValueError: the file has no such elements of this type.
        """
        place = self._place(name, start, stop, dtype)
        if start == stop:
            return torch.empty(0, dtype=dtype)
        length = (stop - start) * dtype.itemsize
        return torch.from_numpy(np.memmap(self._file, np.uint8, mode="c", offset=place, shape=(length,))).view(dtype)

    def read_into(self, out: Tensor, name: str, start: int) -> None:
        """Fill `out` (n,), contiguous in host memory, with elements [start, start + n) of a flattened tensor.

        Raises as `map`.
        """
        self._file.seek(self._place(name, start, start + out.numel(), out.dtype))
        left = memoryview(out.view(torch.uint8).numpy())
        while left:
            count = self._file.readinto(left)  # a part of it, where there are gigabytes to read
            if not count:
                raise ValueError(f"it ends within {name}")
            left = left[count:]

    def _place(self, name: str, start: int, stop: int, dtype: torch.dtype) -> int:
        """Where in the file the elements begin, in bytes."""
        stored, numel, place = self._entries.get(name, (None, 0, 0))
        if stored != TYPE_NAMES[dtype] or stop > numel:
            raise ValueError(f"it lacks elements {start} to {stop} of a {TYPE_NAMES[dtype]} tensor {name}")
        if not self._data <= place <= self._size - numel * dtype.itemsize:
            raise ValueError(f"{name} is not within it")
        return place + start * dtype.itemsize

    def close(self) -> None:
        self._file.close()
