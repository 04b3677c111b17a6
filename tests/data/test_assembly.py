import errno
import itertools
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megaslm.data import (
    Assembly,
    TokenFile,
    TokenFileWriter,
    assemble,
    order,
    output_lock,
    packing,
    token_writer,
    verify,
)
from megaslm.data import assembly as module
from megaslm.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
from streams import EOD, TOKENIZER, key_of, write_stream  # noqa: E402


def build(folder: Path, documents: list[list[int]], assembly: Assembly, overwrite=False) -> list[TokenFile]:
    stream = write_stream(folder / "corpus.work", documents)
    written = []
    manifests = assemble(
        stream,
        assembly,
        assembly.prefixes(str(folder / "corpus")),
        vocab_size=1000,
        tokenizer=TOKENIZER,
        eod_id=EOD,
        facts={"sources": []},
        overwrite=overwrite,
        progress=written.append,
    )
    files = [verify(prefix) for prefix in assembly.prefixes(str(folder / "corpus"))]
    assert [file.manifest for file in files] == manifests
    assert sum(written) == sum(file.num_tokens for file in files)
    assert not (folder / "corpus.work" / "assembly").exists()
    return files


def unpack(file: TokenFile) -> list[list[int]]:
    """Pieces of a packed file, without padding and empty documents, which are alike; every bin is whole."""
    pieces = []
    for index in range(file.num_documents):
        first, last = file.document_boundaries[index : index + 2].tolist()
        sequences = [file.sequence(i).tolist() for i in range(first, last)]
        assert sum(map(len, sequences)) == file.packing["length"]
        pieces += [sequence for sequence in sequences if set(sequence) != {EOD}]
    return pieces


def cut(documents: list[list[int]], length: int) -> list[list[int]]:
    pieces = [document[i : i + length] for document in documents for i in range(0, len(document), length)]
    return [piece for piece in pieces if piece != [EOD]]


def naive_parts(documents: list[list[int]], assembly: Assembly) -> list[list[list[int]]]:
    """The documents of each output in the order of the inputs, by sorting them all."""
    kept = list(map(list, dict.fromkeys(map(tuple, documents)))) if assembly.dedup else documents
    if not assembly.split or not kept:
        return [kept]
    half_key = {str(document): int.from_bytes(key_of(document)[:8], "little") for document in kept}
    ranked = sorted(half_key[str(document)] for document in kept)
    shares = np.cumsum([float(share) for share in assembly.split.split(",")])
    cuts = [ranked[bound] for share in shares[:-1] if (bound := round(share / shares[-1] * len(kept))) < len(kept)]
    parts = [[] for _ in shares]
    for document in kept:
        parts[sum(half_key[str(document)] >= cut for cut in cuts)].append(document)
    return parts


# Few and short texts, so that some are equal, and longer ones, which are cut; none holds the end-of-document token.
DOCUMENTS = st.lists(
    st.lists(st.integers(0, 1), max_size=3) | st.lists(st.integers(10, 999), min_size=4, max_size=30), max_size=40
)


@settings(max_examples=120, deadline=None)
@given(
    documents=DOCUMENTS,
    dedup=st.booleans(),
    split=st.sampled_from([None, "50,50", "60,20,20"]),
    shuffle_seed=st.none() | st.integers(0, 9),
    pack=st.none() | st.integers(1, 12),
    block=st.sampled_from([3, 1 << 20]),
)
@example(documents=[[0]] * 40, dedup=True, split=None, shuffle_seed=1, pack=2, block=3)
@example(documents=[[0]] * 3 + [[1]] * 3, dedup=False, split="50,50", shuffle_seed=None, pack=None, block=3)
def test_against_a_naive_model(tmp_path_factory, documents, dedup, split, shuffle_seed, pack, block):
    assembly = Assembly(dedup, split, shuffle_seed, pack)
    expected = naive_parts(documents, assembly)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "CHUNK_DOCUMENTS": block,
            "PACK_BLOCK_DOCUMENTS": block,
            "DEDUP_KEYS": block,
            "BUFFER_BYTES": 10,
        }.items():
            patch.setattr(module, name, value)
        folder = tmp_path_factory.mktemp("assembly")
        if not all(expected) and split:
            with pytest.raises(UserError, match=r"part of split .* is empty"):
                build(folder, documents, assembly)
            assert not list(folder.glob("corpus*.*in"))
            return
        files = build(folder, documents, assembly)
    for file, part in zip(files, expected, strict=True):
        ended = [[*document, EOD] for document in part]
        assert file.manifest["text_bytes"] == 3 * sum(map(len, ended))
        assert file.manifest["assembly"]["duplicates"] == len(documents) - sum(map(len, expected))
        assert file.tokenizer_fingerprint == "f00d" and file.vocab_size == 1000
        if pack:
            assert sorted(unpack(file)) == sorted(cut(ended, pack + 1))
            empty = sum(len(document) % (pack + 1) == 1 for document in ended)  # pieces that may be taken for padding
            assert 0 <= file.packing["padding"] - (file.num_tokens - sum(map(len, ended))) <= empty
            assert file.packing["documents"] == len(ended)
            assert file.packing["cut_documents"] == sum(len(document) > pack + 1 for document in ended)
        else:
            found = [file.document(i).tolist() for i in range(file.num_documents)]
            assert found == ended if shuffle_seed is None else sorted(found) == sorted(ended)


def test_shuffled_documents_are_in_another_order_for_each_seed(tmp_path):
    documents = [[i] for i in range(200)]
    orders = {}
    for seed, name in itertools.product((1, 2), "ab"):
        (file,) = build(tmp_path / f"{name}{seed}", documents, Assembly(shuffle_seed=seed))
        orders[name, seed] = file.tokens[::2].tolist()
        assert sorted(orders[name, seed]) == list(range(200))
        # Neighbours are parted: of a random order one pair in a hundred is left.
        assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(orders[name, seed])) < 12
    assert orders["a", 1] == orders["b", 1] != orders["a", 2] == orders["b", 2]


def test_parts_do_not_depend_on_the_order_of_the_inputs(tmp_path):
    documents = [[i % 60] for i in range(90)]
    once = build(tmp_path / "once", documents, Assembly(split="60,20,20"))
    again = build(tmp_path / "again", documents[::-1], Assembly(split="60,20,20"))
    for a, b in zip(once, again, strict=True):
        assert sorted(a.tokens.tolist()) == sorted(b.tokens.tolist())
    contents = [set(file.tokens.tolist()) - {EOD} for file in once]
    assert set.union(*contents) == set(range(60)) - {EOD} and sum(map(len, contents)) == 59  # no text in two parts


def test_a_stream_of_one_text_is_deduplicated_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DEDUP_KEYS", 8)
    compared, lexsort = [], np.lexsort
    monkeypatch.setattr(np, "lexsort", lambda keys: compared.append(len(keys[0])) or lexsort(keys))
    (file,) = build(tmp_path, [[5]] * 500 + [[6]], Assembly(dedup=True))
    assert file.tokens.tolist() == [5, EOD, 6, EOD] and max(compared) <= 2 * 8


def test_memory_does_not_grow_with_the_documents(tmp_path, monkeypatch):
    assembly = Assembly(dedup=True, split="90,10", shuffle_seed=1, pack=30)
    for name in ("CHUNK_DOCUMENTS", "PACK_BLOCK_DOCUMENTS", "DEDUP_KEYS", "BUFFER_BYTES"):
        monkeypatch.setattr(module, name, 512)
    for of, name in ((module, "DIGIT_BITS"), (order, "STORED_SHUFFLE_LIMIT")):
        monkeypatch.setattr(of, name, 8)
    for name in ("CHUNK_BYTES", "CHUNK_ENTRIES"):
        monkeypatch.setattr(token_writer, name, 512)
    peaks = []
    numbers = 2000, 20_000
    for number in numbers:
        stream = write_stream(tmp_path / f"{number}.work", [[i // 2] for i in range(number)])
        tracemalloc.start()
        assemble(
            stream,
            assembly,
            assembly.prefixes(str(tmp_path / str(number))),
            vocab_size=60_000,
            tokenizer=TOKENIZER,
            eod_id=EOD,
            facts={},
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 4 * (numbers[1] - numbers[0])  # as a single number of 4 bytes for each would take


def test_packing_needs_an_end_of_document_token(tmp_path):
    stream = write_stream(tmp_path, [[1]])
    with pytest.raises(UserError, match="end-of-document"):
        assemble(stream, Assembly(pack=4), ["x"], vocab_size=10, tokenizer=TOKENIZER, eod_id=None, facts={})


@pytest.mark.parametrize("split", ["100", "50,0,50", "a,b", "1,1,1,1"])
def test_shares_that_make_no_sense(split):
    with pytest.raises(UserError, match="split"):
        Assembly(split=split)


def test_what_has_nothing_to_do():
    assert Assembly().identity and not Assembly(dedup=True).identity
    for length in (0, 10**12):
        with pytest.raises(UserError, match=f"packed into sequences of {length} tokens: give 1 to 16,777,216"):
            Assembly(pack=length)


def test_nothing_is_left_of_an_assembly_that_failed(tmp_path, monkeypatch):
    """No file, no open file and no lock; and what was there before is as it was."""
    documents = [[i] for i in range(40)]
    assembly = Assembly(split="50,50")
    before = [file.manifest for file in build(tmp_path, documents, assembly)]
    with pytest.raises(UserError, match="corpus_train.bin exists and would be overwritten"):
        build(tmp_path, documents, assembly)
    opened = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else None

    def no_space(writer, **facts):
        if writer.prefix.endswith("validation"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return prepare(writer, **facts)

    prepare, caught = TokenFileWriter.prepare, []
    for target, name, value, error in (
        (packing.PaddingCount, "add", lambda self, ids: 1 // 0, ZeroDivisionError),
        (TokenFileWriter, "prepare", no_space, UserError),
        (module, "commit", lambda files: 1 // 0, ZeroDivisionError),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            with pytest.raises(error) as one:
                build(tmp_path, documents, Assembly(split="50,50", pack=7), overwrite=True)
            caught.append(one)  # and with it all that it refers to: nothing is closed only because it is forgotten
        for part, manifest in zip(("train", "validation"), before, strict=True):
            assert verify(tmp_path / f"corpus_{part}").manifest == manifest
        assert len(list(tmp_path.iterdir())) == 7 and not (tmp_path / "corpus.work" / "assembly").exists()
    if opened is not None:
        assert len(os.listdir("/proc/self/fd")) == opened, caught
    build(tmp_path, documents, Assembly(split="50,50", pack=7), overwrite=True)


def test_outputs_of_a_split_are_locked(tmp_path):
    with output_lock(tmp_path / "corpus_validation"), pytest.raises(UserError, match="is writing .*corpus_validation"):
        build(tmp_path, [[i] for i in range(40)], Assembly(split="50,50"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.work"]


def test_the_parts_of_a_split_are_shuffled_by_orders_of_their_own(tmp_path):
    """By the ranks that they have in the order of the inputs."""
    documents = [[i] for i in range(10, 310)]
    plain = build(tmp_path / "plain", documents, Assembly(split="50,50"))
    ranks = []
    for before, after in zip(
        plain, build(tmp_path / "shuffled", documents, Assembly(split="50,50", shuffle_seed=3)), strict=True
    ):
        places = {token: rank for rank, token in enumerate(before.tokens[::2].tolist())}
        ranks.append([places[token] for token in after.tokens[::2].tolist()])
    assert len(ranks[0]) == len(ranks[1]) == 150 and ranks[0] != ranks[1]


def test_all_is_on_the_disk_before_the_first_output_has_its_name(tmp_path):
    seen = []
    stream = write_stream(tmp_path / "corpus.work", [[i] for i in range(40)])
    assembly = Assembly(split="50,50")
    prefixes = assembly.prefixes(str(tmp_path / "corpus"))
    assemble(
        stream,
        assembly,
        prefixes,
        vocab_size=1000,
        tokenizer=TOKENIZER,
        eod_id=EOD,
        facts={},
        before_commit=lambda: seen.extend(sorted(path.name for path in tmp_path.glob("*.[bij]*"))),
    )
    # The three of each part, and what they were written from.
    assert {f".corpus_{part}.{kind}.tmp" for part in ("train", "validation") for kind in ("bin", "idx", "json")} <= set(
        seen
    )
    assert all(name.startswith(".") for name in seen)
    assert all(verify(prefix).num_documents == 20 for prefix in prefixes)
