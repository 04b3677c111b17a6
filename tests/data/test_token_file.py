import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaslm.data import TokenFile, TokenFileWriter, verify
from megaslm.data.token_file import DTYPE_CODES, HEADER, MAGIC, token_dtype
from megaslm.errors import UserError

GOLDEN = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
GOLDEN_IDX = "4b6966c5e660c7f563ab29eca5443b923e2997c97d21cc350d78f7cc94b4e55c"
GOLDEN_BIN = "73b2a277aa01fb869a65215b7d78c832e5e10ab987e0811795a4973a69e9ce6c"


def write_index(prefix, dtype, lengths, boundaries, tokens, tail=b""):
    """A file as another program may write it: any dtype, several sequences per document, no manifest."""
    dtype, lengths = np.dtype(dtype), np.array(lengths, np.int32)
    offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    header = HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype], len(lengths), len(boundaries))
    Path(f"{prefix}.bin").write_bytes(np.array(tokens, dtype).tobytes())
    Path(f"{prefix}.idx").write_bytes(
        header + lengths.tobytes() + offsets.tobytes() + np.array(boundaries, np.int64).tobytes() + tail
    )
    return str(prefix)


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
    with pytest.raises(UserError, match="multimodal"):
        TokenFile(prefix)


def test_an_older_file_survives_a_failed_build(write_tokens, tmp_path):
    prefix = write_tokens(GOLDEN)
    with pytest.raises(RuntimeError), TokenFileWriter(prefix, 100) as writer:
        writer.append([1, 2])
        raise RuntimeError("the machine is on fire")
    with TokenFileWriter(prefix, 100) as writer:
        writer.append([1, 2])  # left without finish
    assert verify(prefix).num_tokens == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx", "corpus.json"]


@pytest.mark.parametrize("ids", [[1, 100], [-1]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, ids):
    with pytest.raises(UserError, match=rf"token id {ids[-1]} .*vocabulary of 100"):
        with TokenFileWriter(tmp_path / "x", 100) as writer:
            writer.append(ids)


def test_the_users_own_json_is_not_overwritten(tmp_path):
    (tmp_path / "corpus.json").write_text('{"text": "precious"}\n')
    with pytest.raises(UserError, match="corpus.json exists"):
        TokenFileWriter(tmp_path / "corpus", 100)
    assert "precious" in (tmp_path / "corpus.json").read_text()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write token files"):
        TokenFileWriter(tmp_path / "file" / "corpus", 100)


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
    for ending in (".bin", ".idx"):
        path = Path(prefix + ending)
        content = path.read_bytes()
        for at in range(len(content)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(UserError, match="corpus"):
                verify(prefix)
        path.write_bytes(content)
    verify(prefix)


def test_faults_inside_the_index_are_found_without_a_manifest(write_tokens):
    prefix = write_tokens(GOLDEN, manifest=False)
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[HEADER.size + 4] = 2  # length of the second sequence
    path.write_bytes(content)
    TokenFile(prefix)
    with pytest.raises(UserError, match="sequence 2 has 5 tokens from byte 8"):
        verify(prefix)


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


def test_offsets_past_31_bits(tmp_path, monkeypatch):
    """Byte offsets are 64-bit: an index over 2^31 tokens, written without writing the tokens."""
    writer = TokenFileWriter(tmp_path / "long", 100_000)
    writer._lengths.extend([2**30] * 5)
    writer._write_index(tmp_path / "long.idx")
    writer.__exit__()
    offsets = np.frombuffer((tmp_path / "long.idx").read_bytes(), "<i8", 5, HEADER.size + 4 * 5)
    assert offsets.tolist() == [i * 2**32 for i in range(5)]
