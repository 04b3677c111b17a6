"""Lines of JSON: a file is cut by bytes, and a piece holds the lines that start in it."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import IO

import orjson

from megaslm.data.sources.fields import RecordFault
from megaslm.data.sources.records import Piece, PieceContent, ReadOptions, SourceFile, open_file, printable

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
SURROGATE = re.compile("[\ud800-\udfff]")
# Read with a piece, so that the end of its last line is mostly there already; and the step for lines that are longer.
READ_AHEAD = 1 << 16
READ_STEP = 1 << 20


def plan(file: SourceFile, options: ReadOptions, unit_bytes: int) -> Iterator[Piece]:
    """Equal parts of the file, which is not read."""
    for start in range(0, file.size, unit_bytes):
        stop = min(start + unit_bytes, file.size)
        yield Piece(file, "jsonl", start, stop, size=stop - start, weight=stop - start)


def read(piece: Piece, options: ReadOptions) -> PieceContent:
    """The records of the piece."""
    if piece.data is not None:
        begin, end, missing = 0, len(piece.data), piece.stop - piece.start - len(piece.data)
        return _parse(piece.data, _after_mark(piece, piece.data), end, missing, options)
    with open_file(piece.file) as stream:
        data, begin, end, missing = _read_lines(piece, stream, options.max_document_bytes)
    return _parse(data, begin, end, missing, options)


def _after_mark(piece: Piece, data: bytes) -> int:
    return len(BYTE_ORDER_MARK) if piece.start == 0 and data.startswith(BYTE_ORDER_MARK) else 0


def _read_lines(piece: Piece, stream: IO[bytes], limit: int) -> tuple[bytes | bytearray, int, int, int]:
    """Data, where the piece's lines begin and end in it, and how many bytes of the last line were too many to keep.

    The byte before the piece tells whether a line starts where the piece does.
    """
    before = min(piece.start, 1)
    stream.seek(piece.start - before)
    inside = before + piece.stop - piece.start
    data = stream.read(inside + READ_AHEAD)
    begin = data.find(b"\n", 0, inside - 1) + 1 if before else _after_mark(piece, data)
    if before and begin == 0:
        return data, 0, 0, 0
    end = data.find(b"\n", inside - 1) + 1
    if end or len(data) < inside + READ_AHEAD:
        return data, begin, end or len(data), 0
    held = len(data) - max(begin, data.rfind(b"\n", begin, inside - 1) + 1)
    data = bytearray(data)
    missing = 0
    while chunk := stream.read(READ_STEP):
        end = chunk.find(b"\n") + 1 or len(chunk)
        kept = min(end, max(0, limit - held))
        data += chunk[:kept]
        held += kept
        missing += end - kept
        if chunk[end - 1] == 0x0A:
            break
    return data, begin, len(data), missing


def cut_lines(chunks: Iterable[bytes], limit: int, unit_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Parts of a stream that end with a line, of `unit_bytes` at most unless a line is longer, and what is missing.

    A line is kept up to about `limit` bytes; the number that comes with a part says how many more its last line has.
    Where the cuts fall depends on the bytes of the stream alone, not on its chunks.
    """
    limit += len(BYTE_ORDER_MARK)  # which is not counted
    buffer, missing = bytearray(), 0
    searched = 0  # bytes in which no line ends, so that a long line is not looked through again and again
    for chunk in chunks:
        if missing:  # in a line that is too long
            end = chunk.find(b"\n") + 1
            missing += end or len(chunk)
            if not end:
                continue
            yield bytes(buffer), missing
            buffer, missing, searched = bytearray(), 0, 0
            chunk = chunk[end:]
        buffer += chunk
        while len(buffer) >= unit_bytes:
            searched = max(searched, unit_bytes - 1)
            cut = buffer.rfind(b"\n", 0, unit_bytes) + 1 or buffer.find(b"\n", searched) + 1
            if not cut:
                break
            with memoryview(buffer) as view:
                part = bytes(view[:cut])
            yield part, 0
            del buffer[:cut]
            searched = 0
        searched = len(buffer)
        if len(buffer) >= unit_bytes and len(buffer) > limit:
            missing = len(buffer) - limit
            del buffer[limit:]
    if buffer:
        yield bytes(buffer), missing


def _parse(data: bytes | bytearray, begin: int, end: int, missing: int, options: ReadOptions) -> PieceContent:
    """The records of data[begin:end], whose last line has `missing` bytes more."""
    whole = max(begin, data.rfind(b"\n", begin, end) + 1) if missing else end
    content = PieceContent()
    texts, numbers, faults = content.texts, content.numbers, content.faults
    number, at = 0, begin
    find, loads, limit = data.find, orjson.loads, options.max_document_bytes
    extract, stop_at_fault = options.record_text.extract, options.stop_at_fault
    with memoryview(data) as view:
        while at < whole:
            stop = find(b"\n", at, whole) + 1 or whole
            number += 1
            try:
                text = extract(loads(view[at:stop]))
            except (ValueError, LookupError, TypeError):
                text = None
            if type(text) is str and text and not text.isspace() and stop - at <= limit:
                texts.append(text)
                numbers.append(number)
            elif stop - at > limit:
                content.note_fault(number, options.too_large(stop - at))
            elif not (line := bytes(view[at:stop])).isspace():  # a blank line is no record
                try:
                    texts.append(_text(line.rstrip(b"\r\n"), options))
                    numbers.append(number)
                except RecordFault as fault:
                    content.note_fault(number, printable(str(fault)))
            if faults and stop_at_fault:
                missing = 0
                break
            at = stop
    if missing:
        number += 1
        content.note_fault(number, options.too_large(end - whole + missing))
    content.num_records = number
    return content


def _text(line: bytes, options: ReadOptions) -> str:
    """The text of a line that gave none at first. RecordFault says why it has none."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        record = _loads_leniently(line, error)
    text = options.record_text(record)
    if surrogate := SURROGATE.search(text):
        raise RecordFault(f"the text has {ascii(surrogate[0])[1:-1]}, a surrogate without its other half")
    if reason := options.fault_of(text):
        raise RecordFault(reason)
    return text


def _loads_leniently(line: bytes, error: orjson.JSONDecodeError) -> object:
    """What is not quite JSON but can be read all the same, as NaN, which Python writes. RecordFault for the rest."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as invalid:
        reason = f"byte {invalid.start} of the line is not valid UTF-8"
    except (ValueError, RecursionError):
        reason = f"broken JSON ({error.msg}, column {error.colno}); every line must be one JSON object"
    zeros = line.count(0)
    if b"\0\0\0" in line or zeros == len(line):  # never in UTF-16
        reason = f"{zeros:,} bytes of the line are zero: the file is damaged; get it again"
    elif line.startswith(UTF_16_MARKS) or 3 * zeros > len(line):
        reason = "the file is UTF-16; convert it to UTF-8"
    raise RecordFault(reason)
