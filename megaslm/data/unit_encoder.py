"""A unit of the input to the bytes that a build appends: what worker processes do, or this process by itself."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megaslm.data.encoder import EncodedBatch, Encoder
from megaslm.data.sources import LISTED_FAULTS, Fault, Piece, PieceContent, SourceFile, TextSource, Unit
from megaslm.data.tokenizer import Tokenizer
from megaslm.data.work import KEYS, LENGTHS, TEXT_BYTES, TOKENS
from megaslm.errors import UserError

LARGEST_LENGTH = (1 << 31) - 1  # tokens of a document, which the token file counts in an int32


@dataclass(frozen=True)
class UnitRules:
    """What becomes of a document. Bounds are inclusive; None is no bound, and ids have no characters to count.

    columns: which files besides tokens and lengths are written, KEYS and TEXT_BYTES of work.py.
    """

    eod_id: int | None
    dtype: np.dtype
    min_chars: int | None = None
    max_chars: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    columns: tuple[str, ...] = ()


@dataclass
class PieceFacts:
    """What reading a piece told: its records, and those that give no document, by their numbers in the piece.

    num_faults, num_empty: of all of those, of which `faults` has the first, so that those of a unit are
    LISTED_FAULTS at most.
    """

    file: SourceFile
    size: int
    num_records: int
    faults: list[Fault]
    num_faults: int
    num_empty: int


@dataclass
class UnitFacts:
    """Counts of a unit; tokens include the end-of-document tokens, text_bytes do not."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    mapped_characters: int = 0
    largest_id: int = -1
    filtered: int = 0
    listed_faults: int = 0
    pieces: list[PieceFacts] = field(default_factory=list)


@dataclass
class UnitEncoder:
    """Units to columns of bytes and facts; a pure function of the unit and the attributes.

    stop_at_fault: a piece is read up to its first fault, where the caller stops: then nothing else of its unit counts.
    """

    source: TextSource
    tokenizer: Tokenizer
    encoder: Encoder
    rules: UnitRules
    stop_at_fault: bool = False

    def __call__(self, unit: Unit) -> tuple[dict[str, list[np.ndarray]], UnitFacts]:
        """The arrays that go, one after the other, to each file of the work folder, and the facts."""
        facts = UnitFacts()
        columns: dict[str, list[np.ndarray]] = {name: [] for name in (TOKENS, LENGTHS, *self.rules.columns)}
        documents: list = []  # texts, or arrays of ids, of neighbouring pieces: encoding has a price per call
        for piece in unit:
            of_piece = self._read(piece, facts)
            if documents and of_piece and isinstance(documents[0], str) != isinstance(of_piece[0], str):
                self._encode(documents, columns, facts)
                documents = []
            documents.extend(of_piece)
        if documents:
            self._encode(documents, columns, facts)
        return columns, facts

    def _read(self, piece: Piece, facts: UnitFacts) -> list[str] | list[np.ndarray]:
        """The documents of a piece that can be used and pass the bounds on characters."""
        content = self.source.read(piece, self.stop_at_fault)
        found = content.texts or content.arrays
        if refused := self._refused(content):
            found = [document for i, document in enumerate(found) if i not in refused]
        listed = content.faults[: LISTED_FAULTS - facts.listed_faults]
        facts.listed_faults += len(listed)
        facts.pieces.append(
            PieceFacts(piece.file, piece.size, content.num_records, listed, content.num_faults, content.num_empty)
        )
        low, high = self.rules.min_chars, self.rules.max_chars
        if content.texts and not (low is None and high is None):
            kept = [text for text in found if _within(len(text), low, high)]
            facts.filtered += len(found) - len(kept)
            return kept
        return found

    def _refused(self, content: PieceContent) -> set[int]:
        """Places of the documents that cannot be encoded; they become faults of the content."""
        documents, refused = content.texts or content.arrays, set()
        if content.texts and not (self.tokenizer.is_character and self.tokenizer.unknown == "refuse"):
            return refused
        for i, document in enumerate(documents):
            if reason := self._refusal(document):
                content.note_fault(content.numbers[i] if content.numbered else None, reason)
                refused.add(i)
                if self.stop_at_fault:
                    break
        if refused:
            content.faults.sort(key=lambda fault: math.inf if fault.number is None else fault.number)
        return refused

    def _refusal(self, document: str | np.ndarray) -> str | None:
        if isinstance(document, str):
            return self.tokenizer.refusal(document)
        low, high = (int(document.min()), int(document.max())) if document.size else (0, 0)
        if 0 <= low and high < self.tokenizer.vocab_size:
            return None
        return (
            f"token id {low if low < 0 else high} is outside the vocabulary of {self.tokenizer.vocab_size:,} tokens of "
            f"{self.tokenizer.name}; the ids were made with another tokenizer"
        )

    def _encode(self, documents: list, columns: dict[str, list[np.ndarray]], facts: UnitFacts) -> None:
        """Encode texts, or take ids as they are; add them to `columns` and `facts`."""
        rules, is_text = self.rules, isinstance(documents[0], str)
        if is_text:
            batch = self.encoder.encode(documents)
        else:
            documents = self._without_end(documents)
            ids = np.concatenate(documents, dtype=np.int64, casting="unsafe")  # within the vocabulary, see _refusal
            batch = EncodedBatch(ids, np.cumsum([0, *map(len, documents)]))
        if not (rules.min_tokens is None and rules.max_tokens is None):
            keep = _within(batch.lengths, rules.min_tokens, rules.max_tokens)
            documents = [document for document, kept in zip(documents, keep, strict=True) if kept]
            batch = batch.select(keep)
            facts.filtered += len(keep) - len(documents)
        ids, lengths = batch.with_end(rules.eod_id, rules.dtype)
        if lengths.max(initial=0) > LARGEST_LENGTH:
            raise UserError(
                f"a document of {lengths.max():,} tokens does not fit a token file, which counts them in 31 bits: cut "
                "it into several documents"
            )
        count_bytes = _utf8_length if is_text else self.tokenizer.count_bytes
        text_bytes = np.fromiter(map(count_bytes, documents), np.int64, len(documents))
        new = {TOKENS: ids, LENGTHS: lengths.astype("<i4"), TEXT_BYTES: text_bytes.astype("<i8")}
        if KEYS in columns:
            new[KEYS] = _keys(documents)
        for name in columns:
            columns[name].append(new[name])
        facts.documents += len(documents)
        facts.tokens += len(ids)
        facts.text_bytes += int(text_bytes.sum())
        facts.mapped_characters += 0 if batch.mapped is None else int(batch.mapped.sum())
        if len(ids):
            facts.largest_id = max(facts.largest_id, int(batch.ids.max(initial=rules.eod_id or 0)))
        assert facts.largest_id < self.tokenizer.vocab_size, f"{self.encoder.name} gave the id {facts.largest_id}"

    def _without_end(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Ids without the end-of-document token that some may bring: all get it alike."""
        eod_id = self.rules.eod_id
        return [ids[:-1] if eod_id is not None and len(ids) and ids[-1] == eod_id else ids for ids in arrays]


def _within(count, low: int | None, high: int | None):
    """Whether a count, or each of an array of them, lies within the bounds."""
    inside = count >= (0 if low is None else low)
    return inside if high is None else inside & (count <= high)


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _keys(documents: Iterable[str | np.ndarray]) -> np.ndarray:
    """[documents, 2] uint64: BLAKE2b-128 of each text, or of each array's ids as int64."""
    data = (d.encode() if isinstance(d, str) else np.ascontiguousarray(d, "<i8") for d in documents)
    digests = b"".join(hashlib.blake2b(content, digest_size=16).digest() for content in data)
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


EncodedUnit = tuple[Unit, UnitFacts, Iterable[tuple[str, Any]]]  # with pairs of a file of the work folder and bytes


def encode_here(units: Iterable[Unit], encode: UnitEncoder) -> Iterator[EncodedUnit]:
    """Encode one unit after the other in this process."""
    for unit in units:
        columns, facts = encode(unit)
        yield unit, facts, [(name, array) for name, arrays in columns.items() for array in arrays]
