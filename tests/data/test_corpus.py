from pathlib import Path

import pytest

from megaslm.data import TextSource, TokenFile, find_tokenizer, load_tokenizer, prepare_corpus, verify
from megaslm.errors import UserError

SHAKESPEARE = Path(__file__).resolve().parents[3] / "shared" / "data" / "tinyshakespeare.txt"


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"note {i}: some words about the number {i * i}\n" * 3)
    return folder


def decoded(prefix, tokenizer_dir):
    file, tokenizer = verify(prefix), load_tokenizer(tokenizer_dir)
    return [tokenizer.decode(file.document(i)) for i in range(file.num_documents)]


def test_documents_are_held_out(notes, tmp_path):
    lines = []
    options = dict(vocab_size=280, validation_fraction=0.1, report=lines.append)
    corpus = prepare_corpus([notes], tmp_path / "data", "run", **options)
    train, validation = (decoded(p, corpus.tokenizer_dir) for p in (corpus.train_prefix, corpus.validation_prefix))
    assert train + validation == [document.text for document in TextSource([notes])]
    assert len(validation) == 4
    assert load_tokenizer(corpus.tokenizer_dir).vocab_size == 280
    assert TokenFile(corpus.train_prefix, load_tokenizer(corpus.tokenizer_dir).fingerprint).manifest
    for prefix in (corpus.train_prefix, corpus.validation_prefix):
        assert find_tokenizer(prefix) == corpus.tokenizer_dir
    assert any(line.startswith("train: 36 documents") for line in lines)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [Path(corpus.tokenizer_dir).parent.name]


def test_the_same_call_builds_once(notes, tmp_path):
    lines = []

    def prepare(**options):
        return prepare_corpus([notes], tmp_path / "data", "run", tokenizer_type="char", report=lines.append, **options)

    first = prepare()
    assert lines and not lines.clear()
    assert prepare() == first and not lines
    assert prepare(validation_fraction=0.5) != first
    (notes / "0.txt").write_text("changed")
    assert prepare() != first


def test_a_damaged_corpus_is_built_again(notes, tmp_path):
    lines = []

    def prepare():
        return prepare_corpus([notes], tmp_path / "data", "run", tokenizer_type="ascii", report=lines.append)

    corpus = prepare()
    path = Path(f"{corpus.train_prefix}.bin")
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    lines.clear()
    assert prepare() == corpus
    assert "damaged" in lines[0] and "train.bin" in lines[0]
    assert path.read_bytes() == content
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_a_failed_build_leaves_nothing(notes, tmp_path):
    (notes / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="bad.txt"):
        prepare_corpus([notes], tmp_path / "data", "run", vocab_size=280)
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("fraction", [0.1, 0.9, 0.3, 0.02])
def test_characters_are_held_out(tmp_path, fraction):
    (tmp_path / "a.txt").write_text("0123456789" * 100)
    corpus = prepare_corpus(
        [tmp_path / "a.txt"],
        tmp_path / "data",
        "run",
        tokenizer_type="char",
        validation_fraction=fraction,
        validation_unit="character",
    )
    assert TokenFile(corpus.train_prefix).num_tokens == round(1000 * (1 - fraction))
    assert TokenFile(corpus.validation_prefix).num_tokens == round(1000 * fraction)


def test_an_existing_tokenizer_is_used(notes, tmp_path, bpe):
    bpe.save(tmp_path / "tokenizer")
    corpus = prepare_corpus([notes], tmp_path / "data", "run", tokenizer_path=str(tmp_path / "tokenizer"))
    assert load_tokenizer(corpus.tokenizer_dir).fingerprint == bpe.fingerprint


def test_one_document_cannot_be_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("one long text")
    with pytest.raises(UserError, match="validation_unit to character"):
        prepare_corpus([tmp_path / "a.txt"], tmp_path / "data", "run", tokenizer_type="char")
    with pytest.raises(UserError, match="between 0 and 1"):
        prepare_corpus([tmp_path / "a.txt"], tmp_path / "data", "run", validation_fraction=1.0)


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tinyshakespeare.txt is not here")
def test_tinyshakespeare_as_in_nanogpt(tmp_path):
    corpus = prepare_corpus(
        [SHAKESPEARE], tmp_path, "ts", tokenizer_type="char", validation_fraction=0.1, validation_unit="character"
    )
    assert load_tokenizer(corpus.tokenizer_dir).vocab_size == 65
    assert TokenFile(corpus.train_prefix).num_tokens == 1_003_854
    assert TokenFile(corpus.validation_prefix).num_tokens == 111_540
    assert "".join(decoded(corpus.train_prefix, corpus.tokenizer_dir))[:14] == "First Citizen:"
