import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaslm.data import TokenFile, TokenFileWriter, token_file, verify
from megaslm.data.token_file import DTYPE_CODES, HEADER, MAGIC, read_chunks, token_dtype
from megaslm.errors import UserError

GOLDEN = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
GOLDEN_IDX = "4b6966c5e660c7f563ab29eca5443b923e2997c97d21cc350d78f7cc94b4e55c"
GOLDEN_BIN = "73b2a277aa01fb869a65215b7d78c832e5e10ab987e0811795a4973a69e9ce6c"


def write_index(prefix, dtype, lengths, boundaries, tokens, tail=b"", offsets=None):
    """A file as another program may write it: any dtype, several sequences per document, no manifest."""
    dtype, lengths = np.dtype(dtype), np.array(lengths, np.int32)
    right = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    offsets = right if offsets is None else np.array(offsets, np.int64)
    header = HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype], len(lengths), len(boundaries))
    Path(f"{prefix}.bin").write_bytes(np.array(tokens, dtype).tobytes())
    Path(f"{prefix}.idx").write_bytes(
        header + lengths.tobytes() + offsets.tobytes() + np.array(boundaries, np.int64).tobytes() + tail
    )
    return str(prefix)


def alter_manifest(prefix, **altered):
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | altered))


def test_golden_vector_of_the_format(write_tokens):
    prefix = write_tokens(GOLDEN)
    index, tokens = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert (len(index), hashlib.sha256(index).hexdigest()) == (122, GOLDEN_IDX)
    assert (len(tokens), hashlib.sha256(tokens).hexdigest()) == (22, GOLDEN_BIN)
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    assert manifest["idx_sha256"] == GOLDEN_IDX and manifest["bin_sha256"] == GOLDEN_BIN
    assert (manifest["documents"], manifest["tokens"], manifest["largest_id"]) == (4, 11, 11)
    assert verify(prefix).manifest == manifest


@settings(max_examples=40, deadline=None)
@given(data=st.data(), vocab_size=st.sampled_from([1, 300, 65_499, 65_500, 200_000]))
def test_round_trip(tmp_path_factory, data, vocab_size):
    ids = st.integers(0, vocab_size - 1)
    documents = data.draw(st.lists(st.lists(ids, max_size=20), max_size=20))
    prefix = str(tmp_path_factory.mktemp("round_trip") / "dotted.name")
    with TokenFileWriter(prefix, vocab_size) as writer:
        cut = data.draw(st.integers(0, len(documents)))
        writer.extend(documents[:cut])
        for document in documents[cut:]:
            writer.append(np.array(document, np.int32))
        writer.finish()
    file = verify(prefix)
    assert file.dtype == (np.uint16 if vocab_size < 65_500 else np.int32)
    assert [file.document(i).tolist() for i in range(file.num_documents)] == documents
    assert [file.sequence(i).tolist() for i in range(file.num_sequences)] == documents
    assert file.tokens.tolist() == sum(documents, [])
    assert file.largest_id == max(sum(documents, []), default=-1)


def test_width_follows_the_vocabulary():
    assert token_dtype(65_499) == np.uint16
    assert token_dtype(65_500) == np.int32


def test_reads_files_of_others(tmp_path):
    prefix = write_index(tmp_path / "megatron", np.int64, [2, 1, 3], [0, 2, 3], [5, 6, 7, 8, 9, 10])
    file = verify(prefix)
    assert (file.num_sequences, file.num_documents, file.manifest, file.largest_id) == (3, 2, None, None)
    assert file.document(0).tolist() == [5, 6, 7]
    assert file.document(1).tolist() == file.sequence(2).tolist() == [8, 9, 10]
    assert [file.token_bound(i) for i in range(4)] == [0, 2, 3, 6]


def test_multimodal_files_are_refused(tmp_path):
    prefix = write_index(tmp_path / "images", np.uint16, [2, 1], [0, 1, 2], [5, 6, 7], tail=b"\0\1")
    with pytest.raises(UserError, match="ends with modes"):
        TokenFile(prefix)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("change", [-1, 2])
def test_a_cut_or_grown_file_is_found_on_opening(write_tokens, ending, manifest, change):
    prefix = write_tokens(GOLDEN, manifest=manifest)
    path = Path(prefix + ending)
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"\0" * change)
    with pytest.raises(UserError, match=rf"corpus\{ending} has {len(content) + change} bytes"):
        TokenFile(prefix)


def test_any_altered_byte_is_found_by_verify(write_tokens):
    prefix = write_tokens(GOLDEN)
    faults = {".bin": r"corpus\.bin has SHA-256|says largest_id", ".idx": r"corpus\.idx[ :]|by its index|\.idx have"}
    for ending, fault in faults.items():
        path = Path(prefix + ending)
        content = path.read_bytes()
        for at in range(len(content)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(UserError, match=fault):
                verify(prefix)
        path.write_bytes(content)
    verify(prefix)


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize(
    ("lengths", "boundaries", "offsets", "message"),
    [
        ([3, 2, 5, 2], [0, 4], [0, 6, 8, 18], "sequence 2 has 5 tokens from byte 8; it should start at byte 10"),
        ([3, -1, 8, 2], [0, 4], [0, 6, 4, 20], "sequence 1 has -1 tokens from byte 6"),
        ([3, 1, 5, 2], [0, 2, 1, 4], None, "document 1 runs from sequence 2 back to 1"),
    ],
)
def test_faults_inside_the_index_without_a_manifest(
    tmp_path, monkeypatch, chunk, lengths, boundaries, offsets, message
):
    monkeypatch.setattr(token_file, "CHUNK_ENTRIES", chunk)
    tokens = range(offsets[-1] // 2 + lengths[-1] if offsets else sum(lengths))
    prefix = write_index(tmp_path / "x", np.uint16, lengths, boundaries, tokens, offsets=offsets)
    TokenFile(prefix)
    with pytest.raises(UserError, match=message):
        verify(prefix)


def test_ends_of_the_index_without_a_manifest(tmp_path):
    prefix = write_index(tmp_path / "late", np.uint16, [1], [0, 1], [5, 6], offsets=[2])
    with pytest.raises(UserError, match="the first sequence starts at byte 2, not 0"):
        TokenFile(prefix)
    prefix = write_index(tmp_path / "odd", np.uint16, [1, 1], [0, 2], [5, 6], offsets=[0, 1])
    os.truncate(f"{prefix}.bin", 3)
    with pytest.raises(UserError, match="has 3 bytes, .* ends at byte 3 .2 bytes a token"):
        TokenFile(prefix)


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_bins_of_a_packed_file(tmp_path, monkeypatch, chunk):
    """Of two sequences each, the first one empty: only the length of the bins is wrong, or not even that."""
    monkeypatch.setattr(token_file, "CHUNK_ENTRIES", chunk)
    packing = {"length": 4, "bins": 4, "padding": 0, "eod_id": 0}
    for name, lengths in (("good", [4, 4, 4, 4]), ("bad", [4, 4, 3, 5])):
        with TokenFileWriter(tmp_path / name, 100, boundaries=True) as writer:
            for length in lengths:
                writer.add_tokens(np.arange(length))
                writer.add_sequences(np.array([0, length]))
                writer.add_documents(np.array([2]))
            writer.finish(packing=packing)
    verify(tmp_path / "good")
    with pytest.raises(UserError, match="bin 2 has 3 tokens, but .*bad.json says .* bins of 4"):
        verify(tmp_path / "bad")
    alter_manifest(tmp_path / "good", packing={**packing, "bins": 3})
    with pytest.raises(UserError, match="says 3 bins of 4 tokens, but .*good.bin has 16"):
        TokenFile(tmp_path / "good")


@pytest.mark.parametrize("largest", [10, 12])
def test_the_largest_id(write_tokens, largest):
    prefix = write_tokens(GOLDEN)
    alter_manifest(prefix, largest_id=largest)
    with pytest.raises(UserError, match=f"corpus.json says largest_id {largest}, but that of .*corpus.bin is 11"):
        verify(prefix)


@pytest.mark.parametrize(
    ("altered", "message"),
    [
        ({"tokenizer": None}, "says tokenizer null, which is not of type dict"),
        ({"tokenizer": {}}, "lacks tokenizer.fingerprint"),
        ({"tokenizer": {"fingerprint": "f", "vocab_size": "9"}}, 'says tokenizer.vocab_size "9"'),
        ({"tokenizer": {"fingerprint": "f", "vocab_size": 9, "folder": 1}}, "says tokenizer.folder 1"),
        ({"largest_id": "9"}, 'says largest_id "9", which is not of type int'),
        ({"largest_id": True}, "says largest_id true"),
        ({"largest_id": None}, "says largest_id null"),
        ({"packing": [5]}, r"says packing \[5\]"),
        ({"packing": {"length": 11, "bins": 1, "padding": 0}}, "lacks packing.eod_id"),
        ({"options": None}, "says options null"),
        ({"sources": None}, "says sources null"),
        ({"sources": [{"name": "x", "bytes": 1}, {"bytes": 1}]}, r"lacks sources\[1\].name"),
        ({"text_bytes": "a"}, 'says text_bytes "a"'),
    ],
)
def test_manifests_of_another_form(write_tokens, altered, message):
    prefix = write_tokens(GOLDEN)
    alter_manifest(prefix, **altered)
    with pytest.raises(UserError, match=f"corpus.json {message}.*build the token file again"):
        TokenFile(prefix)


def test_files_that_cannot_be_read(write_tokens, tmp_path):
    with pytest.raises(UserError, match="cannot read .*xxx.bin: File name too long"):
        TokenFile(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match=f"cannot read {tmp_path}: Is a directory"):
        list(read_chunks(tmp_path, np.dtype(np.uint8)))
    file = TokenFile(write_tokens(GOLDEN))
    file.bin_path.unlink()
    with pytest.raises(UserError, match="cannot read .*corpus.bin: No such file"):
        _ = file.fingerprint


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [(0, 0, "not a token index"), (9, 2, "version 2"), (17, 7, "dtype code 7"), (-8, 3, "boundaries run from 0 to 3")],
)
def test_header_faults(write_tokens, at, value, message):
    prefix = write_tokens(GOLDEN)
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[at] = value
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        TokenFile(prefix)


def test_missing_files_and_broken_manifests(write_tokens, tmp_path):
    with pytest.raises(UserError, match="absent.bin does not exist"):
        TokenFile(tmp_path / "absent")
    prefix = write_tokens(GOLDEN)
    path = Path(f"{prefix}.json")
    manifest = path.read_text()
    for broken, message in [
        (manifest[:-20], "cannot be read"),
        ("{}", "no manifest"),
        (manifest.replace('"version": 1', '"version": 9'), "version 9"),
        (manifest.replace('"tokens"', '"token"'), "lacks tokens"),
        (manifest.replace('"tokens": 11', '"tokens": 12'), "says tokens 12"),
    ]:
        path.write_text(broken)
        with pytest.raises(UserError, match=message):
            TokenFile(prefix)


def test_another_tokenizer_is_refused(write_tokens):
    prefix = write_tokens(GOLDEN)
    TokenFile(prefix, tokenizer_fingerprint="f00d")
    with pytest.raises(UserError, match="another tokenizer"):
        TokenFile(prefix, tokenizer_fingerprint="beef")


def test_fingerprint_is_of_the_content(write_tokens):
    prefix = write_tokens(GOLDEN)
    with_manifest = TokenFile(prefix).fingerprint
    Path(f"{prefix}.json").unlink()
    assert TokenFile(prefix).fingerprint == with_manifest
    assert TokenFile(write_tokens([[1, 2, 4], *GOLDEN[1:]], name="other")).fingerprint != with_manifest


def test_a_file_replaced_under_its_manifest_is_found(write_tokens):
    prefix = write_tokens(GOLDEN)
    Path(f"{prefix}.bin").write_bytes(b"\0" * 22)
    with pytest.raises(UserError, match="is not what"):
        _ = TokenFile(prefix).fingerprint


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_bounds_of_sequences_at_once_are_those_one_by_one(tmp_path_factory, lengths):
    folder = tmp_path_factory.mktemp("bounds")
    file = TokenFile(write_index(folder / "x", np.uint16, lengths, [0, len(lengths)], range(sum(lengths))))
    bounds = np.cumsum([0, *lengths])
    numbers = np.arange(len(lengths) + 1)[::-1]
    assert file.token_bounds(numbers).tolist() == [file.token_bound(i) for i in numbers.tolist()]
    assert file.token_bounds(numbers).tolist() == bounds[::-1].tolist()


def test_verify_knows_the_vocabulary(write_tokens, tmp_path):
    """That of a manifest, or the caller's where there is none."""
    prefix = write_tokens(GOLDEN, manifest=False)
    verify(prefix, vocab_size=12)
    with pytest.raises(UserError, match="token 10 is 11, outside the vocabulary of 11 tokens"):
        verify(prefix, vocab_size=11)
    foreign = write_index(tmp_path / "foreign", np.int32, [2], [0, 1], [3, -4])
    with pytest.raises(UserError, match="token 1 is -4, below zero"):
        verify(foreign)
