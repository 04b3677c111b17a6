"""Outputs of `preprocess`: what they hold, whatever the units, the workers and the options."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaslm.data import (
    Assembly,
    BuildOptions,
    TextSource,
    TokenFile,
    ascii_tokenizer,
    find_tokenizer,
    output_lock,
    preprocess,
    verify,
)
from megaslm.data.sources import source as sources
from megaslm.errors import UserError

TEXTS = [f"document {i} " + "é word, " * (i * 7 % 23) + "end" for i in range(60)]


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def documents_of(prefix):
    file = verify(prefix)
    return [file.document(i).tolist() for i in range(file.num_documents)]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", 400)


@pytest.fixture
def inputs(tmp_path, small_units):
    folder = tmp_path / "in"
    folder.mkdir()
    write_lines(folder / "a.jsonl", TEXTS[:30])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(write_lines(tmp_path / "b.jsonl", TEXTS[30:50]).read_bytes()))
    for i, text in enumerate(TEXTS[50:]):
        (folder / f"{i}.txt").write_text(text)
    np.save(folder / "ids.npy", np.array([[5, 6, 7], [8, 9, 0]]))  # the second brings its end-of-document token
    return folder


@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=12),
    unit_bytes=st.integers(1, 300),
)
def test_every_document_and_its_end(bpe, tmp_path_factory, texts, unit_bytes):
    folder = tmp_path_factory.mktemp("property")
    source = TextSource([write_lines(folder / "x.jsonl", ["start", *texts])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", unit_bytes)
        manifest = preprocess(source, bpe, folder / "x", workers=0, on_error="skip")[str(folder / "x")]
    kept = ["start", *(text for text in texts if not text.isspace())]
    assert documents_of(folder / "x") == [[*bpe.encode(text).tolist(), bpe.eod_id] for text in kept]
    assert manifest["text_bytes"] == sum(len(text.encode()) for text in kept)
    assert manifest["skipped"]["records"] == manifest["skipped"]["empty"] == len(texts) + 1 - len(kept)


def test_any_number_of_workers(bpe, inputs, tmp_path):
    seen = []
    for workers in (0, 1, 2):
        source = TextSource([inputs])
        done = []
        preprocess(source, bpe, tmp_path / f"{workers}" / "x", workers=workers, progress=done.append)
        seen.append(contents(tmp_path / f"{workers}"))
        assert (
            done[-1].input_bytes == source.num_bytes and done[-1].tokens == TokenFile(tmp_path / "0" / "x").num_tokens
        )
        assert len(done) > 20
    assert seen[0] == seen[1] == seen[2] and set(seen[0]) == {"x.bin", "x.idx", "x.json"}
    documents = documents_of(tmp_path / "0" / "x")
    assert [5, 6, 7, 0] in documents and [8, 9, 0] in documents and len(documents) == 62
    texts = [bpe.decode(document[:-1]) for document in documents]
    assert set(TEXTS) < set(texts) and texts.index(TEXTS[0]) + 29 == texts.index(TEXTS[29])
    assert find_tokenizer(tmp_path / "2" / "x") == str(tmp_path / "2" / "x.tokenizer")
    assert TokenFile(tmp_path / "0" / "x").manifest["encoder"]["name"] == "gigatoken"


def test_the_encoder_does_not_change_the_ids(bpe, inputs, tmp_path):
    for encoder in ("gigatoken", "huggingface"):
        preprocess(TextSource([inputs]), bpe, tmp_path / encoder, BuildOptions(encoder=encoder), workers=0)
    assert (tmp_path / "gigatoken.bin").read_bytes() == (tmp_path / "huggingface.bin").read_bytes()


def test_bounds_on_the_length(bpe, tmp_path, small_units):
    texts = ["a", "abcdef", "abcdefgh xyz", "x " * 300]
    source = TextSource([write_lines(tmp_path / "x.jsonl", texts)])
    for bounds, kept in (
        ({"min_chars": 6}, texts[1:]),
        ({"max_chars": 6}, texts[:2]),
        ({"min_tokens": 2, "max_tokens": 100}, texts[1:3]),
    ):
        manifest = preprocess(source, bpe, tmp_path / "x", BuildOptions(**bounds), workers=0, overwrite=True)
        manifest = manifest[str(tmp_path / "x")]
        assert [bpe.decode(document[:-1]) for document in documents_of(tmp_path / "x")] == kept
        assert manifest["filtered"] == len(texts) - len(kept) and bounds.items() <= manifest["options"].items()
    with pytest.raises(UserError, match="there are no documents to write"):
        preprocess(source, bpe, tmp_path / "y", BuildOptions(min_chars=10_000), workers=0)
    with pytest.raises(UserError, match="min_tokens 5 and max_tokens 4 leave no document"):
        BuildOptions(min_tokens=5, max_tokens=4)
    assert not list(tmp_path.glob("y*"))


def test_outputs_by_split_without_duplicates(bpe, tmp_path, small_units):
    source = TextSource([write_lines(tmp_path / "x.jsonl", [*TEXTS, *TEXTS[:20]])])
    options = BuildOptions(assembly=Assembly(dedup=True, split="80,20", shuffle_seed=1))
    manifests = preprocess(source, bpe, tmp_path / "x", options, workers=0)
    assert list(manifests) == [str(tmp_path / "x_train"), str(tmp_path / "x_validation")]
    parts = [[bpe.decode(document[:-1]) for document in documents_of(prefix)] for prefix in manifests]
    assert [len(part) for part in parts] == [48, 12] and sorted(parts[0] + parts[1]) == sorted(TEXTS)
    for prefix, part in zip(manifests, parts, strict=True):
        assert manifests[prefix]["text_bytes"] == sum(len(text.encode()) for text in part)
        assert find_tokenizer(prefix) == str(tmp_path / "x.tokenizer")
    assert not (tmp_path / "x.work").exists()
    with pytest.raises(UserError, match="packing fills sequences up"):
        preprocess(source, bpe, tmp_path / "y", BuildOptions(append_eod=False, assembly=Assembly(pack=16)), workers=0)


def test_parts_of_an_older_split(bpe, tmp_path, small_units):
    """No part of it stands beside a later split, and nothing that was built by itself is taken for one."""
    source = TextSource([write_lines(tmp_path / "in.jsonl", TEXTS)])
    (tmp_path / "y_test.json").write_text("{}")
    preprocess(source, bpe, tmp_path / "y_train", workers=0)
    preprocess(source, bpe, tmp_path / "y", workers=0)
    assert TokenFile(tmp_path / "y_train").num_documents == 60 and (tmp_path / "y_test.json").read_text() == "{}"

    def build(split, overwrite=True):
        options = BuildOptions(assembly=Assembly(split=split))
        preprocess(source, bpe, tmp_path / "x", options, workers=0, overwrite=overwrite)
        return sorted(path.name for path in tmp_path.glob("x*") if path.is_file())

    build("80,10,10")
    before = contents(tmp_path)
    for split, at in (("70,30", "x_train exists"), (None, "x_train is of a build of .*x with another --split")):
        with pytest.raises(UserError, match=f"{at}.*--overwrite"):
            build(split, overwrite=False)
    assert contents(tmp_path) == before
    names = ["x_train.bin", "x_train.idx", "x_train.json"]
    assert build("70,30") == names + [name.replace("train", "validation") for name in names]
    assert build(None) == ["x.bin", "x.idx", "x.json"]
    with pytest.raises(UserError, match="x is of a build of .*x with another --split, or without"):
        build("70,30", overwrite=False)
    assert build("70,30")[0] == "x_train.bin"


def test_records_that_are_left_out(tmp_path, small_units):
    lines = [json.dumps({"text": text}) for text in ("good " * 30, "naïve", " ", "fine")]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:2], "{broken", "", *lines[2:], '{"no": 1}']))
    np.save(tmp_path / "ids.npy", np.array([[5, 6], [7, 300]]))
    source = TextSource([tmp_path / "a.jsonl", tmp_path / "ids.npy"])
    tokenizer = ascii_tokenizer("refuse")
    manifest = preprocess(source, tokenizer, tmp_path / "x", workers=0, on_error="skip")[str(tmp_path / "x")]
    listed = [json.loads(line) for line in (tmp_path / "x.skipped.jsonl").read_text().splitlines()]
    reasons = {entry["where"].removeprefix(str(tmp_path) + "/"): entry["reason"] for entry in listed}
    assert manifest["skipped"] == {"records": 5, "empty": 1} and len(listed) == 5 and manifest["documents"] == 3
    assert reasons["a.jsonl:2"].startswith("character 'ï' (U+00EF)") and reasons["a.jsonl:3"].startswith("broken JSON")
    assert reasons["a.jsonl:5"] == "the document is empty" and "no field 'text'" in reasons["a.jsonl:7"]
    assert reasons["ids.npy:2"].startswith("token id 300 is outside the vocabulary of 96 tokens")
    with pytest.raises(UserError, match="finished, but 5 records were left out .*--on_error skip .*--overwrite"):
        preprocess(source, tokenizer, tmp_path / "x", workers=0)
    with pytest.raises(UserError, match=r"(a.jsonl:2: character|ids.npy:2: token id 300) .*--on_error skip leaves"):
        preprocess(source, tokenizer, tmp_path / "y", workers=0)


def test_outputs_that_cannot_be_written(bpe, inputs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/x.*a part of its path is a file"):
        preprocess(TextSource([inputs]), bpe, tmp_path / "file" / "x", workers=0)
    with output_lock(tmp_path / "x"), pytest.raises(UserError, match="is writing .*x: wait until it has ended"):
        preprocess(TextSource([inputs]), bpe, tmp_path / "x", workers=0)
    write_lines(tmp_path / "y.json", ["an input"])
    with pytest.raises(UserError, match="y.json"):
        preprocess(TextSource([tmp_path / "y.json"]), bpe, tmp_path / "y", workers=0)
    (tmp_path / "w.idx").mkdir()
    with pytest.raises(UserError, match="w.idx is a folder"):
        preprocess(TextSource([inputs]), bpe, tmp_path / "w", workers=0, overwrite=True)
    with pytest.raises(UserError, match="out/' is no PREFIX of token files"):
        preprocess(
            TextSource([inputs]), bpe, f"{tmp_path}/out/", BuildOptions(assembly=Assembly(split="9,1")), workers=0
        )
    assert not (tmp_path / "w.work").exists() and not (tmp_path / "out").exists()
    (tmp_path / "z.work").mkdir()
    (tmp_path / "z.work" / "notes").write_text("precious")
    with pytest.raises(UserError, match="z.work is not empty and is no work folder of ours"):
        preprocess(TextSource([inputs]), bpe, tmp_path / "z", workers=0)
    assert (tmp_path / "z.work" / "notes").exists()
    with pytest.raises(UserError, match="on_error 'ignore' is none of stop, skip"):
        preprocess(TextSource([inputs]), bpe, tmp_path / "x", on_error="ignore")
    with pytest.raises(UserError, match="workers -1"):
        preprocess(TextSource([inputs]), bpe, tmp_path / "x", workers=-1)
    assert not (tmp_path / "x.work").exists()


def test_a_finished_build(bpe, inputs, tmp_path):
    prefix = str(tmp_path / "x")
    said: list[str] = []
    first = preprocess(TextSource([inputs]), bpe, prefix, workers=0, report=said.append)
    before = contents(tmp_path), (tmp_path / "x.json").stat().st_mtime_ns
    assert preprocess(TextSource([inputs]), bpe, prefix, workers=0, report=said.append) == first
    assert (contents(tmp_path), (tmp_path / "x.json").stat().st_mtime_ns) == before
    assert said[0].startswith("encoder: gigatoken") and said[1].endswith("nothing to do") and len(said) == 2
    os.truncate(tmp_path / "x.idx", 50)  # finished, but no longer whole
    preprocess(TextSource([inputs]), bpe, prefix, workers=0)
    assert contents(tmp_path) == before[0]
    for other in (BuildOptions(append_eod=False), BuildOptions(assembly=Assembly(pack=16))):
        with pytest.raises(UserError, match="x exists and is of another build .*--overwrite"):
            preprocess(TextSource([inputs]), bpe, prefix, other, workers=0)
    write_lines(inputs / "c.jsonl", ["one more"])
    with pytest.raises(UserError, match="--overwrite"):
        preprocess(TextSource([inputs]), bpe, prefix, workers=0)
    assert contents(tmp_path) == before[0]
    preprocess(TextSource([inputs]), bpe, prefix, workers=0, overwrite=True)
    assert TokenFile(prefix).num_documents == 63
    (tmp_path / "foreign.bin").write_bytes(b"\0\0")
    with pytest.raises(UserError, match="foreign exists and is of another build"):
        preprocess(TextSource([inputs]), bpe, tmp_path / "foreign", workers=0)
