import contextlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaslm.data import (
    Assembly,
    Document,
    TokenFile,
    TokenFileWriter,
    assemble,
    build_token_file,
    find_tokenizer,
    load_tokenizer,
    merge_token_files,
    output_lock,
    split_token_file,
    verify,
)
from megaslm.data import token_file as module
from megaslm.data.token_file import HEADER
from megaslm.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from streams import EOD, TOKENIZER, write_stream  # noqa: E402

SEQUENCES = st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=3)


def write_documents(prefix, documents, dtype=None, tokenizer="f00d"):
    """Documents of several sequences each."""
    with TokenFileWriter(prefix, 100, tokenizer, dtype=dtype, boundaries=True) as writer:
        for sequences in documents:
            writer.add_tokens(np.array(sum(sequences, []), np.int64))
            writer.add_sequences(np.array([len(sequence) for sequence in sequences], np.int64))
            writer.add_documents(np.array([len(sequences)]))
        writer.finish(
            text_bytes=10 * len(documents), sources=[{"name": Path(prefix).name, "bytes": 3}], options={"eod_id": 7}
        )
    return str(prefix)


def read_documents(file):
    bounds = file.document_boundaries.tolist()
    return [[file.sequence(i).tolist() for i in range(*pair)] for pair in zip(bounds, bounds[1:], strict=False)]


def pack(folder, documents, seq_length=7):
    prefix = str(folder / "packed")
    stream = write_stream(folder / "packed.work", documents)
    pack = Assembly(pack=seq_length)
    assemble(
        stream, pack, [prefix], vocab_size=1000, tokenizer=TOKENIZER, eod_id=EOD, facts={"options": {"eod_id": EOD}}
    )
    return prefix


@settings(max_examples=25, deadline=None)
@given(
    contents=st.lists(st.lists(SEQUENCES, max_size=8), min_size=1, max_size=4),
    widths=st.lists(st.sampled_from([np.uint16, np.int32, np.int64]), min_size=4, max_size=4),
)
def test_merge_keeps_documents_and_sequences(tmp_path_factory, contents, widths):
    folder = tmp_path_factory.mktemp("merge")
    inputs = [write_documents(folder / f"part{i}", one, widths[i]) for i, one in enumerate(contents)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", 8)
        patch.setattr(module, "CHUNK_ENTRIES", 3)
        manifest = merge_token_files(inputs, folder / "all")
    file = verify(folder / "all")
    assert file.manifest == manifest
    assert read_documents(file) == sum(contents, [])
    assert file.dtype == np.result_type(*widths[: len(contents)])
    assert manifest["text_bytes"] == 10 * file.num_documents and manifest["options"] == {"eod_id": 7}
    assert [one["name"] for one in manifest["sources"]] == [Path(prefix).name for prefix in inputs]
    assert [one["documents"] for one in manifest["merged"]] == list(map(len, contents))


@settings(max_examples=25, deadline=None)
@given(documents=st.lists(SEQUENCES, min_size=4, max_size=20), split=st.sampled_from(["50,50", "2,1,1", "34,33,33"]))
def test_split_cuts_between_documents_and_merge_undoes_it(tmp_path_factory, documents, split):
    folder = tmp_path_factory.mktemp("split")
    prefix = write_documents(folder / "all", documents)
    manifests = split_token_file(prefix, folder / "part", split)
    names = ["train", "validation", "test"][: len(manifests)]
    outputs = [str(folder / f"part_{name}") for name in names]
    shares = np.cumsum([float(share) for share in split.split(",")])
    bounds = [0, *(int(round(share / shares[-1] * len(documents))) for share in shares)]
    assert list(manifests) == outputs
    for i, (output, manifest) in enumerate(manifests.items()):
        file = verify(output)
        assert read_documents(file) == documents[bounds[i] : bounds[i + 1]]
        assert file.manifest == manifest
        assert manifest["split"] == {"of": "all", "shares": split, "part": names[i], "first_document": bounds[i]}
        assert manifest["sources"] == [{"name": "all", "bytes": 3}] and manifest["options"] == {"eod_id": 7}
    merge_token_files(outputs, folder / "again")
    for ending in (".bin", ".idx"):
        assert Path(f"{folder / 'again'}{ending}").read_bytes() == Path(f"{prefix}{ending}").read_bytes()


def test_packed_files_stay_packed(tmp_path):
    prefix = pack(tmp_path, [[i] * (1 + i % 11) for i in range(10, 50)])
    whole = TokenFile(prefix)
    manifests = split_token_file(prefix, tmp_path / "part", "50,50")
    parts = [verify(tmp_path / "part_train"), verify(tmp_path / "part_validation")]
    assert sum(part.packing["bins"] for part in parts) == whole.packing["bins"] == whole.num_documents
    assert sum(part.packing["padding"] for part in parts) == whole.packing["padding"] > 0
    merged = merge_token_files([part.prefix for part in parts], tmp_path / "again")
    assert merged["bin_sha256"] == whole.manifest["bin_sha256"]
    assert merged["packing"] == {key: whole.packing[key] for key in ("length", "eod_id", "bins", "padding")}
    assert [manifest["documents"] for manifest in manifests.values()] == [part.num_documents for part in parts]


def test_only_files_that_are_packed_alike_are_merged(tmp_path):
    packed = pack(tmp_path, [[1, 2]] * 9)
    other = pack(tmp_path / "other", [[1, 2]] * 9, seq_length=8)
    plain = write_documents(tmp_path / "plain", [[[1, 2]]])
    with pytest.raises(UserError, match="is packed into bins of 8 tokens .* and .*packed into bins of 9"):
        merge_token_files([packed, other], tmp_path / "all")
    with pytest.raises(UserError, match="not packed"):
        merge_token_files([plain, packed], tmp_path / "all")
    assert not list(tmp_path.glob("*all*"))


def test_the_tokenizer_goes_along(bpe, tmp_path):
    for name in ("one", "two"):
        build_token_file([Document(f"text of {name}", name, None)], bpe, tmp_path / "from" / name)
    shutil.rmtree(tmp_path / "from" / "one.tokenizer")
    merge_token_files([tmp_path / "from" / "one", tmp_path / "from" / "two"], tmp_path / "to" / "all")
    assert find_tokenizer(tmp_path / "to" / "all") == str(tmp_path / "to" / "all.tokenizer")
    assert load_tokenizer(tmp_path / "to" / "all.tokenizer").same_files(bpe)
    split_token_file(tmp_path / "to" / "all", tmp_path / "parts" / "x", "50,50")
    for part in ("x_train", "x_validation"):
        assert find_tokenizer(tmp_path / "parts" / part) == str(tmp_path / "parts" / "x.tokenizer")
    assert TokenFile(tmp_path / "parts" / "x_train").vocab_size == bpe.vocab_size


def test_tokenizers_must_agree(tmp_path):
    one, two = (write_documents(tmp_path / name, [[[1]]], tokenizer=name) for name in ("f00d", "beef"))
    with pytest.raises(UserError, match="different tokenizers .fingerprints f00d and beef"):
        merge_token_files([one, two], tmp_path / "all")
    Path(f"{two}.json").unlink()
    manifest = merge_token_files([one, two], tmp_path / "all")  # whoever has none may be from anywhere
    assert manifest["tokenizer"] == {"fingerprint": None, "vocab_size": None, "folder": None}
    assert "text_bytes" not in manifest and manifest["options"] == {}
    assert verify(tmp_path / "all").num_tokens == 2


def test_an_input_is_never_overwritten(tmp_path):
    prefix = write_documents(tmp_path / "x_train", [[[1]], [[2]]])
    with pytest.raises(UserError, match="input and the output"):
        merge_token_files([prefix], tmp_path / "sub" / ".." / "x_train")
    with pytest.raises(UserError, match="input and the output"):
        split_token_file(prefix, tmp_path / "x", "50,50")
    verify(prefix)


def test_too_few_documents_for_a_part(tmp_path):
    prefix = write_documents(tmp_path / "x", [[[1]], [[2]]])
    with pytest.raises(UserError, match="validation part of split 98,2 is empty"):
        split_token_file(prefix, tmp_path / "part", "98,2")
    assert not list(tmp_path.glob("*part*"))


def test_an_output_is_replaced_only_when_asked(tmp_path):
    prefix = write_documents(tmp_path / "x", [[[i]] for i in range(10)])
    merge_token_files([prefix], tmp_path / "all")
    split_token_file(prefix, tmp_path / "part", "50,50")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="all.bin exists and would be overwritten"):
        merge_token_files([prefix, prefix], tmp_path / "all")
    Path(tmp_path / "part_train.bin").rename(tmp_path / "kept.bin")  # any of the files of any part is enough
    with pytest.raises(UserError, match="part_train.idx exists and would be overwritten"):
        split_token_file(prefix, tmp_path / "part", "80,20")
    Path(tmp_path / "kept.bin").rename(tmp_path / "part_train.bin")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    merge_token_files([prefix, prefix], tmp_path / "all", overwrite=True)
    split_token_file(prefix, tmp_path / "part", "80,20", overwrite=True)
    assert verify(tmp_path / "all").num_documents == 20 and verify(tmp_path / "part_validation").num_documents == 2


@pytest.mark.parametrize("fault", ["a full disk", "another writer"])
def test_parts_are_replaced_together_or_not_at_all(bpe, tmp_path, monkeypatch, fault):
    build_token_file([Document(str(i), "x", None) for i in range(10)], bpe, tmp_path / "x")
    split_token_file(tmp_path / "x", tmp_path / "part", "50,50")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    prepare = TokenFileWriter.prepare

    def full(writer, **facts):
        if writer.prefix.endswith("validation"):
            raise UserError("cannot write: No space left on device")
        return prepare(writer, **facts)

    with contextlib.ExitStack() as stack:
        if fault == "a full disk":
            monkeypatch.setattr(TokenFileWriter, "prepare", full)
        else:
            stack.enter_context(output_lock(tmp_path / "part_validation"))
        with pytest.raises(UserError, match="No space left|is writing"):
            split_token_file(tmp_path / "x", tmp_path / "part", "80,20", overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_parts_know_their_bytes_of_text(bpe, tmp_path):
    texts = ["naïve 敏捷 fox", "the quick brown fox", "", "jumps"]
    build_token_file([Document(text, "x", None) for text in texts], bpe, tmp_path / "x")
    manifests = split_token_file(tmp_path / "x", tmp_path / "part", "50,50")
    sizes = [len(text.encode()) for text in texts]
    assert [manifest["text_bytes"] for manifest in manifests.values()] == [sum(sizes[:2]), sum(sizes[2:])]
    whole = TokenFile(tmp_path / "x").manifest
    for manifest in manifests.values():
        assert manifest["encoder"] == whole["encoder"] and "merged" not in manifest
    # Not where the tokens do not tell: here the manifest counts text that a tokenizer left out.
    path = tmp_path / "x.json"
    path.write_text(path.read_text().replace(f'"text_bytes": {sum(sizes)}', f'"text_bytes": {sum(sizes) + 1}'))
    manifests = split_token_file(tmp_path / "x", tmp_path / "other", "50,50")
    assert not any("text_bytes" in manifest for manifest in manifests.values())


def test_a_merge_remembers_how_each_input_was_built(tmp_path):
    plain = write_documents(tmp_path / "plain", [[[1]]])
    with TokenFileWriter(tmp_path / "other", 100, "f00d") as writer:
        writer.append([2])
        facts = {"skipped": {"records": 3, "empty": 1}, "filtered": 5, "encoder": {"name": "gigatoken"}}
        writer.finish(**facts, assembly={"dedup": True})
    merged = merge_token_files([plain, tmp_path / "other"], tmp_path / "all")["merged"]
    assert not merged[0].keys() & {"skipped", "filtered", "encoder", "assembly"}
    assert facts.items() <= merged[1].items() and merged[1]["assembly"] == {"dedup": True}


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_a_change_is_found_where_no_quick_look_finds_it(tmp_path, monkeypatch, ending):
    """By the hashes of all that there is: of the tokens, and of an index that is sound in itself."""
    monkeypatch.setattr(module, "FINGERPRINT_BLOCK_BYTES", 1)
    prefix = write_documents(tmp_path / "x", [[[i] * 50] for i in range(70)])
    path = Path(prefix + ending)
    content = bytearray(path.read_bytes())
    if ending == ".bin":
        content[10] += 1
    else:
        lengths = np.frombuffer(content, "<i4", 70, HEADER.size)
        offsets = np.frombuffer(content, "<i8", 70, HEADER.size + 4 * 70)
        lengths[40] -= 1
        lengths[41] += 1
        offsets[41] -= 2
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"x{ending} has SHA-256"):
        merge_token_files([prefix], tmp_path / "y")
    with pytest.raises(UserError, match=f"x{ending} has SHA-256"):
        split_token_file(prefix, tmp_path / "y", "50,50")
    assert not list(tmp_path.glob("*y*"))


def test_two_merges_never_write_to_one_output(tmp_path):
    prefix = write_documents(tmp_path / "x", [[[1]]])
    with output_lock(tmp_path / "all"), pytest.raises(UserError, match="is writing .*all"):
        merge_token_files([prefix], tmp_path / "all")


@pytest.mark.parametrize("at", ["lengths", "offsets", "boundaries"])
@pytest.mark.parametrize("manifest", [True, False])
def test_nothing_is_made_of_a_damaged_index(tmp_path, at, manifest):
    """Also where its first and last entries, all that opening looks at, are sound, and there is no hash of it."""
    prefix = write_documents(tmp_path / "x", [[[1, 2], [3]], [[4]], [[5], [6, 7]], [[8]]])
    file = TokenFile(prefix)
    offsets = HEADER.size + 4 * file.num_sequences
    place = {
        "lengths": HEADER.size + 4,
        "offsets": offsets + 8,
        "boundaries": offsets + 8 * file.num_sequences + 16,
    }[at]
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[place] = 6 if at == "boundaries" else content[place] + 1
    path.write_bytes(content)
    if not manifest:
        Path(f"{prefix}.json").unlink()
    TokenFile(prefix)
    before = sorted(tmp_path.iterdir())
    for make in (lambda: merge_token_files([prefix], tmp_path / "y"), lambda: split_token_file(prefix, "y", "50,50")):
        with pytest.raises(UserError, match=r"x\.idx: (sequence|document) \d"):
            make()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("ending", [".bin", ".idx"])
@pytest.mark.parametrize("packed", [False, True])
def test_any_change_of_merged_and_packed_files_is_found(tmp_path, ending, packed):
    """Any byte altered, any truncation; and nothing is made of such a file."""
    if packed:
        prefix = pack(tmp_path, [[i] * (1 + i % 11) for i in range(10, 30)])
    else:
        parts = [write_documents(tmp_path / name, [[[1, 2], [3]], [[4]], []]) for name in "ab"]
        prefix = str(tmp_path / "merged")
        merge_token_files(parts, prefix)
    path = Path(prefix + ending)
    content = path.read_bytes()

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def find(data):
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            path.write_bytes(content[:at])
        else:
            path.write_bytes(content[:at] + bytes([content[at] ^ data.draw(st.integers(1, 255))]) + content[at + 1 :])
        with pytest.raises(UserError):
            verify(prefix)
        with pytest.raises(UserError):
            merge_token_files([prefix], tmp_path / "copy")
        with pytest.raises(UserError):
            split_token_file(prefix, tmp_path / "copy", "50,50")
        assert not list(tmp_path.glob("*copy*"))

    find()
    path.write_bytes(content)
    verify(prefix)
