"""Parquet files: every row is a record. No other columns are read than the documents are made of.

A piece is some row groups, which a worker reads. A row group that is larger than two units, or may be once it is
decoded, can only be read from its start, so that the planning process does it, a few rows at a time, and hands on what
makes up a unit as an Arrow stream. The file's pages are held as a whole: 1 MB each mostly, more where rows are large.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megaslm.data.sources.records import (
    Piece,
    PieceContent,
    ReadOptions,
    SourceFile,
    content_of,
    damaged,
    open_file,
)

if TYPE_CHECKING:
    import pyarrow

READ_BUFFER = 1 << 20
# Rows decoded at once: those of a piece, whose size is known, and those of a row group of any size.
BATCH_ROWS = 256
PLANNED_ROWS = 16
# Bytes of a row in memory at least.
ROW_BYTES = 64
# A dictionary stores a text once that many rows have. Where a row takes more than this it cannot hide much.
HIDING_ROW_BYTES = 1024


class Unreadable(Exception):
    """Why the rest of a file cannot be read."""


def plan(file: SourceFile, options: ReadOptions, unit_bytes: int) -> Iterator[Piece]:
    """Row groups put together to `unit_bytes` of the columns that are read, or rows of a larger one."""
    row = size = 0
    try:
        for piece in _plan(file, options, unit_bytes):
            yield piece
            row, size = piece.stop, size + piece.size
    except Unreadable as reason:
        yield damaged(file, row, str(reason), file.size - size)


def _plan(file: SourceFile, options: ReadOptions, unit_bytes: int) -> Iterator[Piece]:
    import pyarrow

    names = list(options.record_text.names)
    with _open(file) as parquet:
        if fault := column_fault(parquet.schema_arrow, options):
            raise Unreadable(fault)
        metadata = parquet.metadata
        share = file.size / max(1, metadata.num_rows)
        start = first = weight = 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            stored, decoded = _group_bytes(metadata.row_group(group), names)
            if first > start and weight + decoded > unit_bytes:
                yield Piece(file, "parquet", start, first, size=int(share * (first - start)), weight=weight)
                start, weight = first, 0
            if decoded > 2 * unit_bytes:
                at_once = max(1, min(PLANNED_ROWS, rows * unit_bytes // max(1, stored)))
                batches = parquet.iter_batches(at_once, [group], columns=names, use_threads=False)
                for table in together((pyarrow.Table.from_batches([batch]) for batch in batches), unit_bytes):
                    yield as_piece(file, start, table, int(share * table.num_rows))
                    start += table.num_rows
            else:
                weight += decoded
            first += rows
        if first > start:
            yield Piece(file, "parquet", start, first, size=int(share * (first - start)), weight=weight)


def _group_bytes(group: "pyarrow.parquet.RowGroupMetaData", names: list[str]) -> tuple[int, int]:
    """What a row group stores of the columns, and what that may become when it is decoded."""
    stored = decoded = 0
    for column in map(group.column, range(group.num_columns)):
        if column.path_in_schema in names:
            num_bytes = column.total_uncompressed_size
            hides = column.has_dictionary_page and num_bytes < group.num_rows * HIDING_ROW_BYTES
            stored += num_bytes
            # No value is longer than all that is stored.
            decoded += num_bytes * group.num_rows if hides and column.physical_type == "BYTE_ARRAY" else num_bytes
    return stored, max(decoded, group.num_rows * ROW_BYTES)


def together(tables: Iterable["pyarrow.Table"], unit_bytes: int) -> Iterator["pyarrow.Table"]:
    """The same rows in tables of about `unit_bytes`; a larger one has a single row.

    What `tables` raises is raised when all rows before it have been handed on.
    """
    import pyarrow

    held: list[pyarrow.Table] = []
    num_bytes, failure = 0, None
    try:
        for part in _in_parts(tables, unit_bytes):
            part_bytes = max(part.nbytes, part.num_rows * ROW_BYTES)
            if held and num_bytes + part_bytes > unit_bytes:
                yield pyarrow.concat_tables(held, promote_options="default").combine_chunks()
                held, num_bytes = [], 0
            held.append(part)
            num_bytes += part_bytes
    except Exception as error:
        failure = error
    if held:
        yield pyarrow.concat_tables(held, promote_options="default").combine_chunks()
    if failure:
        raise failure


def _in_parts(tables: Iterable["pyarrow.Table"], unit_bytes: int) -> Iterator["pyarrow.Table"]:
    """Tables larger than `unit_bytes` row by row; without dictionary types, which do not tell what they decode to."""
    for table in tables:
        for index, field in enumerate(table.schema):
            if (kind := _value_type(field.type)) != field.type:
                table = table.set_column(index, field.name, table.column(index).cast(kind))
        if table.nbytes <= unit_bytes:
            yield table
        else:
            yield from (table.slice(row, 1) for row in range(table.num_rows))


def as_piece(file: SourceFile, start: int, rows: "pyarrow.Table", size: int) -> Piece:
    """Rows that have been read already, from row `start` of the file on."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, rows.schema) as writer:
        writer.write(rows)
    data = sink.getvalue().to_pybytes()
    return Piece(file, "parquet", start, start + rows.num_rows, data, size, weight=len(data))


def read(piece: Piece, options: ReadOptions) -> PieceContent:
    """The records of the piece, up to the first that cannot be read."""
    failure: Unreadable | None = None
    row = piece.start

    def records() -> Iterator[dict]:
        nonlocal failure, row
        try:
            for batch in _batches(piece, options):
                yield from _records(batch, options.record_text.names)
                row += batch.num_rows
        except Unreadable as reason:
            failure = reason

    content = content_of(records(), options)
    content.num_records = piece.stop - piece.start
    if failure:
        content.note_fault(None, f"rows {row + 1:,} to {piece.stop:,}: {failure}")
    return content


def _batches(piece: Piece, options: ReadOptions) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow

    if piece.data is not None:
        yield from pyarrow.ipc.open_stream(piece.data)
    else:
        names = list(options.record_text.names)
        with _open(piece.file) as parquet:
            for group in _row_groups(parquet.metadata, piece):
                yield from parquet.iter_batches(BATCH_ROWS, [group], columns=names, use_threads=False)


def _records(batch: "pyarrow.RecordBatch", names: tuple[str, ...]) -> Iterator[dict]:
    columns = [_values(batch.column(name)) for name in names]
    return (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))


def _values(column: "pyarrow.Array") -> list:
    """As Python's objects; a string that is not valid UTF-8 stays bytes."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        column = column.cast(_value_type(column.type)).cast(pyarrow.large_binary())
        return [_text_or_bytes(value) for value in column.to_pylist()]


def _text_or_bytes(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def column_fault(schema: "pyarrow.Schema", options: ReadOptions) -> str | None:
    """Why the columns that are read are not there, or not text (in a template: text or numbers)."""
    from pyarrow import types

    there = ", ".join(f"{field.name} ({field.type})" for field in list(schema)[:20]) or "none"
    for name in options.record_text.names:
        if name not in schema.names:
            return f"there is no column {name!r} (its columns: {there}); see text_key and template"
        if schema.names.count(name) > 1:
            return f"there are {schema.names.count(name)} columns {name!r}; give every column a name of its own"
        kind = _value_type(schema.field(name).type)
        # What has only nulls is of type null; every row is a fault then.
        if any(
            is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
        ):
            continue
        if options.record_text.template is None:
            return f"column {name!r} is {kind}, not text (its columns: {there}); see text_key"
        if not (types.is_integer(kind) or types.is_floating(kind)):
            return f"column {name!r} is {kind}; a template takes text and numbers"
    return None


def _value_type(kind: "pyarrow.DataType") -> "pyarrow.DataType":
    from pyarrow import types

    return kind.value_type if types.is_dictionary(kind) else kind


def _row_groups(metadata: "pyarrow.parquet.FileMetaData", piece: Piece) -> list[int]:
    """Those whose rows the piece covers."""
    groups, row = [], 0
    for group in range(metadata.num_row_groups):
        if piece.start <= row < piece.stop:
            groups.append(group)
        row += metadata.row_group(group).num_rows
    return groups


@contextmanager
def _open(file: SourceFile) -> Iterator["pyarrow.parquet.ParquetFile"]:
    """Raises Unreadable if the file is damaged, also where that is seen only while it is read."""
    import pyarrow
    import pyarrow.parquet

    with open_file(file) as stream:
        try:
            # With a buffer it holds a part of a column, else all of the row group's.
            with pyarrow.parquet.ParquetFile(
                stream, buffer_size=READ_BUFFER, pre_buffer=False, page_checksum_verification=True
            ) as parquet:
                yield parquet
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise Unreadable(
                f"this cannot be read as parquet ({reason}); get the file again, or leave it out"
            ) from error
