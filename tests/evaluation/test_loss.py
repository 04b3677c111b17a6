"""Losses on tokens and text: against the formula, and against what a run logged of itself."""

import json
import math
import tempfile

import pytest
import torch
import torch.nn.functional as F

from megaslm.data import ValidationData, build_token_file, load_tokenizer, train_bpe
from megaslm.data.sources import TextSource
from megaslm.errors import UserError
from megaslm.evaluation import LossSums, evaluate_text, evaluate_tokens, sum_losses
from megaslm.model import build_model

CONTEXT = 16
TEXTS = ["Zwölf Boxkämpfer jagen", " Viktor quer über den Sylter Deich.", "日本語 and some more of it", "short"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Byte-level, so that tokens of text are bytes of it, with an end-of-document token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(iter(TEXTS * 3), 280).save(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(tokenizer, tiny_config):
    config = tiny_config(tokenizer, CONTEXT, init_std=0.2)
    return build_model(config, seed=2).eval()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def stream(tokenizer, text):
    """The tokens of all documents, each closed by the end-of-document token."""
    return [token for one in TEXTS for token in [*tokenizer.encode(one).tolist(), tokenizer.eod_id]]


@torch.no_grad()
def loss_by_hand(model, stream: list[int], seq_length: int, stride: int) -> float:
    """Each target from the window in which it is new, one window after the other."""
    total, scored = 0.0, 0
    for start in range(0, len(stream), stride):
        window = torch.tensor(stream[start : start + seq_length + 1])
        new = start + len(window) - 1 - scored
        if new <= 0:
            break
        logits = model(window[None, :-1])[0]
        total += F.cross_entropy(logits[-new:].double(), window[-new:], reduction="sum").item()
        scored += new
    assert scored == len(stream) - 1
    return total


@pytest.mark.parametrize(("seq_length", "stride"), [(16, None), (16, 4), (7, 3), (5, 1), (16, 16)])
def test_text_is_what_a_token_file_of_it_would_be(model, tokenizer, text, stream, tmp_path, seq_length, stride):
    found = evaluate_text(model, [text], tokenizer, 3, seq_length, stride=stride)
    assert found.targets == len(stream) - 1
    assert found.losses == pytest.approx(loss_by_hand(model, stream, seq_length, stride or seq_length), rel=1e-5)
    first = len(tokenizer.decode(stream[:1]).encode())
    assert found.num_bytes == sum(len(one.encode()) for one in TEXTS) - first
    assert found.mean.bits_per_byte == pytest.approx(found.losses / math.log(2) / found.num_bytes)
    prefix = str(tmp_path / "tokens")
    build_token_file(iter(TextSource([text])), tokenizer, prefix)
    data = ValidationData([prefix], seq_length, stride=stride)
    tokens = evaluate_tokens(model, data, tokenizer, batch_size=4)
    assert (tokens.targets, tokens.num_bytes) == (found.targets, found.num_bytes)
    assert tokens.losses == pytest.approx(found.losses, rel=1e-6)


def test_masked_documents_do_not_see_each_other(model, tokenizer, text, stream):
    found = evaluate_text(model, [text], tokenizer, 2, CONTEXT, mask_documents=True)
    with torch.no_grad():
        alone, at = 0.0, 0
        for one in TEXTS:
            document = [*tokenizer.encode(one).tolist(), tokenizer.eod_id]
            # The last input of a document has the first token of the next one for its target.
            window = stream[at : at + len(document) + 1]
            for start in range(-(at % CONTEXT) if at % CONTEXT else 0, len(window) - 1, CONTEXT):
                piece = torch.tensor(window[max(start, 0) : start + CONTEXT + 1])
                logits = model(piece[None, :-1])[0]
                alone += F.cross_entropy(logits, piece[1:], reduction="sum").item()
            at += len(document)
    assert found.losses == pytest.approx(alone, rel=1e-5)
    assert found.losses != pytest.approx(evaluate_text(model, [text], tokenizer, 2, CONTEXT).losses, rel=1e-4)


def test_the_first_windows_alone(model, tokenizer, text, stream):
    found = evaluate_text(model, [text], tokenizer, 4, CONTEXT, max_sequences=2)
    assert found.targets == 2 * CONTEXT and found.tokens == 2 * CONTEXT
    assert found.losses == pytest.approx(loss_by_hand(model, stream[: 2 * CONTEXT + 1], CONTEXT, CONTEXT), rel=1e-5)
    assert found.num_bytes == len(tokenizer.decode(stream[1 : 2 * CONTEXT + 1]).encode())


def test_bytes_are_those_of_the_text_where_a_tokenizer_maps_characters(model, tmp_path):
    from megaslm.data import ascii_tokenizer

    path = tmp_path / "a.txt"
    path.write_text("äöü" * 10)  # 30 characters, which become spaces, of 60 bytes
    found = evaluate_text(model, [path], ascii_tokenizer(), 4, CONTEXT)
    assert (found.targets, found.num_bytes) == (29, 58)


def test_nothing_of_a_text_stays_behind(model, tokenizer, text, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    evaluate_text(model, [text], tokenizer, 4, CONTEXT)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"one/a.txt"):
        evaluate_text(model, [tmp_path / "one" / "a.txt"], tokenizer_without_end(tokenizer), 4, CONTEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def tokenizer_without_end(tokenizer):
    copy = load_tokenizer(tokenizer.name)
    copy.eod_id = None
    return copy


def test_sums_of_several_sets():
    one, other = LossSums(10.0, 4, 8, 16, 1.0), LossSums(2.0, 2, 0, 16, 1.0)
    assert (one + one).mean.loss == 2.5 and (one + one).mean.bits_per_byte == pytest.approx(1.25 / math.log(2))
    assert (one + other).mean.loss == 2.0 and (one + other).mean.bits_per_byte is None
    assert (one + other).record()["tokens_per_s"] == 16 and (one + other).record()["bytes"] is None


def test_no_rows_are_computed_for_nothing(tmp_path, tokenizer, text):
    """A batch is never larger than what there is, and alike on all ranks."""
    build_token_file(iter(TextSource([text])), tokenizer, str(tmp_path / "tokens"))
    data = ValidationData([str(tmp_path / "tokens")], CONTEXT)
    assert data.num_windows == 5

    def rows(batch_size: int, rank: int = 0, num_ranks: int = 1, max_sequences: int | None = None) -> list[int]:
        shapes, targets = [], 0

        def loss_sum(tokens, of_batch, _):
            nonlocal targets
            shapes.append(len(tokens))
            targets += (of_batch >= 0).sum()
            return torch.zeros(())

        sums = sum_losses(loss_sum, data, None, batch_size, max_sequences, rank, num_ranks)
        assert sums[1] == targets
        seen.append(targets)
        return shapes

    seen = []
    assert rows(8) == [5] and rows(8, max_sequences=2) == [2] and rows(2) == [2, 2, 2]
    seen = []
    assert rows(8, 0, 2) == rows(8, 1, 2) == [3] and sum(seen) == data.num_targets


def test_what_does_not_fit_the_model(model, tokenizer, text):
    with pytest.raises(UserError, match="longer than the model's context of 16"):
        evaluate_text(model, [text], tokenizer, 4, CONTEXT + 1)
    with pytest.raises(UserError, match="stride 17: give 1 to 16"):
        evaluate_text(model, [text], tokenizer, 4, CONTEXT, stride=17)
