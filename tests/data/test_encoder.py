import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from megaslm.data import ascii_tokenizer, choose_encoder, encoder, load_tokenizer, train_bpe
from megaslm.data.encoder import EncodedBatch, GigatokenEncoder, HuggingFaceEncoder, difference
from megaslm.data.tokenizer import END_OF_TEXT
from megaslm.errors import UserError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def split(batch):
    return [ids.tolist() for ids in np.split(batch.ids, batch.offsets[1:-1])]


@pytest.fixture(scope="module")
def gigatoken(bpe):
    return GigatokenEncoder(bpe)


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_gigatoken_gives_the_ids_of_hugging_face(bpe, gigatoken, texts):
    expected = [bpe.encode(text).tolist() for text in texts]
    assert split(gigatoken.encode(texts)) == expected == split(HuggingFaceEncoder(bpe).encode(texts))


@pytest.mark.parametrize("name", ["bible_bsb", "manpages_roff", "tldr"])
def test_gigatoken_on_real_corpora(bpe, gigatoken, name):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("the shared corpora are not here")
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()[::97]][:60]
    assert split(gigatoken.encode(texts)) == [ids.tolist() for ids in bpe.encode_batch(texts)]


def test_special_tokens_in_a_text_are_text_and_phrases_are_kept(sample_text):
    tokenizer = train_bpe([sample_text], 290, ["New York", "New York City"])
    chosen = choose_encoder(tokenizer, "gigatoken")
    ids = chosen.encoder.encode([f"a{END_OF_TEXT}b", "xNew York City"])
    assert tokenizer.eod_id not in ids.ids and tokenizer.decode(ids.ids[: ids.offsets[1]]) == f"a{END_OF_TEXT}b"
    assert ids.offsets[2] - ids.offsets[1] == 2
    assert str(chosen) == f"gigatoken {importlib.metadata.version('gigatoken')}"


def test_a_wrong_encoder_is_found(bpe, monkeypatch):
    import gigatoken as library

    untouched = GigatokenEncoder(bpe)
    untouched._backend = library.Tokenizer.from_json(
        json.dumps(bpe.json)
    )  # special tokens written in a text are its own
    found = difference(untouched, bpe, [])
    assert found.startswith("gigatoken and Hugging Face tokenizers differ on a text that spells the tokenizer's added")

    right = GigatokenEncoder.encode

    def wrong(self, texts, wheres=None):
        batch = right(self, [text.replace("é", "e") for text in texts])
        return batch

    monkeypatch.setattr(GigatokenEncoder, "encode", wrong)
    sample = [("plain", "a document of a.txt"), ("the naïve café", "a document of x.jsonl:7")]
    with pytest.raises(
        UserError, match=r"x.jsonl:7: token \d+, behind 'the naïve caf', is .* use --encoder huggingface"
    ):
        choose_encoder(bpe, "auto", sample)
    chosen = choose_encoder(bpe, "auto", sample, differences="fall_back")
    assert chosen.encoder.name == "huggingface" and "(gigatoken and Hugging Face tokenizers differ on" in str(chosen)
    assert choose_encoder(bpe, "huggingface", sample).encoder.name == "huggingface"


def test_where_gigatoken_does_not_load_the_tokenizer(tmp_path):
    backend = Backend(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    chosen = choose_encoder(tokenizer)
    assert chosen.encoder.name == "huggingface" and "gigatoken does not load the tokenizer" in str(chosen)
    assert split(chosen.encoder.encode(["the cat", "the dog"])) == [[1, 2], [1, 0]]
    with pytest.raises(UserError, match="gigatoken does not load .*; use --encoder huggingface"):
        choose_encoder(tokenizer, "gigatoken")


def test_characters_have_an_encoder_of_their_own():
    chosen = choose_encoder(ascii_tokenizer())
    batch = chosen.encoder.encode(["naïve", "é\n", "abc"])
    assert chosen.encoder.name == "characters" == str(chosen) and batch.mapped.tolist() == [1, 2, 0]
    assert batch.select(np.array([True, False, True])).mapped.tolist() == [1, 0]
    with pytest.raises(UserError, match="x:2: character 'é'"):
        choose_encoder(ascii_tokenizer("refuse")).encoder.encode(["a", "é"], ["x:1", "x:2"])
    with pytest.raises(UserError, match="leave --encoder gigatoken out"):
        choose_encoder(ascii_tokenizer(), "gigatoken")
    with pytest.raises(UserError, match="'fast' is none of auto, gigatoken, huggingface"):
        choose_encoder(ascii_tokenizer(), "fast")


@pytest.mark.parametrize("long_document_tokens", [0, 3, 1000])
@settings(max_examples=30, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 40_000), max_size=6), max_size=8),
    eod_id=st.sampled_from([None, 0, 7]),
    data=st.data(),
)
def test_ends_of_documents(long_document_tokens, documents, eod_id, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "LONG_DOCUMENT_TOKENS", long_document_tokens)
        ids = np.array([i for document in documents for i in document], np.uint32)
        batch = EncodedBatch(ids, np.cumsum([0, *map(len, documents)]))
        keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(documents), max_size=len(documents))), bool)
        kept = [document for document, kept in zip(documents, keep, strict=True) if kept]
        for chosen, part in ((batch, documents), (batch.select(keep), kept)):
            stored, lengths = chosen.with_end(eod_id, np.dtype(np.uint16))
            expected = [document + ([] if eod_id is None else [eod_id]) for document in part]
            assert stored.dtype == np.uint16 and stored.tolist() == [i for document in expected for i in document]
            assert lengths.tolist() == list(map(len, expected))
