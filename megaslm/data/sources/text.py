"""Text files, plain or compressed: one file is one document."""

from collections.abc import Iterator

from megaslm.data.sources.files import format_of
from megaslm.data.sources.jsonl import BYTE_ORDER_MARK
from megaslm.data.sources.records import Piece, PieceContent, ReadOptions, SourceFile, open_file
from megaslm.data.sources.streams import DamagedStream, decompress, keep

COMPRESSED_WEIGHT = 4  # what text is compressed by, about


def plan(file: SourceFile, options: ReadOptions, unit_bytes: int) -> Iterator[Piece]:
    """The whole file."""
    compression = format_of(file.path)[1]
    yield Piece(file, "text", size=file.size, weight=file.size * (COMPRESSED_WEIGHT if compression else 1))


def read(piece: Piece, options: ReadOptions) -> PieceContent:
    """The text of the file, without a byte order mark."""
    content = PieceContent(numbered=False)
    try:
        data, missing = _read(piece, options.max_document_bytes)
    except DamagedStream as damage:
        content.add_fault(f"the compressed stream is damaged ({damage}); get the file again, or leave it out")
        return content
    if missing:
        content.add_fault(options.too_large(len(data) + missing))
        return content
    try:
        content.add_text(data.removeprefix(BYTE_ORDER_MARK).decode(), options)
    except UnicodeDecodeError as error:
        at = error.start + len(data) - len(error.object)
        line = data.count(b"\n", 0, at) + 1
        content.add_fault(f"byte {at} (line {line}) is not valid UTF-8; convert the file to UTF-8, or decompress it")
    return content


def _read(piece: Piece, limit: int) -> tuple[bytes, int]:
    """The data, up to `limit` bytes of it, and how many more there are."""
    if piece.data is not None:
        return piece.data, piece.stop - len(piece.data)
    compression = format_of(piece.file.path)[1]
    with open_file(piece.file) as stream:
        if compression:
            return keep(decompress(stream, compression), limit)
        return stream.read(limit), max(0, piece.file.size - limit)
