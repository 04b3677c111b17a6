import sysconfig
from pathlib import Path

import pytest

from megaslm.data import TextSource
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"a.jsonl:2: broken JSON"),
        (b'{"text": "\xff"}', r"a.jsonl:2: byte 10 of the line is not valid UTF-8"),
        (b'{"body": "x", "id": 1}', r"a.jsonl:2: the record has no field 'text' \(its fields: body, id\)"),
        (b'{"text": 7}', r"a.jsonl:2: field 'text' is a int"),
        (b'["text"]', r"a.jsonl:2: the line is a JSON list"),
        (b'{"text": "\\ud800"}', r"a.jsonl:2: broken JSON"),
    ],
)
def test_faults_of_jsonl(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        list(TextSource([tmp_path / "a.jsonl"]))


def test_text_key(tmp_path):
    (tmp_path / "a.json").write_text('{"content": "x"}\n')
    assert texts(TextSource([tmp_path / "a.json"], text_key="content")) == ["x"]


def test_text_files_are_kept_as_they_are(tmp_path):
    (tmp_path / "a.log").write_bytes(b"\xef\xbb\xbf one\r\ntwo\n")
    assert texts(TextSource([tmp_path / "a.log"])) == [" one\r\ntwo\n"]
    (tmp_path / "b.txt").write_bytes(b"one\ntwo \xff")
    with pytest.raises(UserError, match=r"b.txt: byte 8 \(line 2\) is not valid UTF-8"):
        list(TextSource([tmp_path / "b.txt"]))


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


def test_copies_of_tokenizers_are_no_text(folder):
    (folder / "corpus.tokenizer").mkdir()
    (folder / "corpus.tokenizer" / "merges.txt").write_text("a b")
    assert "a b" not in texts(TextSource([folder]))


def test_order_depends_on_names_alone(folder, tmp_path):
    moved = tmp_path / "elsewhere"
    before = texts(TextSource([folder]))
    folder.rename(moved)
    assert texts(TextSource([moved])) == before


def test_globs(folder):
    assert sorted(texts(TextSource([f"{folder}/sub0/*.txt"]))) == sorted(f"note {i}" for i in range(0, 20, 3))
    assert len(texts(TextSource([f"{folder}/**/*.txt"]))) == 20
    with pytest.raises(UserError, match="no file matches"):
        TextSource([f"{folder}/*.md"])


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
