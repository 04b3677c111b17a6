import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaslm.data import (
    Document,
    TokenFileWriter,
    build_token_file,
    dataset_statistics,
    excerpts,
    plot_lengths,
    token_file,
    tokenizer_of,
    train_bpe,
)
from megaslm.data import statistics as module
from megaslm.data.statistics import LengthBin, _bin_of, _smallest_of_bin
from megaslm.errors import UserError


@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 99), max_size=80), min_size=1, max_size=30),
    chunk=st.sampled_from([10, 1 << 20]),
)
def test_against_numpy(tmp_path_factory, documents, chunk):
    prefix = str(tmp_path_factory.mktemp("statistics") / "x")
    with TokenFileWriter(prefix, 100) as writer:
        writer.extend(documents)
        writer.finish(text_bytes=7, options={"eod_id": 5})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_file, "CHUNK_ENTRIES", chunk)
        patch.setattr(token_file, "CHUNK_BYTES", 2 * chunk)
        read = []
        found = dataset_statistics(prefix, progress=read.append)
        assert sum(read) == 2 * sum(map(len, documents)) and all(size <= 2 * chunk for size in read)
    lengths, ids = [len(document) for document in documents], sum(documents, [])
    assert (found.documents, found.tokens, found.used_ids) == (len(documents), len(ids), len(set(ids)))
    assert (found.largest_id, found.eod_tokens) == (max(ids, default=-1), ids.count(5))
    assert found.bytes_per_token == (7 / len(ids) if ids else None)
    measured = found.lengths
    assert (measured.shortest, measured.longest) == (min(lengths), max(lengths))
    assert measured.mean == pytest.approx(np.mean(lengths))
    assert measured.percentiles == {
        percent: int(np.percentile(lengths, percent, method="inverted_cdf")) for percent in module.PERCENTILES
    }
    assert [(one.documents, one.tokens) for one in measured.bins] == [
        (len(inside), sum(inside))
        for one in measured.bins
        for inside in [[length for length in lengths if one.low <= length <= one.high]]
    ]
    assert sum(one.documents for one in measured.bins) == len(documents)


@settings(deadline=None)
@given(st.lists(st.integers(0, (1 << 31) - 1), min_size=1))
def test_lengths_are_counted_within_a_part_in_32768(lengths):
    lengths = np.array(lengths)
    smallest = _smallest_of_bin(_bin_of(lengths))
    assert (_bin_of(smallest) == _bin_of(lengths)).all()
    assert (smallest <= lengths).all() and (lengths - smallest <= lengths / 32768).all()
    assert (smallest[lengths < 1 << 16] == lengths[lengths < 1 << 16]).all()


def test_documents_as_text(bpe, tmp_path):
    texts = ["the quick brown fox", "naïve 敏捷 fox " * 9, "", "the end"]
    build_token_file((Document(text, "x", None) for text in texts), bpe, tmp_path / "x")
    prefix = tmp_path / "x"
    shown = excerpts(prefix, tokenizer_of(prefix), count=2)
    assert [one.document for one in shown] == [0, 2]
    assert shown[0].text == "the quick brown fox<|endoftext|>" and not shown[0].cut
    (one,) = excerpts(prefix, bpe, count=1, at=1, characters=20)
    assert one.text == texts[1][:20] and one.cut and one.tokens > 20
    assert [one.document for one in excerpts(prefix, bpe, count=9, at=2)] == [2, 3]
    (raw,) = excerpts(prefix, None, count=1, at=3)
    assert bpe.decode(list(map(int, raw.text.split()))) == "the end"
    with pytest.raises(UserError, match="no document 4 .* 0 to 3"):
        excerpts(prefix, bpe, count=1, at=4)


def test_ids_that_are_no_tokens_are_shown_as_such(bpe, tmp_path):
    fox = bpe.encode("fox").tolist()
    with TokenFileWriter(tmp_path / "x", None, dtype=np.int32) as writer:
        writer.append([70_000, *fox, bpe.vocab_size, 70_001, *fox])
        writer.finish()
    (shown,) = excerpts(tmp_path / "x", bpe, count=1)
    assert shown.text == f"<id 70000>fox<id {bpe.vocab_size}><id 70001>fox"


def test_pieces_of_a_packed_file(tmp_path):
    """Each by itself, the padding of a bin counting as one."""
    with TokenFileWriter(tmp_path / "x", 100, boundaries=True) as writer:
        writer.add_tokens(np.array([1, 2, 9, 3, 9, 9, 9, 9]))
        writer.add_sequences(np.array([3, 1, 1, 3]))
        writer.add_documents(np.array([2, 2]))
        writer.finish(packing={"length": 4, "bins": 2, "padding": 3, "eod_id": 9}, options={"eod_id": 9})
    found = dataset_statistics(tmp_path / "x")
    assert (found.documents, found.sequences, found.eod_tokens) == (2, 4, 5)
    assert (found.lengths.number, found.lengths.shortest, found.lengths.longest) == (4, 1, 3)
    assert found.lengths.bins == [LengthBin(1, 1, 2, 2), LengthBin(2, 3, 2, 6)]


def test_without_counting_ids_no_token_is_read(bpe, tmp_path, monkeypatch):
    build_token_file([Document("the fox", "x", None)], bpe, tmp_path / "x")
    counted = dataset_statistics(tmp_path / "x", bpe)
    monkeypatch.setattr(module, "read_chunks", None)
    found = dataset_statistics(tmp_path / "x", bpe, count_ids=False)
    assert (found.used_ids, found.eod_tokens) == (None, None) and counted.eod_tokens == 1
    assert replace(found, used_ids=counted.used_ids, eod_tokens=1) == counted


def test_bytes_per_token_without_the_manifests_word(bpe, write_tokens):
    """By the bytes that each token stands for."""
    ids = bpe.encode("naïve 敏捷 fox")
    found = dataset_statistics(write_tokens([ids], vocab_size=bpe.vocab_size), bpe)
    assert found.bytes_per_token == len("naïve 敏捷 fox".encode()) / len(ids)


def test_another_tokenizer_is_refused(bpe, tmp_path):
    build_token_file([Document("the fox", "x", None)], bpe, tmp_path / "x")
    train_bpe(["other text entirely"] * 3, vocab_size=270).save(tmp_path / "other")
    with pytest.raises(UserError, match="another tokenizer"):
        tokenizer_of(tmp_path / "x", str(tmp_path / "other"))


def test_ids_that_no_vocabulary_has(tmp_path):
    with TokenFileWriter(tmp_path / "x", None, dtype=np.int64) as writer:
        writer.append([3, 1 << 40])
        writer.finish()
    with pytest.raises(UserError, match="token 1 is 1099511627776, which no vocabulary has"):
        dataset_statistics(tmp_path / "x")


@pytest.mark.parametrize("manifest", [True, False])
def test_a_damaged_file_is_shown_or_refused(bpe, write_tokens, manifest):
    prefix = write_tokens([[1, 2, 3], [4], [], [5, 6, 7]], vocab_size=bpe.vocab_size, manifest=manifest)
    for ending in (".bin", ".idx"):
        path = Path(prefix + ending)
        content = path.read_bytes()
        for at, bit in itertools.product(range(len(content)), (1, 128)):
            path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
            try:
                dataset_statistics(prefix, bpe)
                excerpts(prefix, bpe, count=4)
            except UserError as error:
                assert "corpus" in str(error)
        path.write_bytes(content)


def test_the_histogram_is_a_picture(write_tokens, tmp_path):
    statistics = dataset_statistics(write_tokens([[1], [2] * 9, []]))
    plot_lengths(statistics, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot write the histogram"):
        plot_lengths(statistics, tmp_path / "absent" / "lengths.png")


def test_a_file_without_documents(write_tokens):
    found = dataset_statistics(write_tokens([]))
    assert (found.documents, found.tokens, found.largest_id, found.lengths) == (0, 0, -1, None)
    assert excerpts(Path(found.prefix), None, count=3) == []
    with pytest.raises(UserError, match="no document 0 .*: it has none"):
        excerpts(Path(found.prefix), None, count=1, at=0)
