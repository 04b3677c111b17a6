"""Many texts to token ids at once: gigatoken where it covers the tokenizer, Hugging Face tokenizers elsewhere.

gigatoken (Rust, https://pypi.org/project/gigatoken) is some thirty times as fast as encode_batch of the tokenizers
library. It is used where it loads the tokenizer; then a sample of the input, and a text with the spelling of every
added token, are encoded by both, and a difference is an error: ids never depend on which of them ran.

Character tokenizers have a path of their own, a table look-up.
"""

import importlib.metadata
import json
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from megaslm.data.tokenizer import Tokenizer
from megaslm.errors import UserError
from megaslm.signals import signals_held

ENCODERS = ("auto", "gigatoken", "huggingface")
# From this many tokens per document on, one slice copy per document beats a mask over all tokens.
LONG_DOCUMENT_TOKENS = 128
SHOWN_CHARACTERS = 40


class EncodedBatch(NamedTuple):
    """Ids of several documents back to back.

    ids: [tokens] uint32 or int32; document i is ids[offsets[i] : offsets[i + 1]].
    offsets: [documents + 1] int64.
    mapped: [documents] int64, characters of each that a character tokenizer mapped; None for other tokenizers.
    """

    ids: np.ndarray
    offsets: np.ndarray
    mapped: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """[documents] int64, tokens of each document."""
        return np.diff(self.offsets)

    def select(self, keep: np.ndarray) -> "EncodedBatch":
        """The documents for which the mask `keep` [documents] is set."""
        lengths = self.lengths
        return EncodedBatch(
            self.ids[np.repeat(keep, lengths)],
            _offsets(lengths[keep]),
            None if self.mapped is None else self.mapped[keep],
        )

    def with_end(self, eod_id: int | None, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Ids in the stored width with `eod_id` behind each document, and the documents' lengths [documents] int64."""
        lengths = self.lengths
        if eod_id is None:
            return self.ids.astype(dtype), lengths
        ids, offsets, count = self.ids, self.offsets, len(lengths)
        stored = np.empty(len(ids) + count, dtype)
        ends = offsets[1:] + np.arange(count)
        if len(ids) >= LONG_DOCUMENT_TOKENS * count:
            start = 0
            for i, end in enumerate(ends.tolist()):
                stored[start:end] = ids[start - i : end - i]
                start = end + 1
        else:
            is_text = np.ones(len(stored), bool)
            is_text[ends] = False
            stored[is_text] = ids
        stored[ends] = eod_id
        return stored, lengths + 1


class Encoder(Protocol):
    """Texts to ids; nothing is added to them. A text holds no lone surrogates."""

    name: str

    def encode(self, texts: list[str], wheres: Sequence[object] | None = None) -> EncodedBatch:
        """Ids of every text, in order. UserError, with its entry of `wheres`, for a text that is refused."""


class GigatokenEncoder:
    """gigatoken on the tokenizer's tokenizer.json, without the special tokens: text of documents is always text."""

    name = "gigatoken"

    def __init__(self, tokenizer: Tokenizer, parallel: bool = True):
        """UserError with the library's reason where it is not installed or does not load the tokenizer.

        parallel: on all cores (RAYON_NUM_THREADS limits them); else on the calling thread.
        """
        # With the first batch it imports NumPy and awkward, where an interrupt would be lost or come as a panic.
        with signals_held():
            try:
                import gigatoken
            except ImportError as error:
                raise UserError(f"gigatoken cannot be imported ({error}): pip install gigatoken") from None
            content = tokenizer.json
            added = [token for token in content.get("added_tokens") or [] if not token["special"]]
            try:
                self._backend = gigatoken.Tokenizer.from_json(json.dumps({**content, "added_tokens": added}))
                self._backend.encode_batch(["a"], parallel=False)
            except BaseException as error:  # a panic in Rust is no Exception
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise UserError(f"gigatoken does not load the tokenizer {tokenizer.name}: {reason[0]}") from None
        self._parallel = parallel

    def encode(self, texts: list[str], wheres: Sequence[object] | None = None) -> EncodedBatch:
        layout = self._backend.encode_batch(texts, parallel=self._parallel).layout
        return EncodedBatch(np.asarray(layout.content.data), np.asarray(layout.offsets.data))


class HuggingFaceEncoder:
    """`Tokenizer.encode_batch`, on all cores (RAYON_NUM_THREADS limits them)."""

    name = "huggingface"

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def encode(self, texts: list[str], wheres: Sequence[object] | None = None) -> EncodedBatch:
        return _concatenated(self._tokenizer.encode_batch(texts, wheres))


class CharacterEncoder:
    """One table look-up per character; counts the characters that are mapped."""

    name = "characters"

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def encode(self, texts: list[str], wheres: Sequence[object] | None = None) -> EncodedBatch:
        encoded = [
            self._tokenizer.encode_characters(text, wheres[i] if wheres else "the text") for i, text in enumerate(texts)
        ]
        mapped = np.array([unknown for _, unknown in encoded], np.int64)
        return _concatenated([ids for ids, _ in encoded])._replace(mapped=mapped)


class ChosenEncoder(NamedTuple):
    """An encoder, and why it is not gigatoken where that was not asked for (None otherwise)."""

    encoder: Encoder
    reason: str | None

    @property
    def version(self) -> str | None:
        """Version of the library that encodes; None where it is our own table."""
        packages = {"gigatoken": "gigatoken", "huggingface": "tokenizers"}
        package = packages.get(self.encoder.name)
        return package and importlib.metadata.version(package)

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        return f"{self.encoder.name}{version}" + (f" ({self.reason})" if self.reason else "")


def make_encoder(name: str, tokenizer: Tokenizer, parallel: bool = True) -> Encoder:
    """The encoder of this name, as `choose_encoder` chose it; nothing is proven."""
    if name == "gigatoken":
        return GigatokenEncoder(tokenizer, parallel)
    return {"huggingface": HuggingFaceEncoder, "characters": CharacterEncoder}[name](tokenizer)


def choose_encoder(
    tokenizer: Tokenizer,
    wanted: str = "auto",
    sample: Sequence[tuple[str, object]] = (),
    differences: str = "refuse",
) -> ChosenEncoder:
    """Choose the encoder and, if it is gigatoken, prove on a sample that its ids are those of Hugging Face tokenizers.

    wanted: "auto" is gigatoken where it loads the tokenizer, else huggingface with the reason; or the one to use.
    sample: texts of the input with what names them in an error. A text that spells every added token is always added.

    differences: what becomes of ids of the sample that differ: "refuse", a UserError, or "fall_back" to huggingface,
        with the reason.

    UserError also for a `wanted` that does not go with the tokenizer.
    """
    if wanted not in ENCODERS:
        raise UserError(f"encoder {wanted!r} is none of {', '.join(ENCODERS)}")
    if tokenizer.is_character:
        if wanted != "auto":
            raise UserError(
                f"the tokenizer {tokenizer.name} has characters for tokens and an encoder of its own; leave --encoder "
                f"{wanted} out"
            )
        return ChosenEncoder(CharacterEncoder(tokenizer), None)
    if wanted == "huggingface":
        return ChosenEncoder(HuggingFaceEncoder(tokenizer), None)
    try:
        encoder = GigatokenEncoder(tokenizer)
    except UserError as error:
        if wanted == "gigatoken":
            raise UserError(f"{error}; use --encoder huggingface") from None
        return ChosenEncoder(HuggingFaceEncoder(tokenizer), str(error))
    found = difference(encoder, tokenizer, sample)
    if found and differences == "refuse":
        raise UserError(f"{found}; use --encoder huggingface")
    return ChosenEncoder(HuggingFaceEncoder(tokenizer) if found else encoder, found)


def difference(encoder: Encoder, tokenizer: Tokenizer, sample: Sequence[tuple[str, object]]) -> str | None:
    """Where `encoder` gives a text of the sample, or the spelling of an added token, other ids; None: nowhere."""
    spellings = [token["content"] for token in tokenizer.json.get("added_tokens") or []]
    spelled = " ".join(f"{spelling}a {spelling}\n{spelling}{spelling}" for spelling in spellings)
    texts = [spelled, *(text for text, _ in sample)]
    wheres = ["a text that spells the tokenizer's added tokens", *(where for _, where in sample)]
    found = encoder.encode(texts)
    for i, expected in enumerate(tokenizer.encode_batch(texts)):
        ids = found.ids[found.offsets[i] : found.offsets[i + 1]]
        if np.array_equal(ids, expected):
            continue
        common = min(len(ids), len(expected))
        differing = np.flatnonzero(ids[:common] != expected[:common])
        at = int(differing[0]) if differing.size else common
        before = tokenizer.decode(expected[:at], skip_special=False)[-SHOWN_CHARACTERS:]
        ours, theirs = (list(map(int, part[at : at + 3])) or "nothing" for part in (ids, expected))
        return (
            f"{encoder.name} and Hugging Face tokenizers differ on {wheres[i]}: token {at}, behind {before!r}, is "
            f"{ours} in one and {theirs} in the other"
        )
    return None


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _concatenated(documents: list[np.ndarray]) -> EncodedBatch:
    ids = np.concatenate(documents) if documents else np.empty(0, np.int32)
    return EncodedBatch(ids, _offsets(np.array([len(document) for document in documents], np.int64)))
