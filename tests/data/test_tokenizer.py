import json

import huggingface_hub
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megaslm.data import ascii_tokenizer, character_tokenizer, load_tokenizer, tokenizer, train_bpe
from megaslm.data.tokenizer import END_OF_TEXT, PAD
from megaslm.errors import UserError

TEXTS = ["Hello  there ,  I'm here .\n\n\tAnd\r\nyou?", "naïve café 漢字 🦊", " 1234567 ", "", "a", "\x00\x7f\ufeff"]
PHRASES = ["New York", "York City", "New York City", "Zürich", "naïve", "naïveté", "naïve Bayes", "漢字", "don't stop"]


@pytest.fixture(scope="module")
def auto_tokenizer():
    return pytest.importorskip("transformers").AutoTokenizer


def assert_same_in_transformers(auto_tokenizer, folder, tokenizer, texts, same_text=True):
    other = auto_tokenizer.from_pretrained(str(folder))
    for text in texts:
        ids = tokenizer.encode(text).tolist()
        assert other(text, add_special_tokens=False)["input_ids"] == ids
        assert other.decode(ids) == tokenizer.decode(ids)
        if same_text:
            assert other.decode(ids) == text
    return other


def test_bpe_in_transformers(auto_tokenizer, bpe, tmp_path, sample_text):
    bpe.save(tmp_path)
    other = assert_same_in_transformers(auto_tokenizer, tmp_path, bpe, [*TEXTS, sample_text])
    assert other.eos_token_id == bpe.eod_id == 0
    assert len(other) == bpe.vocab_size == 300
    assert json.loads((tmp_path / "vocab.json").read_text()) == other.get_vocab()


def test_phrases_kept_whole_in_transformers(auto_tokenizer, tmp_path, sample_text):
    kept = train_bpe([sample_text], 290, PHRASES)
    kept.save(tmp_path)
    texts = [*TEXTS, *PHRASES, "xNew York Cityx", "in Zürich, naïvetés, naïve Bayesian", "New Yor k"]
    assert_same_in_transformers(auto_tokenizer, tmp_path, kept, texts)
    for phrase in PHRASES:
        assert kept.encode(phrase).size == 1 == kept.encode(f"({phrase})").size - 2
    assert kept.encode("New York City").tolist() == [kept.vocab_size - len(PHRASES) + 2]  # longest match


def test_nothing_is_learned_from_inside_a_phrase():
    text = "zqzq zqzq zqzq the the the "
    assert train_bpe([text] * 50, 270).encode("zqzq").size == 1
    kept = train_bpe([text] * 50, 270, ["zqzq"])
    assert kept.encode("zqzq").size == 1
    assert kept.encode("zq").size == 2


def test_char_in_transformers(auto_tokenizer, tmp_path):
    text = "O, what a peal!\nIs it 'thee'?"
    tokenizer = character_tokenizer([text, "more"])
    assert tokenizer.vocab_size == len(set(text) | set("more"))
    assert tokenizer.encode("".join(sorted(set(text + "more")))).tolist() == list(range(tokenizer.vocab_size))
    assert tokenizer.eod_id is None and tokenizer.pad_id is None
    tokenizer.save(tmp_path)
    other = assert_same_in_transformers(auto_tokenizer, tmp_path, tokenizer, [text, "it  is\n\n", ""])
    assert len(other) == tokenizer.vocab_size
    assert_same_in_transformers(auto_tokenizer, tmp_path, tokenizer, TEXTS, same_text=False)  # unknown -> space


def test_ascii_in_transformers(auto_tokenizer, tmp_path):
    tokenizer = ascii_tokenizer()
    printable = "".join(map(chr, range(32, 127)))
    assert tokenizer.encode(printable).tolist() == list(range(1, 96))
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eod_id) == (96, 0, None)
    assert tokenizer.decode(tokenizer.encode("tab\tnewline\né")) == "tab newline  "
    assert tokenizer.count_unknown("tab\tnewline\né") == 3
    assert tokenizer.decode([0, 34, 0]) == "A" and tokenizer.decode([0, 34], skip_special=False) == PAD + "A"
    tokenizer.save(tmp_path)
    other = assert_same_in_transformers(auto_tokenizer, tmp_path, tokenizer, TEXTS, same_text=False)
    assert other.pad_token_id == 0


@pytest.mark.parametrize("make", [ascii_tokenizer, lambda unknown: character_tokenizer(["abc def\n"], unknown)])
def test_refused_characters_are_named(make, tmp_path):
    make("refuse").save(tmp_path)
    with pytest.raises(UserError, match=r"notes.txt:7: character 'é' \(U\+00E9\) at line 1, column 4"):
        load_tokenizer(tmp_path).encode_batch(["abc", "abcé"], ["a", "notes.txt:7"])
    with pytest.raises(UserError, match="nonsense"):
        make("nonsense")


def test_special_tokens_in_a_text_are_text(bpe):
    ids = bpe.encode(f"a{END_OF_TEXT}b")
    assert bpe.eod_id not in ids and bpe.decode(ids) == f"a{END_OF_TEXT}b"
    ids = ascii_tokenizer().encode(PAD)
    assert ids.size == len(PAD) and 0 not in ids


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text="  \r\n \x85 \u2028x")
def test_every_text_comes_back(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.token_bytes[ids].sum() == len(text.encode())


def test_token_bytes(sample_text):
    for made in (
        train_bpe([sample_text], 290, PHRASES),
        character_tokenizer([sample_text, *PHRASES]),
    ):
        for text in [sample_text, " ".join(PHRASES)]:
            assert made.token_bytes[made.encode(text)].sum() == len(text.encode())
        assert made.token_bytes.dtype == np.int32 and made.token_bytes.shape == (made.vocab_size,)
        ids = made.encode(sample_text)
        extended = np.array([*ids, -100, made.vocab_size, 60_000])
        assert made.count_bytes(ids) == made.count_bytes(extended) == len(sample_text.encode())
    assert ascii_tokenizer().count_bytes(np.array([[5, 0], [95, 96]], np.uint16)) == 2
    assert ascii_tokenizer().token_bytes.tolist() == [0] + [1] * 95


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["\n", "\n\n", " ", "\t", "\r\n", "a", "bc", ".", "'s", "12", "é", "\x1c", "漢"]))
)
def test_cutting_a_long_text_changes_no_id(bpe, parts):
    text = "".join(parts) * 3
    whole = bpe.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "MAX_PIECE_CHARACTERS", 1)
        patch.setattr(tokenizer, "MAX_BATCH_CHARACTERS", 3)
        assert "".join(bpe.cut(text)) == text
        assert np.array_equal(bpe.encode(text), whole)


def test_long_texts_are_cut(bpe):
    text = "line of text\n" * 30_000
    assert len(bpe.cut(text)) > 4
    assert np.array_equal(bpe.encode(text), bpe._backend.encode(text).ids)


def test_batches_keep_order(bpe, sample_text):
    batch = bpe.encode_batch(TEXTS + [sample_text])
    assert [ids.tolist() for ids in batch] == [bpe.encode(text).tolist() for text in TEXTS + [sample_text]]
    assert all(ids.dtype == np.int32 for ids in batch)


def test_training_is_deterministic(sample_text):
    texts = [sample_text, "other text", sample_text[::-1]]
    first, second = (train_bpe(texts, 320, ["New York"]) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != train_bpe(texts, 321, ["New York"]).fingerprint


def test_fingerprint_survives_saving_and_ignores_the_decoder(bpe, tmp_path):
    bpe.save(tmp_path / "a")
    assert load_tokenizer(tmp_path / "a").fingerprint == bpe.fingerprint
    path = tmp_path / "a" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["decoder"] = None
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    path.write_text(json.dumps(content))
    assert load_tokenizer(tmp_path / "a").fingerprint == bpe.fingerprint
    assert ascii_tokenizer("map").fingerprint == ascii_tokenizer("refuse").fingerprint  # the same ids


@pytest.mark.parametrize(
    ("phrases", "message"),
    [
        ([" "], "blank"),
        (["a\nb"], "line break"),
        ([END_OF_TEXT], "already"),
        (["é"], "a token of this name"),
        (["Ã¼"], "part of the name of the token"),
    ],
)
def test_phrases_that_cannot_be_kept(phrases, message, sample_text):
    with pytest.raises(UserError, match=message):
        train_bpe([sample_text, "für fã fü " * 100], 300, phrases)


def test_training_needs_text_and_room():
    with pytest.raises(UserError, match="take 258"):
        train_bpe(["text"], 257, ["New York"])
    with pytest.raises(UserError, match="no text"):
        train_bpe([], 300)
    with pytest.raises(UserError, match="no text"):
        character_tokenizer([""])


def test_folders_that_are_no_tokenizer(bpe, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    bpe.save(tmp_path)
    for file, content, message in [
        ("tokenizer_config.json", '{"eos_token": "</s>"}', "'</s>' is not in the vocabulary"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer.json", '{"model": {}}', "is not a tokenizer"),
        ("tokenizer.json", '{"model": ', "not valid JSON"),
        ("tokenizer.json", "[]", "not a JSON object"),
    ]:
        (tmp_path / file).write_text(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path)
        bpe.save(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_hub_names_without_a_network(monkeypatch):

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"no tokenizer folder org/name here.*\(no network\)"):
        load_tokenizer("org/name")
