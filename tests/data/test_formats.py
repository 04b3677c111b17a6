"""Parquet, token arrays, PDF, compressed text and Hugging Face datasets."""

import gzip
import logging
import os
import re
import warnings
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pypdf
import pytest
import zstandard
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from megaslm.data import TextSource
from megaslm.data.sources import EMPTY, source
from megaslm.errors import UserError


def texts(inputs, **options):
    return [document.text for document in TextSource(inputs, **options)]


def contents(path, **options):
    found = TextSource([path], **options)
    return [(piece, found.read(piece)) for unit in found.units() for piece in unit]


def faults(path, **options):
    """(number, reason) of every record, or rest of a file, that gives no document."""
    return [tuple(fault) for _, content in contents(path, **options) for fault in content.faults]


# ---------------------------------------------------------------- parquet


def write_parquet(path, columns, **options):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.mark.parametrize("row_group_size", [2, 40, 100])
def test_parquet(tmp_path, monkeypatch, row_group_size):
    rows = [f"row {i} é " + "x" * (i % 7) for i in range(100)]
    columns = {"id": list(range(100)), "text": rows, "other": [["x"]] * 100}
    path = write_parquet(tmp_path / "a.parquet", columns, row_group_size=row_group_size)
    monkeypatch.setattr(source, "UNIT_BYTES", 300)
    read = contents(path)
    assert 3 < len(read) <= 50
    assert [text for _, content in read for text in content.texts] == rows == texts([path])
    assert [(piece.start, piece.stop) for piece, _ in read] == [
        (start, start + content.num_records)
        for start, (_, content) in zip(np.cumsum([0, *(c.num_records for _, c in read)]), read, strict=False)
    ]
    assert 0.9 < sum(piece.size for piece, _ in read) / path.stat().st_size <= 1
    assert str(list(TextSource([path]))[41]) == f"{path}:42"


@pytest.mark.parametrize(
    "kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())], ids=str
)
def test_text_types_of_parquet(tmp_path, kind):
    column = pyarrow.array(["one", "two", "one"]).cast(kind)
    assert texts([write_parquet(tmp_path / "a.parquet", {"text": column})]) == ["one", "two", "one"]


def test_faults_of_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["one", None, " ", "x" * 20], "n": [1, 2.5, None, 4]})
    ((_, content),) = contents(path, max_document_bytes=10)
    assert content.texts == ["one"]
    assert [fault.number for fault in content.faults] == [2, 3, 4]
    assert content.faults[0].reason == "field 'text' is null, not text" and content.faults[1].reason == EMPTY
    assert content.faults[2].reason.startswith("a document of 20 bytes is larger than the limit of 10")
    with pytest.raises(UserError, match="a.parquet:2: field 'text' is null"):
        texts([path])
    ((_, content),) = contents(path, template="{n}: {text}")
    assert content.texts == ["1.0: one", "4.0: " + "x" * 20]


@pytest.mark.parametrize("unit_bytes", [50, source.UNIT_BYTES])
@pytest.mark.parametrize("dictionary", [False, True])
def test_invalid_utf8_in_parquet(tmp_path, monkeypatch, dictionary, unit_bytes):
    monkeypatch.setattr(source, "UNIT_BYTES", unit_bytes)
    column = pyarrow.array([b"one", b"\xff\xfe", None, b"four"]).view(pyarrow.string())
    if dictionary:
        column = column.dictionary_encode()
    path = write_parquet(tmp_path / "a.parquet", {"text": column, "n": [1, 2, 3, 4]})
    assert [text for _, content in contents(path) for text in content.texts] == ["one", "four"]
    assert faults(path)[0][1] == "field 'text' is bytes that are not valid UTF-8, not text"
    with pytest.raises(UserError, match="a.parquet:2: field 'text' is bytes that are not valid UTF-8; a template"):
        texts([path], template="{n} {text}")


def test_wrong_columns_of_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": [1], "body": ["x"], "list": [["x"]], "none": [None]})
    columns = r"\(its columns: text \(int64\), body \(string\), list \(list"
    for message, options in (
        (rf"column 'text' is int64, not text {columns}", {}),
        (rf"there is no column 'content' {columns}", {"text_key": "content"}),
        (r"column 'list' is list.*; a template takes text and numbers", {"template": "{body} {list}"}),
    ):
        with pytest.raises(UserError, match=f"a.parquet: {message}"):
            texts([path], **options)
        (fault,) = faults(path, **options)
        assert fault[0] is None
    assert texts([path], template="{body}: {text}") == ["x: 1"]
    assert faults(path, text_key="none") == [(1, "field 'none' is null, not text")]
    twice = pyarrow.table([["x"], ["y"]], names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(UserError, match="a.parquet: there are 2 columns 'text'; give every column a name"):
        texts([path])


def test_other_columns_of_parquet_are_not_read(tmp_path):
    columns = {"text": ["some text"] * 3, "other": ["unused" * 100] * 3}
    path = write_parquet(tmp_path / "a.parquet", columns, write_page_checksum=True, compression="none")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"unusedunused", b"UNUSEDUNUSED", 10))
    assert texts([path]) == ["some text"] * 3
    assert faults(path, text_key="other")


@pytest.mark.parametrize("unit_bytes", [1000, 64_000, source.UNIT_BYTES])
def test_damaged_parquet(tmp_path, monkeypatch, unit_bytes):
    monkeypatch.setattr(source, "UNIT_BYTES", unit_bytes)
    rows = [f"row {i:5} of the text" for i in range(3000)]
    path = write_parquet(
        tmp_path / "a.parquet",
        {"text": rows},
        use_dictionary=False,
        compression="none",
        row_group_size=1000,
        write_page_checksum=True,
    )
    data = path.read_bytes()
    path.write_bytes(data[:100])
    with pytest.raises(UserError, match=r"a.parquet: this cannot be read as parquet \(.*; get the file again"):
        texts([path])
    assert len(faults(path)) == 1
    changed = data.index(b"row  1500")  # one letter, in the second row group
    path.write_bytes(data[:changed] + b"R" + data[changed + 1 :])
    read = contents(path)
    (fault,) = faults(path)
    assert fault[0] is None and "this cannot be read as parquet (" in fault[1] and "CRC" in fault[1]
    kept = [text for _, content in read for text in content.texts]
    # The rest of a piece is lost, which here is one row group of many; what is read in order is lost from there on.
    assert kept == rows[:1000] + (rows[2000:] if unit_bytes == 64_000 else [])
    with pytest.raises(UserError, match="a.parquet: .*CRC"):
        texts([path])


def test_repeated_text_in_parquet(tmp_path, monkeypatch):
    """What a dictionary holds once is cut by what it decodes to."""
    monkeypatch.setattr(source, "UNIT_BYTES", 100_000)
    rows = ["y" * 30_000, "x" * 5000, *["z" * 5000] * 998]
    for kind in (pyarrow.string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        path = write_parquet(tmp_path / "a.parquet", {"text": pyarrow.array(rows).cast(kind), "n": range(1000)})
        assert path.stat().st_size < 20_000
        found = TextSource([path])
        pieces = [piece for unit in found.units() for piece in unit]
        read = [found.read(piece).texts for piece in pieces]
        assert [text for piece in read for text in piece] == rows == texts([path])
        assert len(read) < 70 and max(sum(map(len, piece)) for piece in read) <= 100_000


def test_large_rows_of_parquet_are_read_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "UNIT_BYTES", 10_000)
    rows = [str(i) * 25_000 for i in range(8)]
    path = write_parquet(tmp_path / "a.parquet", {"text": rows})
    assert [content.texts for _, content in contents(path)] == [[row] for row in rows]


# ---------------------------------------------------------------- token arrays


def test_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "UNIT_BYTES", 100)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    flat, rows = np.arange(70, dtype=np.uint16), np.arange(120, dtype=np.int64).reshape(30, 4)
    np.save(tmp_path / "deep" / "flat.npy", flat)
    np.save(tmp_path / "deep" / "er" / "rows.npy", rows)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(rows[:5]))
    np.savez_compressed(tmp_path / "b.npz", b=rows[:2], a=flat[:3], c=flat)
    found = TextSource([tmp_path])
    assert found.num_other_files == 0
    by_name: dict = {}
    for unit in found.units():
        for piece in unit:
            content = found.read(piece)
            assert content.texts == [] and content.num_records == len(content.arrays)
            by_name.setdefault(piece.file.name, []).extend(content.arrays)
    assert [array.dtype for array in by_name["deep/flat.npy"]] == [np.uint16]
    for name, expected in (
        ("deep/flat.npy", [flat]),
        ("deep/er/rows.npy", rows),
        ("fortran.npy", rows[:5]),
        ("b.npz", [flat[:3], *rows[:2], flat]),
    ):
        assert [array.tolist() for array in by_name[name]] == [array.tolist() for array in expected]
    with pytest.raises(UserError, match="holds token ids, and this needs text"):
        list(found)


def test_empty_and_large_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 0), np.int32))
    ((_, content),) = contents(tmp_path / "a.npy")
    assert [tuple(fault) for fault in content.faults] == [(1, EMPTY), (2, EMPTY)]
    np.save(tmp_path / "b.npy", np.zeros(100, np.int32))
    ((_, content),) = contents(tmp_path / "b.npy", max_document_bytes=399)
    assert content.faults[0].number is None and "a document of 400 bytes is larger" in content.faults[0].reason
    np.savez(tmp_path / "c.npz", a=np.zeros(100, np.int32), b=np.ones(2, np.int32))
    ((_, content),) = contents(tmp_path / "c.npz", max_document_bytes=399)
    assert content.faults[0].number == 1 and "array 'a.npy': a document of 400 bytes" in content.faults[0].reason
    assert content.numbers == [2] and content.arrays[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"is of float64 with shape \(3,\); token ids are integers"),
        (np.zeros((2, 3, 4), np.int32), r"is of int32 with shape \(2, 3, 4\)"),
        (np.int32(7), r"is of int32 with shape \(\)"),
        (np.array([{}, None]), r"is of object with shape \(2,\)"),
        (np.array([True]), r"is of bool"),
    ],
)
def test_arrays_of_no_token_ids(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.savez(tmp_path / "a.npz", good=np.arange(3), wrong=array)
    with pytest.raises(UserError, match=f"a.npy: it {message}"):
        texts([tmp_path / "a.npy"])
    ((_, content),) = contents(tmp_path / "a.npz")
    ((number, reason),) = content.faults
    assert number == 2 and re.match(rf"array 'wrong.npy': it {message}", reason)
    assert [array.tolist() for array in content.arrays] == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:300], "it is cut off: it has 300 bytes, and its header asks for 928"),
        (lambda data: data + data, "there is more behind the array: it has 1,856 bytes, and its header asks for 928"),
        (lambda data: b"something else", "it is no array in NumPy's format"),
        (lambda data: data.replace(b"'shape': (100,)", b"'shape': (100, "), "it is no array in NumPy's format"),
        (lambda data: data.replace(b"{'descr'", b"{'des\ncr"), "it is no array in NumPy's format"),
        (lambda data: data.replace(b"'shape': (100,)", b"'shape': (-10,)"), r"it is of int64 with shape \(-10,\)"),
        (lambda data: data.replace(b"'shape': (100,)", b"'shape': (10,) "), "there is more behind the array"),
    ],
)
def test_damaged_arrays(tmp_path, change, message):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(100))
    damaged = change(path.read_bytes())
    path.write_bytes(damaged)
    ((number, reason),) = faults(path)
    assert number is None and re.match(message, reason)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", damaged)
    ((number, reason),) = faults(tmp_path / "a.npz")
    assert number == 1 and re.match(f"array 'a.npy': {message}", reason)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_archives(tmp_path, method):
    np.save(tmp_path / "a.npy", np.random.default_rng(1).integers(0, 1 << 60, 300))
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in "ab":
            archive.write(tmp_path / "a.npy", f"{name}.npy")
        start = archive.infolist()[0].header_offset
    data = bytearray(path.read_bytes())
    data[start + 1000 : start + 1100] = bytes(100)
    path.write_bytes(data)
    ((_, content),) = contents(path)
    ((number, reason),) = content.faults
    assert number == 1 and re.match(r"array 'a.npy': it (cannot be read|is no array in NumPy's format) \(", reason)
    assert len(content.arrays) == 1 and content.numbers == [2]
    path.write_bytes(data[:300])
    with pytest.raises(UserError, match=r"a.npz: this cannot be read as npz \(.*; get the file again"):
        texts([path])


def test_archives_without_arrays_or_with_one_twice(tmp_path):
    path = tmp_path / "a.npz"
    zipfile.ZipFile(path, "w").close()
    assert faults(path) == [(None, "the archive has no array in it; write it with numpy.savez, or leave it out")]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "something")
    ((number, reason),) = faults(path)
    assert number == 1 and reason.startswith("array 'a.txt': it is no array in NumPy's format")
    np.save(tmp_path / "a.npy", np.arange(3))
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.write(tmp_path / "a.npy", "x.npy")
        archive.write(tmp_path / "a.npy", "x.npy")
    ((number, reason),) = faults(path)
    assert number is None and reason.startswith("the archive has two arrays 'x.npy'; give every array a name")


# ---------------------------------------------------------------- PDF


def write_pdf(path, pages, character_map=None, algorithm="RC4-128", compress=False, **encryption):
    writer = pypdf.PdfWriter()
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica", "/Encoding": "/WinAnsiEncoding"}
    font = DictionaryObject({NameObject(key): NameObject(value) for key, value in font.items()})
    if character_map:
        stream = DecodedStreamObject()
        stream.set_data(character_map)
        font[NameObject("/ToUnicode")] = writer._add_object(stream)
    for words in pages:
        page = writer.add_blank_page(300, 300)
        stream = DecodedStreamObject()
        stream.set_data(b"BT /F1 12 Tf 20 200 Td (" + words.encode("cp1252") + b") Tj ET")
        page[NameObject("/Contents")] = writer._add_object(stream)
        fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    if compress:
        for page in writer.pages:
            page.compress_content_streams()
    if encryption:
        writer.encrypt(algorithm=algorithm, **encryption)
    writer.write(path)
    return path


def test_pdf(tmp_path):
    path = write_pdf(tmp_path / "a.pdf", ["page one é", "page two"])
    (document,) = TextSource([path])
    assert document.text == "page one é\npage two" and str(document) == str(path)


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-128", "AES-256"])
def test_encrypted_pdf(tmp_path, algorithm):
    path = tmp_path / "a.pdf"
    write_pdf(path, ["open"], algorithm=algorithm, user_password="", owner_password="secret")
    assert texts([path]) == ["open"]
    write_pdf(path, ["page"], algorithm=algorithm, user_password="secret")
    with pytest.raises(UserError, match="a.pdf: the PDF is encrypted; decrypt it first"):
        texts([path])


def test_pdf_with_halves_of_characters(tmp_path):
    """A character map may give a character of two halves as two, of which one may be missing."""
    character_map = b"2 beginbfchar\n<61> <D83D>\n<62> <DE00>\nendbfchar"
    assert texts([write_pdf(tmp_path / "a.pdf", ["abcac"], character_map)]) == ["\U0001f600c\ufffdc"]


def test_pdf_that_can_be_read_in_parts_only(tmp_path, caplog):
    path = write_pdf(tmp_path / "a.pdf", [f"page {i} " + "with some words " * 20 for i in range(3)], compress=True)
    assert len(texts([path])[0].split()) == 3 * 62
    data = path.read_bytes()
    streams = [match.end() for match in re.finditer(rb"stream\r?\n", data) if data[match.start() - 3 :][:3] != b"end"]
    logger = logging.getLogger("pypdf")
    before = logger.level, logger.propagate, list(logger.handlers)
    path.write_bytes(data[: streams[1] + 20] + bytes(20) + data[streams[1] + 40 :])
    with pytest.raises(UserError, match=r"a.pdf: the PDF can be read in parts only \(Error -3 while decompressing"):
        texts([path])
    page = list(re.finditer(rb"\d+ 0 obj\s+<<\s+/Type /Page\s", data))[1]
    path.write_bytes(data[: page.start()] + b"9 9 obj".rjust(page[0].index(b"obj") + 3) + data[page.end() - 20 :])
    with pytest.raises(UserError, match=r"a.pdf: the PDF can be read in parts only \(.*not defined"):
        texts([path])
    # A wrong start of the table of objects is mended.
    path.write_bytes(re.sub(rb"startxref\n\d+", b"startxref\n7", data))
    assert len(texts([path])[0].split()) == 3 * 62
    assert (logger.level, logger.propagate, logger.handlers) == before and not caplog.records


def test_faults_of_pdf(tmp_path, caplog):
    write_pdf(tmp_path / "scanned.pdf", ["", " "])
    (tmp_path / "broken.pdf").write_bytes((tmp_path / "scanned.pdf").read_bytes()[:200])
    (tmp_path / "none.pdf").touch()
    for name, message in (
        ("scanned", "the PDF has no text, only images perhaps; run OCR"),
        ("broken", "the PDF cannot be read"),
        ("none", "the PDF cannot be read"),
    ):
        with pytest.raises(UserError, match=rf"{name}.pdf: {message}"):
            texts([tmp_path / f"{name}.pdf"])
    with pytest.raises(UserError, match=r"scanned.pdf: a document of \d+ bytes is larger than the limit of 10"):
        texts([tmp_path / "scanned.pdf"], max_document_bytes=10)
    assert not caplog.records


# ---------------------------------------------------------------- compressed text


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_text(tmp_path, ending):
    pack = gzip.compress if ending == "gz" else zstandard.compress
    path = tmp_path / f"a.txt.{ending}"
    path.write_bytes(pack(b"\xef\xbb\xbfone\n" * 1000))
    (document,) = TextSource([path])
    assert document.text == "one\n" + "\ufeffone\n" * 999 and str(document) == str(path)
    with pytest.raises(
        UserError, match=rf"a.txt.{ending}: a document of 7,000 bytes is larger than the limit of 6,999"
    ):
        texts([path], max_document_bytes=6999)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=rf"a.txt.{ending}: the compressed stream is damaged"):
        texts([path])


# ---------------------------------------------------------------- Hugging Face datasets


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    """The library, without network and with its own folder for caches."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    library.disable_progress_bars()
    return library


def test_saved_datasets(tmp_path, monkeypatch, datasets):
    rows = {"question": [f"How many? {i}" for i in range(500)], "answer": list(range(500)), "x": [{"y": 1}] * 500}
    part = datasets.Dataset.from_dict(rows)
    part.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": part, "test": part.select(range(3))}).save_to_disk(tmp_path / "several")
    monkeypatch.setattr(source, "UNIT_BYTES", 4000)
    expected = [f"Q: How many? {i}\nA: {i}" for i in range(500)]
    for given, number in (
        (f"hf:{tmp_path}/one", 500),
        (f"hf:{tmp_path}/several", 500),
        (f"hf:{tmp_path}/several:test", 3),
    ):
        found = TextSource([given], template="Q: {question}\nA: {answer}")
        assert [document.text for document in found] == expected[:number]
        assert len(list(found.units())) == (1 if number == 3 else 9)
        assert [found.identity(unit) for unit in found.units()] == [found.identity(unit) for unit in found.units()]
    assert str(list(TextSource([f"hf:{tmp_path}/one"], text_key="question"))[299]) == f"hf:{tmp_path}/one:300"
    with pytest.raises(UserError, match=r"several has no split 'validation', but train, test"):
        texts([f"hf:{tmp_path}/several:validation"])
    with pytest.raises(UserError, match="one was saved without splits; leave out :test"):
        texts([f"hf:{tmp_path}/one:test"])
    with pytest.raises(UserError, match=r"one: column 'answer' is int64, not text"):
        texts([f"hf:{tmp_path}/one"], text_key="answer")
    with pytest.raises(UserError, match=r"one: there is no column 'text' \(its columns: question \(string\)"):
        texts([f"hf:{tmp_path}/one"])


def test_folders_of_data_files(tmp_path, datasets):
    folder = tmp_path / "questions"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": null}\n')
    (folder / "test.jsonl").write_text('{"text": "three"}\n')
    assert texts([f"hf:{folder}:test"]) == ["three"]
    with pytest.raises(UserError, match=r"questions:2: field 'text' is null"):
        texts([f"hf:{folder}"])
    with pytest.raises(UserError, match=r"cannot be read as a dataset \(ValueError: Bad split: other"):
        texts([f"hf:{folder}:other"])
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": ')
    with pytest.raises(UserError, match=r"questions: this cannot be read as a dataset \("):
        texts([f"hf:{folder}"])


def test_datasets_that_are_not_there(tmp_path, datasets):
    with pytest.raises(
        UserError, match=r"hf://nobody/nothing:train: this cannot be read as a dataset \(.*nobody/nothing"
    ):
        texts(["hf://nobody/nothing:train"])
    with pytest.raises(UserError, match="input hf://nothing does not name a dataset; write hf://ORG/NAME"):
        TextSource(["hf://nothing"])
    with pytest.raises(UserError, match="there is no folder .*absent'; a dataset on the hub is hf://ORG/NAME"):
        TextSource([f"hf:{tmp_path}/absent:train"])
    with pytest.raises(UserError, match="input hf:: there is no folder ''"):
        TextSource(["hf:"])
    with pytest.raises(UserError, match="cannot read .*: File name too long"):
        TextSource([f"hf:{tmp_path}/{'x' * 300}"])


def test_columns_that_a_dataset_does_not_know_beforehand(tmp_path, datasets):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.csv").write_text("text,n\none,1\n,2\n")
    assert datasets.load_dataset(str(folder), split="train", streaming=True).features is None
    given = f"hf:{folder}"
    assert faults(given) == [(2, "field 'text' is null, not text")]
    ((number, reason),) = faults(given, text_key="body")
    assert number is None and reason.startswith(
        "there is no column 'body' (its columns: text (large_string), n (int64))"
    )
    ((number, reason),) = faults(given, text_key="n")
    assert number is None and reason.startswith("column 'n' is int64, not text")
    assert datasets.utils.logging.get_verbosity() != datasets.utils.logging.CRITICAL


@pytest.mark.parametrize("given", ["hf://org/name", "hf:{folder}"])
def test_datasets_that_break_off(tmp_path, monkeypatch, datasets, given):
    """What is on the hub may be there the next time; what is on disk is damaged."""

    def rows():
        yield from ({"text": f"row {i}"} for i in range(64))
        raise OSError("no more of it")

    dataset = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset)
    monkeypatch.setattr(source, "UNIT_BYTES", 500)
    given = given.format(folder=tmp_path)
    documents = []
    with pytest.raises(UserError, match=r"this cannot be read as a dataset \(OSError: no more of it\)"):
        for document in TextSource([given]):
            documents.append(document.text)
    assert documents == [f"row {i}" for i in range(56 if given.startswith("hf://") else 64)]
    if given.startswith("hf://"):
        with pytest.raises(UserError, match="hf://org/name: this"):
            faults(given)
    else:
        assert [number for number, _ in faults(given)] == [None]


def test_large_rows_of_datasets_are_read_one_at_a_time(tmp_path, monkeypatch, datasets):
    monkeypatch.setattr(source, "UNIT_BYTES", 10_000)
    rows = [str(i) * 25_000 for i in range(9)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "large")
    assert [content.texts for _, content in contents(f"hf:{tmp_path}/large")] == [[row] for row in rows]


def test_a_dataset_is_read_once(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"text": "one"}\n' * len(name))
    given = f"hf:{tmp_path}"
    for again in (f"{given}/", f"{given}:train", f"{given}/../{tmp_path.name}"):
        with pytest.raises(UserError, match="is in the input twice"):
            TextSource([given, again])
    both = TextSource([given, f"{given}:test"])
    assert sorted(file.name for file in both.files) == [f"hf:{tmp_path.name}", f"hf:{tmp_path.name}:test"]
    assert both.num_bytes == sum((tmp_path / name).stat().st_size for name in ("train.jsonl", "test.jsonl"))
    with pytest.raises(UserError, match="is in the input twice"):
        TextSource(["hf://org/name", "hf://org/name/:train"])


@pytest.mark.parametrize("change", ["size", "time"])
def test_identity_tells_changed_files(tmp_path, datasets, change):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "other.txt").write_text("other")
    inputs = [f"hf:{tmp_path / 'data'}", str(tmp_path / "other.txt")]

    def identities():
        found = TextSource(inputs)
        return [found.identity((piece,)) for unit in found.units() for piece in unit]

    before = identities()
    assert before == identities()
    for name, text in (("data/train.jsonl", '{"text": "one"}\n'), ("other.txt", "other")):
        path = tmp_path / name
        time = path.stat().st_mtime_ns
        path.write_text(text + " " if change == "size" else text)
        os.utime(path, ns=(time, time + (change == "time")))
    assert not set(before) & set(identities())
