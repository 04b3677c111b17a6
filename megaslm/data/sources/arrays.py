"""Token ids in .npy and .npz files: a 1-D array is a document, and so is every row of a 2-D array.

Rows of an .npy file are read where they lie, so that it may have any size; an array in an .npz archive is read as a
whole. The arrays of an archive are read in the order of their names.
"""

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np

from megaslm.data.sources.records import (
    EMPTY,
    Piece,
    PieceContent,
    ReadOptions,
    SourceFile,
    damaged,
    open_file,
)

# What damaged headers, archives and compressed data make the libraries raise; OSError is bz2's too.
DAMAGES = (
    ValueError,
    OverflowError,
    EOFError,
    SyntaxError,
    tokenize.TokenError,
    OSError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


class Header(NamedTuple):
    """What an array in NumPy's format is: `start` is the byte at which its data begins."""

    shape: tuple[int, ...]
    order: str
    dtype: np.dtype
    start: int

    @property
    def documents(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Unreadable(Exception):
    """Why a file, or an array of an archive, gives no token ids."""


def plan(file: SourceFile, options: ReadOptions, unit_bytes: int) -> Iterator[Piece]:
    """Rows of an array, or members of an archive, put together to `unit_bytes`."""
    try:
        with open_file(file) as stream:
            if _is_archive(file):
                archive, members = _open_archive(stream)
                ranges = _members_together([_member_weight(archive, member) for member in members], unit_bytes)
            else:
                ranges = _rows_together(_header(stream, file.size), unit_bytes)
    except Unreadable as reason:
        yield damaged(file, 0, str(reason), file.size)
        return
    total = max(1, sum(weight for _, _, weight in ranges))
    for start, stop, weight in ranges:
        yield Piece(file, "array", start, stop, size=file.size * weight // total, weight=weight)


def read(piece: Piece, options: ReadOptions) -> PieceContent:
    """The documents of the piece, each an array of its own."""
    content = PieceContent()
    with open_file(piece.file) as stream:
        try:
            if _is_archive(piece.file):
                _read_members(piece, stream, content, options)
            else:
                _read_rows(piece, stream, content, options)
        except Unreadable as reason:
            content.note_fault(None, str(reason))
    return content


def _read_rows(piece: Piece, stream: IO[bytes], content: PieceContent, options: ReadOptions) -> None:
    header = _header(stream, piece.file.size)
    array = np.memmap(stream, header.dtype, "r", header.start, header.shape, header.order)
    content.numbered = array.ndim == 2
    _add(content, array[piece.start : piece.stop] if array.ndim == 2 else array, options)


def _read_members(piece: Piece, stream: IO[bytes], content: PieceContent, options: ReadOptions) -> None:
    archive, members = _open_archive(stream)
    for member in members[piece.start : piece.stop]:
        try:
            array = _read_member(archive, member, options)
        except Unreadable as reason:
            content.add_fault(f"array {member.filename!r}: {reason}")
        else:
            _add(content, array, options)


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, options: ReadOptions) -> np.ndarray:
    try:
        with archive.open(member) as data:
            header = _header(data, member.file_size)
            if header.num_bytes > options.max_document_bytes:
                raise Unreadable(f"{options.too_large(header.num_bytes)} (as .npy it is read in parts)")
            array = np.frombuffer(data.read(header.num_bytes), header.dtype).reshape(header.shape, order=header.order)
            data.read(1)  # The checksum is compared at the end.
            return array
    except DAMAGES as error:
        raise Unreadable(f"it cannot be read ({error}); write the archive again") from error


def _add(content: PieceContent, array: np.ndarray, options: ReadOptions) -> None:
    for document in array if array.ndim == 2 else [array]:
        if not document.size:
            content.add_fault(EMPTY)
        elif document.nbytes > options.max_document_bytes:
            content.add_fault(options.too_large(document.nbytes))
        else:
            content.num_records += 1
            content.arrays.append(np.array(document))
            content.numbers.append(content.num_records)


def _rows_together(header: Header, unit_bytes: int) -> list[tuple[int, int, int]]:
    """(start, stop, bytes) of the pieces of one array."""
    row = header.num_bytes // max(1, header.documents)
    step = max(1, unit_bytes // max(1, row))
    stops = ((start, min(start + step, header.documents)) for start in range(0, header.documents, step))
    return [(start, stop, (stop - start) * row) for start, stop in stops]


def _members_together(weights: list[int], unit_bytes: int) -> list[tuple[int, int, int]]:
    """(start, stop, bytes) of the pieces of an archive."""
    ranges: list[tuple[int, int, int]] = []
    for member, weight in enumerate(weights):
        if ranges and ranges[-1][2] + weight <= unit_bytes:
            start, _, before = ranges.pop()
            ranges.append((start, member + 1, before + weight))
        else:
            ranges.append((member, member + 1, weight))
    return ranges


def _is_archive(file: SourceFile) -> bool:
    return file.path.suffix.lower() == ".npz"


def _open_archive(stream: IO[bytes]) -> tuple[zipfile.ZipFile, list[zipfile.ZipInfo]]:
    """The archive and its arrays, in the order of their names."""
    try:
        archive = zipfile.ZipFile(stream)
    except DAMAGES as error:
        raise Unreadable(f"this cannot be read as npz ({error}); get the file again, or leave it out") from error
    members = sorted(archive.infolist(), key=lambda member: member.filename)
    if not members:
        raise Unreadable("the archive has no array in it; write it with numpy.savez, or leave it out")
    for before, member in zip(members, members[1:], strict=False):
        if before.filename == member.filename:
            raise Unreadable(f"the archive has two arrays {member.filename!r}; give every array a name of its own")
    return archive, members


def _member_weight(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """Bytes of its data; 0 where reading it gives a fault."""
    try:
        with archive.open(member) as data:
            return _header(data, member.file_size).num_bytes
    except (Unreadable, *DAMAGES):
        return 0


def _header(stream: IO[bytes], size: int) -> Header:
    """Of an array that fills `size` bytes. Raises Unreadable unless it is of integers, in one or two dimensions."""
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(stream)
    except DAMAGES as error:
        raise Unreadable(f"it is no array in NumPy's format ({error})") from error
    if dtype.kind not in "iu" or len(shape) not in (1, 2) or min(shape) < 0:
        raise Unreadable(
            f"it is of {dtype} with shape {shape}; token ids are integers with one dimension (a document) or two (a "
            "document a row)"
        )
    header = Header(shape, "F" if fortran_order else "C", dtype, stream.tell())
    wanted = header.start + header.num_bytes
    if size != wanted:
        what = "it is cut off" if size < wanted else "there is more behind the array"
        raise Unreadable(f"{what}: it has {size:,} bytes, and its header asks for {wanted:,}; write it again")
    return header
