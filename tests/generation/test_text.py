"""Text as it comes: nothing that is shown has to be taken back, and in the end all of it is there."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from megaslm.data import Tokenizer, character_tokenizer
from megaslm.generation.text import TextStream

CHARACTERS = "ab é€中\U0001f600\ufffd"


def byte_level() -> Tokenizer:
    """Every byte is a token, and a few pieces have two of them, some ending within a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = {text: pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)[0][0] for text in "é中€"}
    merges = [(spelled["é"][0], spelled["é"][1]), (spelled["中"][0], spelled["中"][1])]
    merges += [(spelled["中"][2], spelled["€"][0])]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Backend(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer({"tokenizer.json": backend.to_str()}, "byte level")


def byte_fallback() -> Tokenizer:
    """As SentencePiece's: characters, and the bytes of those that it does not know; a space begins a text."""
    vocab = {"<unk>": 0, **{f"<0x{i:02X}>": i + 1 for i in range(256)}, "\u2581": 257, "a": 258, "b": 259}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace = decoders.Replace("\u2581", " ")
    backend.decoder = decoders.Sequence(
        [metaspace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    return Tokenizer({"tokenizer.json": backend.to_str()}, "byte fallback")


TOKENIZERS = {
    "byte level": byte_level(),
    "byte fallback": byte_fallback(),
    "characters": character_tokenizer([CHARACTERS]),
}
texts = st.text(CHARACTERS, max_size=20)


def pieces(tokenizer, prompt, tokens, stop=()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, prompt, stop)
    shown = []
    for token in tokens:
        shown.append(stream.feed(token))
        if stream.stopped:
            break
    return [*shown, stream.finish()], stream


@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(prompt=texts, text=texts)
def test_the_pieces_are_the_text_and_no_piece_has_half_a_character(tokenizer, prompt, text):
    prompt_ids, ids = tokenizer.encode("b" + prompt).tolist(), tokenizer.encode("b" + text).tolist()
    ids = ids[len(tokenizer.encode("b")) :]
    shown, _ = pieces(tokenizer, prompt_ids, ids)
    assert "".join(shown) == text
    assert all("".join(shown[:n]) == text[: len("".join(shown[:n]))] for n in range(len(shown)))


@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(text=texts, stop=st.lists(st.text(CHARACTERS, min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string_and_none_of_it_is_shown(tokenizer, text, stop):
    ids = tokenizer.encode("b" + text).tolist()[len(tokenizer.encode("b")) :]
    shown, stream = pieces(tokenizer, tokenizer.encode("b").tolist(), ids, stop)
    # The text as it grows: the first stop string that it contains is the one that ends it.
    grown = next((text[:n] for n in range(len(text) + 1) if any(one in text[:n] for one in stop)), None)
    ends = [text] if grown is None else [grown[: grown.index(one)] for one in stop if one in grown]
    assert "".join(shown) == min(ends, key=len) and stream.stopped == (grown is not None)


@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(text=texts, stop=st.lists(st.text(CHARACTERS, min_size=1, max_size=4), max_size=2))
def test_no_more_is_held_back_than_half_a_character_and_the_beginning_of_a_stop_string(tokenizer, text, stop):
    prompt = tokenizer.encode("b").tolist()
    ids = tokenizer.encode("b" + text).tolist()[len(prompt) :]
    shown, stream = pieces(tokenizer, prompt, ids, stop)
    longest = max(map(len, stop), default=1)
    for n in range(1, len(shown) - stream.stopped):
        spelled = tokenizer.decode(prompt + ids[:n]).rstrip("\ufffd")
        assert len("".join(shown[:n])) >= len(spelled) - len("b") - (longest - 1)


@pytest.mark.parametrize("tokenizer", list(TOKENIZERS.values())[:2], ids=list(TOKENIZERS)[:2])
def test_bytes_that_are_no_text_are_shown_in_the_end(tokenizer):
    one = tokenizer.encode("b€").tolist()[-3]  # the first byte of three
    shown, _ = pieces(tokenizer, tokenizer.encode("b").tolist(), [one] * 100)
    assert "".join(shown) == "\ufffd" * 100 and "".join(shown[:60])


@pytest.mark.parametrize("text", ["\U0001f600b", "\U0001f600中€b", "\U0001f600\ufffdb"])
@pytest.mark.parametrize("tokenizer", list(TOKENIZERS.values())[:2], ids=list(TOKENIZERS)[:2])
def test_a_prompt_that_ends_in_half_a_character_is_gone_on_with(tokenizer, text):
    ids, start = tokenizer.encode("b" + text).tolist(), len(tokenizer.encode("b"))
    shown, _ = pieces(tokenizer, ids[: start + 2], ids[start + 2 :])
    assert "".join(shown) == text


def test_half_a_character_in_the_end_takes_none_from_what_stands_before_it():
    """The decoder makes U+FFFD of all bytes of the run."""
    tokenizer, a = TOKENIZERS["byte fallback"], 258
    ids = tokenizer.encode("中中中中中").tolist()[1:]  # without the space that begins a text
    assert len(ids) == 15 and "中" not in tokenizer.decode(ids[:-1])
    for start in range(0, 14, 3):
        shown, _ = pieces(tokenizer, ids[:start], ids[start:-1])
        assert "".join(shown) == "中" * (4 - start // 3) + 2 * "\ufffd"
    for length in range(3, 15, 3):  # of a long run, the context begins with a whole character
        shown, _ = pieces(tokenizer, [a, *40 * ids[-3:], *ids[:length]], [*ids[length:], a])
        assert "".join(shown) == "中" * (5 - length // 3) + "a"


@pytest.mark.parametrize("count", [1, 2, 9, 100])
def test_special_tokens_within_a_text_take_no_space_from_it(count):
    tokenizer = TOKENIZERS["byte fallback"]
    space, a, b, special = 257, 258, 259, 260
    assert tokenizer.decode([a, special, space, b], skip_special=False) == "a</s> b"
    for prompt, ids in (([a], [*[special] * count, space, b]), ([a, *[special] * min(count, 7)], [space, b])):
        shown, _ = pieces(tokenizer, prompt, ids)
        assert "".join(shown) == (" b" if count < 50 or not ids.count(special) else "b")
    shown, _ = pieces(tokenizer, [], [space, space, a])  # what is no special token but looks like nothing
    assert "".join(shown) == tokenizer.decode([space, space, a]) == " a"


def test_long_texts_cost_as_much_per_token_as_short_ones():
    """A text of which all tokens are decoded for each would take minutes here."""
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("ab " * 10_000).tolist()
    shown, _ = pieces(tokenizer, [], ids, stop=["中"])
    assert "".join(shown) == "ab " * 10_000
