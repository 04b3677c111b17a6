"""Make tokenizers: byte-level BPE trained on text, the characters of a text, and pad + printable ASCII.

Byte-level BPE: Radford et al. 2019 (GPT-2), with the pre-tokenizer of Llama 3. Ids: 0 is `<|endoftext|>`, then the 256
bytes, then merges in the order they were learned, then the phrases kept whole. Training is deterministic.

Character tokenizers are BPE models without merges, so that transformers opens them like any other.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from megaslm.data.tokenizer import (
    END_OF_TEXT,
    PAD,
    SETTINGS_FILE,
    SETTINGS_VERSION,
    SPLIT_PATTERN,
    Tokenizer,
    _dump,
    cut_text,
    tokenizer_config,
)
from megaslm.errors import UserError

NUM_BYTES = 256
ASCII_SYMBOLS = [PAD, *map(chr, range(32, 127))]  # 96 symbols
UNKNOWN_POLICIES = ("map", "refuse")


def train_bpe(texts: Iterable[str], vocab_size: int, keep_whole: Sequence[str] = ()) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` tokens, `<|endoftext|>` and the phrases of `keep_whole` included.

    A phrase of `keep_whole` is one token wherever it stands, also inside words: no merge is learned from its inside,
    and encoding matches it first (the longest where several do). A text too short for that many merges gives fewer
    tokens.
    UserError for a vocabulary too small for the bytes and phrases, for phrases that cannot be kept, and for no text.
    """
    phrases = _check_phrases(keep_whole)
    smallest = 1 + NUM_BYTES + len(phrases)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} is too small: {END_OF_TEXT}, the {NUM_BYTES} bytes and {len(phrases)} phrases to "
            f"keep whole take {smallest}"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(phrases),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # every byte is a token, seen or not
        show_progress=False,
    )
    seen = False

    def pieces() -> Iterator[str]:
        nonlocal seen
        # Longest first: an alternation takes the first branch that matches, the encoder the longest.
        split = re.compile("|".join(map(re.escape, sorted(phrases, key=len, reverse=True)))) if phrases else None
        for text in texts:
            seen = seen or bool(text)
            for part in split.split(text) if split else [text]:
                yield from cut_text(part)

    backend.train_from_iterator(pieces(), trainer)
    if not seen:
        raise UserError("there is no text to train a tokenizer on")
    _keep_whole(backend, phrases)
    return _finish(backend, "bpe", tokenizer_config(eod=END_OF_TEXT), "map")


def _check_phrases(phrases: Sequence[str]) -> list[str]:
    for phrase in phrases:
        if not phrase.strip() or "\n" in phrase or "\r" in phrase:
            raise UserError(f"phrase {phrase!r} cannot be kept whole: it is blank or holds a line break")
        if phrase == END_OF_TEXT:
            raise UserError(f"phrase {phrase!r} cannot be kept whole: it is the end-of-document token already")
    return list(dict.fromkeys(phrases))


def _keep_whole(backend: Backend, phrases: list[str]) -> None:
    """Add `phrases` as tokens, and a decoder that spells them right."""
    vocab = backend.get_vocab()
    for phrase in phrases:
        # The vocabulary spells tokens with one character per byte: raw "é" is the name of byte E9, "Ġthe" of " the".
        if phrase in vocab:
            raise UserError(f"phrase {phrase!r} cannot be kept whole: a token of this name exists; remove it")
    backend.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in phrases])
    respelled = _respelled(phrases)
    backend.decoder = decoders.ByteLevel()
    if respelled:
        backend.decoder = decoders.Sequence([*(decoders.Replace(*pair) for pair in respelled), decoders.ByteLevel()])
    for phrase, _ in respelled:
        if clash := min((token for token in vocab if phrase in token), default=None):
            raise UserError(f"phrase {phrase!r} cannot be kept whole: it is part of the name of the token {clash!r}")
    for phrase in phrases:
        index = backend.token_to_id(phrase)
        if backend.decode([index]) != phrase or backend.encode(phrase).ids != [index]:
            raise UserError(f"phrase {phrase!r} cannot be kept whole: it does not decode to itself; remove it")


def _respelled(phrases: list[str]) -> list[tuple[str, str]]:
    """Phrases that must be spelled byte by byte before the byte-level decoder sees them, with that spelling.

    That decoder takes a token whose characters all happen to be names of bytes for bytes: the "ü" of "Zürich" would
    come out as FC, which is no UTF-8. Phrases that contain such a phrase follow, and longer ones come first, since the
    replacement works on parts of a token.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelling = {phrase: "".join(token for token, _ in byte_level.pre_tokenize_str(phrase)) for phrase in phrases}
    mistaken = [phrase for phrase in phrases if alphabet.issuperset(phrase) and spelling[phrase] != phrase]
    affected = [phrase for phrase in phrases if any(part in phrase for part in mistaken)]
    return [(phrase, spelling[phrase]) for phrase in sorted(affected, key=len, reverse=True)]


def character_tokenizer(texts: Iterable[str], unknown: str = "map") -> Tokenizer:
    """The tokenizer over exactly the characters of `texts`, ids in code point order, no further tokens (as in nanoGPT).

    `unknown`: what becomes of other characters later: "map" (to the space; to the line break or the first character
    where there is no space) or "refuse" (UserError).
    """
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    if not seen:
        raise UserError("there is no text to take the characters of a tokenizer from")
    characters = sorted(seen)
    substitute = next((c for c in " \n" if c in seen), characters[0])
    return _finish(_characters(characters, substitute), "char", tokenizer_config(), unknown)


def ascii_tokenizer(unknown: str = "map") -> Tokenizer:
    """96 symbols: 0 is the padding, 1-95 are ASCII 32-126; `unknown`: other characters become a space, or UserError."""
    backend = _characters(ASCII_SYMBOLS, " ")
    backend.add_special_tokens([AddedToken(PAD, special=True, normalized=False)])
    return _finish(backend, "ascii", tokenizer_config(pad=PAD), unknown)


def _characters(symbols: list[str], substitute: str) -> Backend:
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token=substitute))
    backend.decoder = decoders.Fuse()
    return backend


def _finish(backend: Backend, kind: str, config: dict, unknown: str) -> Tokenizer:
    if unknown not in UNKNOWN_POLICIES:
        raise UserError(f"unknown = {unknown!r}: a character tokenizer knows {' and '.join(UNKNOWN_POLICIES)}")
    vocab = backend.get_vocab(with_added_tokens=True)
    files = {
        "tokenizer.json": backend.to_str(pretty=True),
        "tokenizer_config.json": _dump(config),
        "vocab.json": _dump(dict(sorted(vocab.items(), key=lambda item: item[1]))),
        SETTINGS_FILE: _dump({"version": SETTINGS_VERSION, "type": kind, "unknown": unknown}),
    }
    return Tokenizer(files, kind)
