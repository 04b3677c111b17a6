"""What a model is evaluated on: whose tokens they are, how much of a text is read, and what stays behind."""

import json
import os
import shutil
import tempfile

import pytest

from megaslm.checkpoint import Piece, open_model, write_checkpoint
from megaslm.data import (
    Assembly,
    BuildOptions,
    TextSource,
    ascii_tokenizer,
    build_token_file,
    load_tokenizer,
    prepare_corpus,
    preprocess,
)
from megaslm.errors import UserError
from megaslm.evaluation import Windows, open_sets, own_validation
from megaslm.evaluation.sets import tokenize_text
from megaslm.model import build_model

CONTEXT = 32
TRAIN = {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 1}


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return load_tokenizer(corpus.tokenizer)


@pytest.fixture(scope="module")
def save(tokenizer, tiny_config):
    """A checkpoint of a tiny model that was trained with the corpus's tokenizer."""
    config = tiny_config(tokenizer, CONTEXT)
    model = build_model(config, seed=1).eval()
    weights = [Piece.whole(name, value.detach()) for name, value in model.named_parameters()]

    def make(folder, carried=None, trained_with=tokenizer, data=None, state=None):
        run_config = {"name": "tiny", "model": config.model_dump(mode="json")}
        return write_checkpoint(
            folder,
            {"weights": weights},
            step=1,
            optimizer=None,
            run_config={**run_config, "data": data, "train": TRAIN, "optimizer": {"lr": 0.01}} if data else run_config,
            global_state={"identity": {"tokenizer": trained_with and trained_with.fingerprint}, **(state or {})},
            tokenizer_files=carried and carried.files,
        )

    return make


@pytest.fixture(scope="module")
def foreign(corpus, tmp_path_factory) -> str:
    """Token files of the same text, of a tokenizer that has as few tokens."""
    from megaslm.data import character_tokenizer

    prefix = str(tmp_path_factory.mktemp("foreign") / "tokens")
    other = character_tokenizer(["zyxw"], unknown="map")
    build_token_file(iter(TextSource([corpus.text])), other, prefix)
    return prefix


@pytest.mark.parametrize("carried", [True, False])
def test_tokens_of_another_tokenizer(save, corpus, tokenizer, foreign, tmp_path, carried):
    source = open_model(save(tmp_path, carried=tokenizer if carried else None))
    assert (source.tokenizer is None) == (not carried)
    open_sets(source, [corpus.prefix], [], Windows(CONTEXT))
    with pytest.raises(UserError, match=f"{foreign} was tokenized with another tokenizer"):
        open_sets(source, [foreign], [], Windows(CONTEXT))


def test_names_of_sets(save, corpus, tokenizer, tmp_path):
    source = open_model(save(tmp_path, carried=tokenizer))
    for data, text in (([corpus.prefix] * 2, []), ([corpus.prefix], [corpus.prefix])):
        with pytest.raises(UserError, match=f"is given twice: {corpus.prefix}"):
            open_sets(source, data, text, Windows(CONTEXT))
    with pytest.raises(UserError, match="name of a set .* is empty"):
        open_sets(source, [], [""], Windows(CONTEXT))
    with pytest.raises(UserError, match="has no tokenizer, which text needs"):
        open_sets(open_model(save(tmp_path / "bare")), [], [str(corpus.text)], Windows(CONTEXT))


def test_no_more_of_a_text_is_read_than_the_windows_take(tokenizer, tmp_path, monkeypatch):
    """What lies behind is not even looked at; the tokens are those of the whole text."""
    monkeypatch.setattr("megaslm.data.builder.BATCH_DOCUMENTS", 4)
    monkeypatch.setattr("megaslm.data.sources.source.UNIT_BYTES", 600)
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": "the cat sees a dog."}) + "\n"] * 200
    path.write_text("".join(lines))
    windows = Windows(8, stride=4, max_sequences=10)
    whole = tokenize_text("x", [path], tokenizer, 99, Windows(8, stride=4))
    path.write_text("".join([*lines, "this is no record\n"]))
    found = tokenize_text("x", [path], tokenizer, 99, windows)
    assert found.data.num_targets >= 9 * 4 + 8  # all targets of ten windows
    assert found.data.num_targets < whole.data.num_targets / 4
    for mine, theirs in zip(found.data.batch(0, 10)[:2], whole.data.batch(0, 10)[:2], strict=True):
        assert (mine == theirs).all()
    with pytest.raises(UserError, match="text.jsonl:201: broken JSON") as error:
        tokenize_text("x", [path], tokenizer, 99, Windows(8))
    assert "on_error" not in str(error.value) and "same command" not in str(error.value)


def test_the_files_of_a_text_have_no_names(tokenizer, corpus, tmp_path, monkeypatch):
    """Gone before the first forward pass: nothing that ends the process can leave them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = tokenize_text("x", [corpus.text], tokenizer, 99, Windows(CONTEXT))
    assert os.listdir(tmp_path) == []
    tokens, targets, _ = found.data.batch(0, found.data.num_windows)
    assert (targets >= 0).sum() == found.data.num_targets


def test_windows_of_packed_files_do_not_overlap(save, corpus, tokenizer, tmp_path):
    from megaslm.data import train_bpe

    words = train_bpe(["the cat sees a dog. one bird runs."], 16 + 270)
    words.save(tmp_path / "words")
    prefix = str(tmp_path / "packed")
    preprocess(TextSource([corpus.text]), words, prefix, BuildOptions(assembly=Assembly(pack=CONTEXT)), workers=0)
    source = open_model(save(tmp_path / "c", trained_with=None))
    source = type(source)(**{**vars(source), "config": source.config.model_copy(update={"vocab_size": 999})})
    with pytest.raises(UserError, match="stride 8: .*packed is packed"):
        open_sets(source, [prefix], [], Windows(CONTEXT, stride=8))
    (one,) = open_sets(source, [prefix], [], Windows(CONTEXT, stride=CONTEXT))
    assert one.data.num_windows > 1


def test_a_runs_own_data_is_never_built(save, corpus, tokenizer, tmp_path, monkeypatch):
    build_dir = tmp_path / "data"
    input_file = shutil.copy(corpus.text, tmp_path / "text.jsonl")
    built = prepare_corpus([input_file], build_dir, "tiny", tokenizer_path=corpus.tokenizer)
    data = {"input": [str(input_file)], "build_dir": str(build_dir)}
    state = {"data": {"datasets": [{"prefix": built.train_prefix}]}}
    path = save(tmp_path / "run", carried=tokenizer, data=data, state=state)
    (one,) = own_validation(open_model(path), 3)
    assert one.data.parts[0].prefix == built.validation_prefix and one.max_sequences == 3
    # The input is another by now: the corpus is still what the run was evaluated on.
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "quite another text"}) + "\n")
    assert own_validation(open_model(path))[0].data.num_targets == one.data.num_targets
    # A corpus of another tokenizer in its place.
    other = open_model(save(tmp_path / "other", carried=None, trained_with=ascii_tokenizer(), data=data, state=state))
    with pytest.raises(UserError, match="validation data of the run cannot be read .*another tokenizer"):
        own_validation(other)
    build_dir.rename(tmp_path / "moved")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match="validation data of the run .*does not exist.*give --data PREFIX or --text"):
        own_validation(open_model(path))
    assert sorted(os.listdir(tmp_path)) == before
    nowhere = save(tmp_path / "nowhere", carried=tokenizer, data=data)
    with pytest.raises(UserError, match="does not say where it was built"):
        own_validation(open_model(nowhere))
    with pytest.raises(UserError, match="says nothing of data"):
        own_validation(open_model(save(tmp_path / "none", carried=tokenizer)))
