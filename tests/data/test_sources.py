import gzip
import io
import os
import pickle
import sys
import sysconfig
from pathlib import Path

import pytest
import zstandard

import megaslm.data.sources.source
from megaslm.data import TextSource
from megaslm.data.sources.fields import RecordText
from megaslm.data.sources.records import ReadOptions, content_of
from megaslm.errors import UserError


def texts(source):
    return [document.text for document in source]


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "t\\u00e9\\r\\n", "id": 1}\r\n{"text": " "}\n{"text": "three"}'
    )
    source = TextSource([path])
    documents = list(source)
    assert [document.text for document in documents] == ["one", "té\r\n", "three"]
    assert [str(document) for document in documents] == [f"{path}:1", f"{path}:3", f"{path}:5"]
    assert source.num_empty == 1
    assert texts(source) == texts(source)


def test_text_key(tmp_path):
    (tmp_path / "a.json").write_text('{"content": "x"}\n')
    assert texts(TextSource([tmp_path / "a.json"], text_key="content")) == ["x"]
    assert texts(TextSource(str(tmp_path / "a.json"), text_key="content")) == ["x"]  # one input needs no list


def test_text_files_are_kept_as_they_are(tmp_path):
    (tmp_path / "a.log").write_bytes(b"\xef\xbb\xbf one\r\ntwo\n")
    assert texts(TextSource([tmp_path / "a.log"])) == [" one\r\ntwo\n"]
    (tmp_path / "b.txt").write_bytes(b"one\ntwo \xff")
    with pytest.raises(UserError, match=r"b.txt: byte 8 \(line 2\) is not valid UTF-8"):
        list(TextSource([tmp_path / "b.txt"]))
    with pytest.raises(UserError, match="a.log: a document of 13 bytes is larger than the limit of 12"):
        list(TextSource([tmp_path / "a.log"], max_document_bytes=12))


@pytest.fixture
def folder(tmp_path):
    for i in range(20):
        path = tmp_path / "notes" / f"sub{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"note {i}")
    (tmp_path / "notes" / "picture.png").write_bytes(b"\xff")
    (tmp_path / "notes" / ".hidden.txt").write_text("hidden")
    (tmp_path / "notes" / ".git").mkdir()
    (tmp_path / "notes" / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "notes" / "sub0" / "more.jsonl").write_text('{"text": "line 1"}\n{"text": "line 2"}\n')
    return tmp_path / "notes"


def test_folders(folder):
    source = TextSource([folder])
    found = texts(source)
    assert sorted(found) == sorted([*(f"note {i}" for i in range(20)), "line 1", "line 2"])
    assert found != sorted(found) and found.index("line 2") == found.index("line 1") + 1
    assert source.num_other_files == 1


def test_our_own_output_is_no_input(folder):
    for name in ("corpus.tokenizer/merges.txt", "run.work/journal.jsonl", "run.skipped.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{"text": "ours"}')
    (folder / "picture.png").unlink()
    for given in (folder, f"{folder}/**", f"{folder}/*"):
        source = TextSource([given])
        assert not [text for text in texts(source) if "ours" in text]
    assert texts(TextSource([f"{folder}/run.work/*"])) == ["ours"]  # by name it is


def test_order_depends_on_names_alone(folder, tmp_path):
    moved = tmp_path / "elsewhere"
    before = texts(TextSource([folder]))
    folder.rename(moved)
    assert texts(TextSource([moved])) == before


def test_globs(folder):
    assert sorted(texts(TextSource([f"{folder}/sub0/*.txt"]))) == sorted(f"note {i}" for i in range(0, 20, 3))
    assert len(texts(TextSource([f"{folder}/**/*.txt"]))) == 20
    # Folders that match are read as folders.
    (folder / "picture.png").unlink()
    for pattern in ("*", "**", "../*"):
        source = TextSource([f"{folder}/{pattern}"])
        assert len(source.files) == 21 and source.num_other_files == 0
    with pytest.raises(UserError, match="no file matches"):
        TextSource([f"{folder}/*.md"])


def test_links_and_other_things_in_folders(folder, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x.txt").write_text("through a link")
    (folder / "linked").symlink_to(tmp_path / "far")
    (folder / "loop").symlink_to(folder)
    (folder / "second.txt").symlink_to(folder / "sub0" / "0.txt")
    (folder / "broken.txt").symlink_to(tmp_path / "absent")
    (folder / "self.txt").symlink_to(folder / "self.txt")
    os.mkfifo(folder / "pipe.txt")
    source = TextSource([folder])
    assert source.num_other_files == 5  # with the picture
    (folder / "picture.png").unlink()
    for found in (texts(source), texts(TextSource([f"{folder}/*"]))):
        assert len(found) == 23 and found.count("note 0") == 1 and "through a link" in found
    with pytest.raises(UserError, match=r"pipe.txt is a pipe; give the data as - \(standard input\)"):
        TextSource([folder / "pipe.txt"])
    with pytest.raises(UserError, match="null is neither a file nor a folder"):
        TextSource(["/dev/null"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("pattern", ["closed", "closed/x.txt", "closed/*.txt", "", "*/*.txt", "**/*.txt", "**"])
def test_folders_that_cannot_be_read(folder, pattern):
    (folder / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match="cannot read .*closed.*: Permission denied"):
        TextSource([f"{folder}/{pattern}"])


def test_names(tmp_path):
    with pytest.raises(UserError, match="cannot read x*: File name too long"):
        TextSource(["x" * 5000])
    path = tmp_path / os.fsdecode(b"line\n\xff.txt")
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"line\\n\\udcff.txt: byte 0 \(line 1\) is not valid UTF-8"):
        list(TextSource([path]))
    path.write_bytes(b"text")
    assert [str(document) for document in TextSource([path])] == [rf"{tmp_path}/line\n\udcff.txt"]


def test_nothing_found(tmp_path, folder):
    with pytest.raises(UserError, match="no input"):
        TextSource([])
    with pytest.raises(UserError, match="absent.jsonl does not exist"):
        TextSource([tmp_path / "absent.jsonl"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"looked below it for .*\.txt"):
        TextSource([tmp_path / "empty"])
    with pytest.raises(UserError, match="twice"):
        TextSource([folder, f"{folder}/sub0/*.txt"])


def test_compressed_files_and_other_formats_in_folders(folder):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}'))
    (folder / "b.TXT.zst").write_bytes(zstandard.compress(b"packed text"))
    source = TextSource([folder])
    assert {"packed", "packed text"} <= set(texts(source))
    assert sum(piece.size for unit in source.units() for piece in unit) == source.num_bytes


def test_empty_files(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for name in ("b.txt", "c.py", "d.jsonl"):
        (tmp_path / name).touch()
    source = TextSource([tmp_path])
    assert texts(source) == ["text"] and source.num_empty_files == 2
    with pytest.raises(UserError, match="the input is empty: all 2 files"):
        TextSource([tmp_path / "b.txt", tmp_path / "c.py"])


def test_units_hold_about_so_many_bytes(folder, monkeypatch):
    monkeypatch.setattr(megaslm.data.sources.source, "UNIT_BYTES", 20)
    monkeypatch.setattr(megaslm.data.sources.source, "PIECE_BYTES", 1)
    source = TextSource([folder])
    units = list(source.units())
    assert all(sum(piece.weight for piece in unit) <= 20 for unit in units)
    assert 8 < len(units) < 12  # 20 files of 6 or 7 bytes, and 38 bytes of lines
    other = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 1000
    read = [text for unit in pickle.loads(pickle.dumps(units)) for piece in unit for text in other.read(piece).texts]
    assert read == texts(source)


def test_a_unit_has_some_thousand_files_at_most(folder, monkeypatch):
    monkeypatch.setattr(megaslm.data.sources.source, "UNIT_BYTES", 5 * megaslm.data.sources.source.PIECE_BYTES)
    assert list(map(len, TextSource([folder]).units())) == [5, 5, 5, 5, 1]


def test_identity_of_units(folder, monkeypatch):
    monkeypatch.setattr(megaslm.data.sources.source, "UNIT_BYTES", 20)
    monkeypatch.setattr(megaslm.data.sources.source, "PIECE_BYTES", 1)

    def identities():
        source = TextSource([folder])
        return [source.identity(unit) for unit in source.units()]

    before = identities()
    assert len(set(before)) == len(before) and identities() == before
    path = folder / "sub0" / "3.txt"
    os.utime(path, ns=(1, 1))
    later = identities()
    assert sum(a != b for a, b in zip(before, later, strict=True)) == 1
    path.write_text(path.read_text().replace("note", "Note!"))
    os.utime(path, ns=(1, 1))
    assert sum(a != b for a, b in zip(later, identities(), strict=True)) == 1


def test_files_that_change_or_vanish(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.jsonl.gz", "a.npy", "a.pdf", "a.parquet"):
        (tmp_path / name).write_bytes(b"1")
        source = TextSource([tmp_path / name])
        (tmp_path / name).write_bytes(b"22")
        with pytest.raises(UserError, match=f"{name} has changed since it was found"):
            list(source)
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=f"cannot read .*{name}: No such file"):
            list(source)


def test_standard_input(monkeypatch, tmp_path):
    def give(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    give(b'{"text": "one"}\n\n{"text": "two"}')
    source = TextSource(["-"])
    assert [(document.text, str(document)) for document in source] == [
        ("one", "standard input:1"),
        ("two", "standard input:3"),
    ]
    with pytest.raises(UserError, match="standard input can be read only once"):
        list(source)
    give(b"one\ntwo\n")
    assert texts(TextSource(["-"], stdin_format="text")) == ["one\ntwo\n"]
    give(b"\xff")
    with pytest.raises(UserError, match=r"standard input: byte 0 \(line 1\) is not valid UTF-8"):
        list(TextSource(["-"], stdin_format="text"))
    give(b"12345678901")
    with pytest.raises(UserError, match="standard input: a document of 11 bytes is larger than the limit of 10"):
        list(TextSource(["-"], stdin_format="text", max_document_bytes=10))
    with open(tmp_path / "write_only", "w") as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.FileIO(file.fileno(), "r", closefd=False)))
        with pytest.raises(UserError, match="cannot read standard input: Bad file descriptor"):
            list(TextSource(["-"]))
    (tmp_path / "-").write_text("a file of this name")
    monkeypatch.chdir(tmp_path)
    assert texts(TextSource(["./-"])) == ["a file of this name"]
    with pytest.raises(UserError, match="stdin_format 'csv' is none of jsonl, text"):
        TextSource(["-"], stdin_format="csv")
    identities = []
    for data in (b'{"text": "a"}', b'{"text": "b"}', b'{"text": "a"}'):
        give(data)
        source = TextSource(["-"])
        identities += map(source.identity, source.units())
    assert identities[0] == identities[2] != identities[1]


def test_a_limit_is_of_bytes():
    records, record_text = [{"text": "\u00e9" * 6}], RecordText("text")
    assert content_of(records, ReadOptions(record_text, 12)).texts == ["\u00e9" * 6]
    (fault,) = content_of(records, ReadOptions(record_text, 11)).faults
    assert fault.number == 1 and fault.reason.startswith("a document of 12 bytes is larger than the limit of 11")


def test_python_stdlib():
    source = TextSource(["python-stdlib"])
    names = [file.name for file in source.files]
    assert "argparse.py" in names and "json/decoder.py" in names
    assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & {
        p for n in names for p in Path(n).parts
    }
    assert source.num_bytes > 5_000_000
    assert all(file.path.is_relative_to(sysconfig.get_path("stdlib")) for file in source.files)
    assert next(iter(source)).text.strip()
