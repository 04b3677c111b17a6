"""What can only be read from its start: gz and zst files, and standard input."""

import gzip
import sys
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

from megaslm.data.sources.files import format_of
from megaslm.data.sources.jsonl import READ_STEP, cut_lines
from megaslm.data.sources.records import Piece, ReadOptions, SourceFile, damaged, open_file
from megaslm.errors import UserError

OUTPUT_STEP = 1 << 18  # bytes of output that are held at most, whatever a stream was compressed by
LARGEST_WINDOW = 1 << 27  # of a zst stream: what `zstd` makes without --long=28 and more
SKIPPABLE_FRAME = 0x184D2A50  # to ...5F
RUN_LENGTH_BLOCK = 1  # one byte, and how often it stands


class DamagedStream(Exception):
    """A compressed stream that is cut off or altered; says how."""


def plan(file: SourceFile, options: ReadOptions, unit_bytes: int) -> Iterator[Piece]:
    """Decompress a file of JSON lines and cut it. Where the stream is damaged, the whole lines before that are kept."""
    compression = format_of(file.path)[1]
    damage: DamagedStream | None = None

    def chunks() -> Iterator[bytes]:
        nonlocal damage
        try:
            yield from decompress(stream, compression)
        except DamagedStream as error:
            damage = error

    with open_file(file) as stream:
        start = done = lines = 0
        for data, missing in cut_lines(chunks(), options.max_document_bytes, unit_bytes):
            if damage:  # the last part, with a line that may go on
                data, missing = data[: data.rfind(b"\n") + 1], 0
            stop, read = start + len(data) + missing, stream.tell()
            if data:
                yield Piece(file, "jsonl", start, stop, data, size=read - done, weight=len(data))
            start, done, lines = stop, read, lines + data.count(b"\n") + (missing > 0)
        if damage:
            reason = (
                f"the {compression} stream is damaged behind line {lines:,} ({damage}); what follows cannot be read: "
                "get the file again, or leave it out"
            )
            yield damaged(file, start, reason, size=file.size - done)


def plan_stdin(file: SourceFile, form: str, options: ReadOptions, unit_bytes: int) -> Iterator[Piece]:
    """Standard input, cut to lines ("jsonl") or as one document ("text"). No more than a piece is held."""
    if form == "text":
        parts = iter([keep(_stdin(), options.max_document_bytes)])
    else:
        parts = cut_lines(_stdin(), options.max_document_bytes, unit_bytes)
    start = 0
    for data, missing in parts:
        stop = start + len(data) + missing
        yield Piece(file, form, start, stop, data, weight=len(data))
        start = stop


def _stdin() -> Iterator[bytes]:
    if sys.stdin is None:
        raise UserError("standard input is closed; give a file, or pipe the data in")
    try:
        while chunk := sys.stdin.buffer.read(READ_STEP):
            yield chunk
    except OSError as error:
        raise UserError(f"cannot read standard input: {error.strerror}; give a file, or pipe the data in") from error


def keep(chunks: Iterable[bytes], limit: int) -> tuple[bytes, int]:
    """The first `limit` bytes, and how many follow."""
    kept: list[bytes] = []
    left, missing = limit, 0
    for chunk in chunks:
        kept.append(chunk[:left])
        missing += max(0, len(chunk) - left)
        left = max(0, left - len(chunk))
    return b"".join(kept), missing


def decompress(stream: IO[bytes], compression: str) -> Iterator[bytes]:
    """The content of a gz or zst file of one or many members (frames), in small parts. Raises DamagedStream."""
    return _gunzip(stream) if compression == "gz" else _unzstd(stream)


def _gunzip(stream: IO[bytes]) -> Iterator[bytes]:
    """RFC 1952. Zeros behind a member are padding."""
    members = gzip.GzipFile(fileobj=stream)
    try:
        while data := members.read1(OUTPUT_STEP):
            yield data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DamagedStream(str(error)) from None
    if not stream.tell():
        raise DamagedStream("it has no bytes")


def _unzstd(stream: IO[bytes]) -> Iterator[bytes]:
    """RFC 8878, block by block: each gives 128 KB at most, and one says of itself that it is the last of a frame."""
    import zstandard

    is_empty = True
    try:
        while magic := stream.read(4):
            if int.from_bytes(magic, "little") & ~0xF == SKIPPABLE_FRAME:
                left = int.from_bytes(_exactly(stream, 4), "little")
                while left:
                    left -= len(_exactly(stream, min(left, OUTPUT_STEP)))
            else:
                yield from _frame(stream, magic)
                is_empty = False
    except zstandard.ZstdError as error:
        raise DamagedStream(str(error)) from None
    if is_empty:
        raise DamagedStream("it holds no data")


def _frame(stream: IO[bytes], magic: bytes) -> Iterator[bytes]:
    import zstandard

    header = magic + _exactly(stream, 2)
    header += _exactly(stream, max(0, zstandard.frame_header_size(header) - len(header)))
    facts = zstandard.get_frame_parameters(header)
    if facts.window_size > LARGEST_WINDOW:
        raise DamagedStream(
            f"its window takes {facts.window_size:,} bytes, and the limit is {LARGEST_WINDOW:,}; compress the file "
            "with --long=27 at most"
        )
    frame = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()
    frame.decompress(header)
    is_last = 0
    while not is_last:
        block_header = _exactly(stream, 3)
        fields = int.from_bytes(block_header, "little")
        is_last, kind, size = fields & 1, fields >> 1 & 3, fields >> 3
        yield frame.decompress(block_header + _exactly(stream, 1 if kind == RUN_LENGTH_BLOCK else size))
    if facts.has_checksum:
        frame.decompress(_exactly(stream, 4))


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise DamagedStream("it ends too early")
    return data
