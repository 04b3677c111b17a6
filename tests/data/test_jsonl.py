"""Lines of JSON, plain, compressed and from standard input."""

import gzip
import io
import itertools
import json
import re
import sys
import time
import tracemalloc

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaslm.data import TextSource
from megaslm.data.sources import EMPTY, jsonl, source, streams
from megaslm.errors import UserError

LIMIT = 60
LINES = st.one_of(
    st.text(max_size=12).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()),
    st.sampled_from([b"", b" ", b"\r", b'{"text": "cut', b'{"id": 1}', b'{"text": null}', b"[]", b'{"text": "\xff"}']),
    st.integers(LIMIT - 15, 4 * LIMIT).map(lambda length: b'{"text": "%s"}' % (b"x" * length)),
)


@st.composite
def contents(draw) -> bytes:
    lines = draw(st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r\n"])), max_size=12))
    data = b"".join(line + end for line, end in lines)
    data = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + data
    return data if draw(st.booleans()) else data.removesuffix(b"\n")


def read(path, limit=LIMIT):
    """(absolute number, text) of every document, and (absolute number, reason) of every fault."""
    found = TextSource([path], max_document_bytes=limit)
    texts, faults, before = [], [], 0
    for unit in found.units():
        for piece in unit:
            content = found.read(piece)
            texts += [(before + number, text) for number, text in zip(content.numbers, content.texts, strict=True)]
            faults += [(before + fault.number, fault.reason) for fault in content.faults]
            before += content.num_records
    return texts, faults, before


def expected(data: bytes):
    """The same by the plainest means: (number, text) of documents, the numbers of faults, the number of lines."""
    lines = re.findall(rb"[^\n]*\n|[^\n]+", data.removeprefix(b"\xef\xbb\xbf"))
    texts, faults = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode())["text"]
            good = len(line) <= LIMIT and text.strip()
        except (ValueError, TypeError, KeyError, AttributeError):
            good = False
        if good:
            texts.append((number, text))
        else:
            faults.append(number)
    return texts, faults, len(lines)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=contents(), unit_bytes=st.integers(1, 150), step=st.integers(3, 40))
def test_pieces_give_what_the_whole_file_gives(tmp_path, monkeypatch, data, unit_bytes, step):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    if data:
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data[: step * 2]) + gzip.compress(data[step * 2 :]))
        (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(data[:step]) + zstandard.compress(data[step:]))
    whole = read(path)
    with monkeypatch.context() as patch:
        patch.setattr(source, "UNIT_BYTES", unit_bytes)
        patch.setattr(jsonl, "READ_AHEAD", step)
        patch.setattr(jsonl, "READ_STEP", step)
        patch.setattr(streams, "READ_STEP", step)
        patch.setattr(streams, "OUTPUT_STEP", step)
        assert read(path) == whole
        if data:
            assert read(tmp_path / "a.jsonl.gz") == whole
            assert read(tmp_path / "a.jsonl.zst") == whole
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
            assert read("-") == whole
    texts, faults, lines = expected(data)
    assert whole[0] == texts
    assert [number for number, _ in whole[1]] == faults
    assert whole[2] == lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"a.jsonl:2: broken JSON \(unexpected end of data, column 14\)"),
        ('{"text": "äöü", x}'.encode(), r"a.jsonl:2: broken JSON \(unexpected character.*, column 17\)"),
        (b'{"text": NaN}', r"a.jsonl:2: field 'text' is a float"),
        (b'{"text": "x"}\x0c', r"a.jsonl:2: broken JSON"),
        (b"\0" * 70, r"a.jsonl:2: 70 bytes of the line are zero: the file is damaged"),
        (b"\0" * 7 + b'{"text": "x"}', r"a.jsonl:2: 7 bytes of the line are zero: the file is damaged"),
        ('{"text": "x"}'.encode("utf-16"), r"a.jsonl:2: the file is UTF-16; convert it to UTF-8"),
        ('{"text": "x"}'.encode("utf-16-be"), r"a.jsonl:2: the file is UTF-16; convert it to UTF-8"),
        (b"[" * 5000, r"a.jsonl:2: broken JSON"),
        (b'{"text": "\xff"}', r"a.jsonl:2: byte 10 of the line is not valid UTF-8"),
        (b'{"body": "x", "id": 1}', r"a.jsonl:2: the record has no field 'text' \(its fields: body, id\)"),
        (b'{"\\n\\ud800": 1}', r"a.jsonl:2: the record has no field 'text' \(its fields: \\n\\ud800\)"),
        (b'{"text": 7}', r"a.jsonl:2: field 'text' is a int"),
        (b'{"text": null}', r"a.jsonl:2: field 'text' is null"),
        (b'["text"]', r"a.jsonl:2: the record is a JSON list"),
        (b'{"text": "\\ud800"}', r"a.jsonl:2: the text has \\ud800, a surrogate without its other half"),
        (b'{"text": "%s"}' % (b"x" * 9988), r"a.jsonl:2: a document of 10,001 bytes is larger .* of 10,000; split it"),
    ],
)
def test_faults(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    found = TextSource([tmp_path / "a.jsonl"], max_document_bytes=10_000)
    (unit,) = found.units()
    content = found.read(unit[0])
    assert content.texts == ["fine", "fine"] and content.numbers == [1, 3] and len(content.faults) == 1
    documents = iter(found)
    assert next(documents).text == "fine"
    with pytest.raises(UserError, match=message):
        next(documents)


def test_what_python_writes_beside_the_text(tmp_path):
    lines = ['{"text": "one", "score": NaN}', '{"text": "", "score": -Infinity}', '{"a": "\\ud800", "text": "\\u00e9"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read(tmp_path / "a.jsonl") == ([(1, "one"), (3, "é")], [(2, EMPTY)], 3)


def test_empty_documents_are_told_apart(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": "\\u0000"}\n{"text": " \\n"}\n')
    assert read(tmp_path / "a.jsonl") == ([(3, "\0")], [(1, EMPTY), (4, EMPTY)], 4)


def test_a_long_line_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "UNIT_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "')
        file.truncate(64 << 20)
        file.seek(0, io.SEEK_END)
        file.write(b'"}\n{"text": "next"}\n')
    tracemalloc.start()
    texts, faults, _ = read(path, limit=2 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == [(2, "next")]
    assert len(faults) == 1 and faults[0][0] == 1 and f"{(64 << 20) + 3:,} bytes" in faults[0][1]
    assert peak < 12 << 20


def test_a_mark_does_not_count_to_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "UNIT_BYTES", 8)
    monkeypatch.setattr(streams, "OUTPUT_STEP", 1)
    line = b'{"text": "%s"}\n' % (b"x" * (LIMIT - 13))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + line))
    assert len(line) == LIMIT and read(tmp_path / "a.jsonl.gz") == ([(1, "x" * (LIMIT - 13))], [], 1)


def test_a_long_line_takes_no_time():
    chunks = itertools.chain(itertools.repeat(b"x" * 1000, 20_000), [b"\n"])
    before = time.process_time()
    ((data, missing),) = jsonl.cut_lines(chunks, limit=1 << 30, unit_bytes=1000)
    assert len(data) == 20_000_001 and missing == 0
    assert time.process_time() - before < 2  # 15 s where all of it is searched with every chunk


TEMPLATE = "Q: {question}\nA: {answer} {{{id}}}"


def test_template(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "How many?", "answer": 3.5, "id": 7}\n{"question": "{id}", "answer": "", "id": ""}\n')
    assert [document.text for document in TextSource([path], template=TEMPLATE)] == [
        "Q: How many?\nA: 3.5 {7}",
        "Q: {id}\nA:  {}",
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"question": "x", "id": 1}', r"a.jsonl:1: the record has no field 'answer' \(its fields: question, id\)"),
        ('{"question": "x", "answer": null, "id": 1}', r"a.jsonl:1: field 'answer' is null; a template takes text and"),
        ('{"question": "x", "answer": true, "id": 1}', r"field 'answer' is a bool"),
        ('{"question": ["x"], "answer": "", "id": 1}', r"field 'question' is a list"),
        ("7", r"the record is a JSON int"),
        (
            '{"question": "x", "answer": 18446744073709551616, "id": 1}',
            r"'answer' is the number 1.8.*e\+19, whose digits",
        ),
        ('{"question": "x", "answer": NaN, "id": 1}', r"field 'answer' is the number nan"),
    ],
)
def test_faults_of_templates(tmp_path, record, message):
    (tmp_path / "a.jsonl").write_text(record)
    with pytest.raises(UserError, match=message):
        list(TextSource([tmp_path / "a.jsonl"], template=TEMPLATE))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Question", "has no field"),
        ("{{question}}", "has no field"),
        ("{question", "template '{question': expected '}'"),
        ("question}", "template 'question}': Single '}'"),
        ("{}", "every field needs a name and nothing else"),
        ("{question:>10}", "every field needs a name and nothing else"),
        ("{question!r}", "every field needs a name and nothing else"),
        ("{question:}", "every field needs a name and nothing else"),
        ("{question} {0}", "every field needs a name and nothing else"),
        ("{question[id]}", "every field needs a name and nothing else"),
    ],
)
def test_broken_templates(tmp_path, template, message):
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match=message):
        TextSource([tmp_path / "a.jsonl"], template=template)


LINE = b'{"text": "one line of many"}\n'


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_damaged_streams(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(source, "UNIT_BYTES", 4 * len(LINE))
    data = LINE * 100 + b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(20_000))
    expected_texts = [json.loads(line)["text"] for line in data.splitlines()]
    packed = gzip.compress(data) if ending == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(data)
    altered = bytearray(packed)
    altered[-3] ^= 1  # in the checksum
    for name, content in (("cut", packed[:-9]), ("altered", altered), ("other", LINE), ("zeros", b"\0" * 600)):
        path = tmp_path / f"{name}.jsonl.{ending}"
        path.write_bytes(content)
        found, whole = TextSource([path]), []
        with pytest.raises(UserError) as fault:
            whole += found
        # All lines that were whole are there, though they did not fill a unit.
        lines = re.search(
            rf"{name}.jsonl.{ending}: the {ending} stream is damaged behind line ([\d,]+) ", str(fault.value)
        )
        assert len(whole) == int(lines[1].replace(",", ""))
        assert len(whole) > 10_000 or name in ("other", "zeros") and not whole
        assert [document.text for document in whole] == expected_texts[: len(whole)]
        # What follows is one fault of the file, which the inputs behind it do not suffer from.
        pieces = [piece for unit in found.units() for piece in unit]
        assert sum(piece.size for piece in pieces) == found.num_bytes
        (fault,) = found.read(pieces[-1]).faults
        assert fault.number is None and not any(found.read(piece).faults for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("name", "reason"), [("a.jsonl.gz", "no bytes"), ("a.txt.gz", "no bytes"), ("a.txt.zst", "no data")]
)
def test_streams_without_a_byte(tmp_path, name, reason):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"{name}: the .* stream is damaged .*it (has|holds) {reason}"):
        list(TextSource([tmp_path / name]))


def test_the_window_of_a_stream_is_bounded(tmp_path):
    for log in (27, 28):
        parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=log)
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        (tmp_path / f"{log}.jsonl.zst").write_bytes(stream.compress(LINE) + stream.flush())
    assert len(list(TextSource([tmp_path / "27.jsonl.zst"]))) == 1
    with pytest.raises(UserError, match="its window takes 268,435,456 bytes, .*; compress .* with --long=27 at most"):
        list(TextSource([tmp_path / "28.jsonl.zst"]))


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_decompressing_takes_no_memory(ending):
    with io.BytesIO() as buffer:
        zeros = bytes(1 << 20)
        with (
            gzip.open(buffer, "wb")
            if ending == "gz"
            else zstandard.ZstdCompressor().stream_writer(buffer, closefd=False) as file
        ):
            for _ in range(64):
                file.write(zeros)
        packed = io.BytesIO(buffer.getvalue())
    sizes = list(map(len, streams.decompress(packed, ending)))
    assert sum(sizes) == 64 << 20 and max(sizes) <= streams.OUTPUT_STEP


def test_zeros_are_no_padding_of_zst(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINE) + bytes(600))
    with pytest.raises(UserError, match="zst stream is damaged behind line 1 "):
        list(TextSource([tmp_path / "a.jsonl.zst"]))


def test_members_padding_and_skippable_frames(tmp_path):
    lines = [b'{"text": "%d"}\n' % i for i in range(3)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[0]) + gzip.compress(lines[1] + lines[2]) + bytes(600))
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    frames = [skippable, *map(zstandard.compress, lines), skippable]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    for ending in ("gz", "zst"):
        found = TextSource([tmp_path / f"a.jsonl.{ending}"])
        assert [document.text for document in found] == ["0", "1", "2"]
        assert sum(piece.size for unit in found.units() for piece in unit) == found.num_bytes
