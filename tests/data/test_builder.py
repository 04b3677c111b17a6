import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from megaslm.data import (
    Document,
    TokenFile,
    ascii_tokenizer,
    build_token_file,
    builder,
    character_tokenizer,
    find_tokenizer,
    load_tokenizer,
    verify,
    vocab_size_of,
)
from megaslm.errors import UserError


def documents(texts):
    return [Document(text, Path("x.jsonl"), line) for line, text in enumerate(texts, 1)]


@pytest.mark.parametrize("batch_characters", [1, 30, 1 << 21])
def test_documents_keep_their_order_and_end(bpe, tmp_path, monkeypatch, batch_characters):
    monkeypatch.setattr(builder, "BATCH_CHARACTERS", batch_characters)
    texts = [f"document {i} é" for i in range(50)]
    seen = []
    manifest = build_token_file(
        documents(texts),
        bpe,
        tmp_path / "x",
        options={"text_key": "text"},
        progress=lambda done: seen.append(done.tokens),
    )
    file = verify(tmp_path / "x")
    assert [bpe.decode(file.document(i)[:-1]) for i in range(50)] == texts
    assert all(file.document(i)[-1] == bpe.eod_id for i in range(50))
    assert manifest["documents"] == 50 and manifest["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["options"] == {"eod_id": 0, "text_key": "text"}
    assert seen == sorted(seen) and seen[-1] == manifest["tokens"] == file.num_tokens
    assert bpe.token_bytes[file.tokens].sum() == manifest["text_bytes"]


def test_without_end_of_document(bpe, tmp_path):
    build_token_file(documents(["a b"]), bpe, tmp_path / "x", append_eod=False)
    assert bpe.eod_id not in TokenFile(tmp_path / "x").tokens
    manifest = build_token_file(documents(["naïve"]), ascii_tokenizer(), tmp_path / "y")
    assert TokenFile(tmp_path / "y").num_tokens == 5 and manifest["mapped_characters"] == 1


def test_faults_leave_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="no documents"):
        build_token_file([], ascii_tokenizer(), tmp_path / "x")
    with pytest.raises(UserError, match=r"x.jsonl:2: character '\\n'"):
        build_token_file(documents(["a", "\n"]), ascii_tokenizer("refuse"), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_is_found_where_the_files_were_moved(bpe, tmp_path):
    build_token_file(documents(["a b"]), bpe, tmp_path / "first" / "x.y")
    (tmp_path / "first").rename(tmp_path / "second")
    folder = find_tokenizer(tmp_path / "second" / "x.y")
    assert folder == str(tmp_path / "second" / "x.y.tokenizer")
    assert load_tokenizer(folder).fingerprint == bpe.fingerprint and vocab_size_of(tmp_path / "second" / "x.y") == 300
    assert sorted(p.name for p in (tmp_path / "second").iterdir()) == [
        "x.y.bin",
        "x.y.idx",
        "x.y.json",
        "x.y.tokenizer",
    ]


def test_a_prefix_in_the_working_folder(bpe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_token_file(documents(["a b"]), bpe, "x")
    assert find_tokenizer("x") == "x.tokenizer"


def test_tokenizers_that_are_not_there(bpe, tmp_path, write_tokens):
    build_token_file(documents(["a b"]), bpe, tmp_path / "x")
    ascii_tokenizer().save(tmp_path / "x.tokenizer")
    with pytest.raises(UserError, match=r"x.tokenizer \(fingerprint .* is not the tokenizer that .*x was built with"):
        find_tokenizer(tmp_path / "x")
    shutil.rmtree(tmp_path / "x.tokenizer")
    assert find_tokenizer(tmp_path / "x") is None and vocab_size_of(tmp_path / "x") == 300
    manifest = json.loads((tmp_path / "x.json").read_text())
    del manifest["tokenizer"]["folder"]  # as written before there was one
    (tmp_path / "x.json").write_text(json.dumps(manifest))
    assert find_tokenizer(tmp_path / "x") is None
    foreign = write_tokens([[1]], manifest=False)
    assert find_tokenizer(foreign) is None and vocab_size_of(foreign) is None
    with pytest.raises(UserError, match="absent.bin does not exist"):
        find_tokenizer(tmp_path / "absent")


def test_the_copy_follows_the_build(tmp_path):
    first, second = character_tokenizer(["ab"]), character_tokenizer(["abc"])
    build_token_file(documents(["ab"]), first, tmp_path / "x")
    with pytest.raises(UserError, match="no documents"):
        build_token_file([], second, tmp_path / "x", overwrite=True)
    assert load_tokenizer(find_tokenizer(tmp_path / "x")).same_files(first)
    build_token_file(documents(["ab"]), second, tmp_path / "x", overwrite=True)
    assert load_tokenizer(find_tokenizer(tmp_path / "x")).same_files(second)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json", "x.tokenizer"]


def test_an_older_output_is_kept(tmp_path):
    build_token_file(documents(["ab"]), character_tokenizer(["ab"]), tmp_path / "x")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="x.bin exists and would be overwritten"):
        build_token_file(documents(["abc"]), character_tokenizer(["abc"]), tmp_path / "x")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("older", [True, False])
def test_names_that_cannot_be_given(tmp_path, monkeypatch, older):
    """The token file's, or the tokenizer's: an older output is left whole with its tokenizer, or nothing is there."""
    if older:
        build_token_file(documents(["ab"]), character_tokenizer(["ab"]), tmp_path / "x")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refuse(files):
        raise UserError("no names today")

    rename = Path.rename

    def refuse_new(self, target):
        if self.name == ".x.tokenizer.new":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))
        return rename(self, target)

    for place, name, replacement, message in (
        (builder, "commit", refuse, "no names today"),
        (Path, "rename", refuse_new, "cannot write .*x.tokenizer: .*: Device or resource busy"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
            patch.setattr(place, name, replacement)
            build_token_file(documents(["abc"]), character_tokenizer(["abc"]), tmp_path / "x", overwrite=True)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not older or find_tokenizer(tmp_path / "x")


@pytest.mark.parametrize("stands", [True, False])
def test_a_tokenizer_that_a_killed_build_had_moved_away(tmp_path, stands):
    first, second = character_tokenizer(["ab"]), character_tokenizer(["abc"])
    build_token_file(documents(["ab"]), first, tmp_path / "x")
    (tmp_path / "x.tokenizer").rename(tmp_path / ".x.tokenizer.old")
    second.save(tmp_path / ".x.tokenizer.new")
    if stands:  # it was killed after the new one had been put there
        (tmp_path / ".x.tokenizer.new").rename(tmp_path / "x.tokenizer")
    with pytest.raises(UserError, match="no documents"):
        build_token_file([], second, tmp_path / "x", overwrite=True)
    assert load_tokenizer(tmp_path / "x.tokenizer").same_files(second if stands else first)
    build_token_file(documents(["ab"]), second, tmp_path / "x", overwrite=True)
    assert load_tokenizer(find_tokenizer(tmp_path / "x")).same_files(second)
    assert not list(tmp_path.glob(".*"))


def test_a_tokenizer_of_the_user_is_not_overwritten(bpe, tmp_path):
    folder = tmp_path / "x.tokenizer"
    bpe.save(folder)
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="x.tokenizer exists and is not the tokenizer ascii"):
        build_token_file(documents(["a"]), ascii_tokenizer(), tmp_path / "x")
    build_token_file(documents(["a"]), load_tokenizer(folder), tmp_path / "x")  # it stands there already
    assert find_tokenizer(tmp_path / "x") == str(folder) and (folder / "notes.txt").read_text() == "precious"
