"""Raw text to everything a run needs, in one call: a tokenizer, training tokens and validation tokens.

A corpus is built once, into a folder named after the run and a hash of what went into it (files with size and time,
options, CORPUS_VERSION); the same call finds it again. It is built under a hidden name and renamed when it is complete,
so a folder that is visible is whole, also when several processes build it at the same time.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

from megaslm.data.builder import build_token_file
from megaslm.data.sources import Document, TextSource
from megaslm.data.token_file import TokenFile
from megaslm.data.tokenizer import Tokenizer, load_tokenizer
from megaslm.data.tokenizer_training import ascii_tokenizer, character_tokenizer, train_bpe
from megaslm.errors import UserError

CORPUS_VERSION = 1
DEFAULT_VOCAB_SIZE = 32_000
VALIDATION_UNITS = ("document", "character")


@dataclass(frozen=True)
class PreparedCorpus:
    """Where a corpus lies: two token file PREFIXes and the folder of their tokenizer."""

    train_prefix: str
    validation_prefix: str
    tokenizer_dir: str

    @classmethod
    def in_folder(cls, folder: Path) -> "PreparedCorpus":
        return cls(str(folder / "train"), str(folder / "validation"), str(folder / "tokenizer"))


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus is made of its input; the fields of the run config's data and tokenizer sections."""

    text_key: str = "text"
    tokenizer_path: str | None = None
    tokenizer_type: str = "bpe"
    vocab_size: int | None = None
    unknown: str = "map"
    validation_fraction: float = 0.02
    validation_unit: str = "document"

    def __post_init__(self):
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction {self.validation_fraction} must lie between 0 and 1")
        if self.validation_unit not in VALIDATION_UNITS:
            raise UserError(f"validation_unit {self.validation_unit!r} is none of {', '.join(VALIDATION_UNITS)}")
        if self.tokenizer_type not in ("bpe", "char", "ascii"):
            raise UserError(f"tokenizer type {self.tokenizer_type!r} is none of bpe, char, ascii")


def prepare_corpus(
    inputs: Sequence[str | os.PathLike],
    build_dir: str | os.PathLike,
    name: str,
    *,
    text_key: str = "text",
    tokenizer_path: str | None = None,
    tokenizer_type: str = "bpe",
    vocab_size: int | None = None,
    unknown: str = "map",
    validation_fraction: float = 0.02,
    validation_unit: str = "document",
    report: Callable[[str], None] = lambda line: None,
) -> PreparedCorpus:
    """Tokenize `inputs` into BUILD_DIR/NAME-HASH/{train,validation}.{bin,idx,json} and tokenizer/, or find them there.

    Without `tokenizer_path` a tokenizer is made: "bpe" is trained on the training part (`vocab_size` None: 32,000
    tokens), "char" has the characters of the whole input, "ascii" is pad + ASCII 32-126.

    validation_unit "document" holds out the last documents in the source's order (see sources.py), "character" the last
    part of every document: of n characters those from int(n * (1 - validation_fraction)) on, as nanoGPT does.

    `report` is called with lines of progress. UserError for every fault of the input, and where the input has too few
    documents or characters for two parts.
    """
    options = CorpusOptions(
        text_key, tokenizer_path, tokenizer_type, vocab_size, unknown, validation_fraction, validation_unit
    )
    source = TextSource(inputs, text_key)
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else None
    folder = Path(build_dir) / f"{name}-{_identity(source, options, tokenizer)}"
    if folder.is_dir():
        try:
            return _open(folder)
        except UserError as fault:
            report(f"{folder} is damaged and is built again: {fault}")
    temp = folder.with_name(f".{folder.name}.building-{secrets.token_hex(4)}")
    report(f"building {folder} from {len(source.files):,} files, {source.num_bytes / 1e6:,.1f} MB")
    if source.num_other_files:
        report(f"left out {source.num_other_files:,} files in folders: of other endings, or read already")
    if source.num_empty_files:
        report(f"left out {source.num_empty_files:,} files without a byte")
    try:
        try:
            temp.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"cannot create {temp}: {error.strerror}; choose another build_dir") from error
        _build(source, options, tokenizer, temp, report)
        return _put_in_place(temp, folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _identity(source: TextSource, options: CorpusOptions, tokenizer: Tokenizer | None) -> str:
    """Hash of everything the corpus depends on."""
    content = {
        "version": CORPUS_VERSION,
        "files": [(file.location, file.name, file.size, file.mtime_ns) for file in source.files],
        "options": vars(options) | {"tokenizer_path": tokenizer.fingerprint if tokenizer else None},
        "eod_id": tokenizer.eod_id if tokenizer else None,
    }
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=6).hexdigest()


def _open(folder: Path) -> PreparedCorpus:
    """The corpus in `folder`; UserError if a file of it is missing or has the wrong size."""
    corpus = PreparedCorpus.in_folder(folder)
    fingerprint = load_tokenizer(corpus.tokenizer_dir).fingerprint
    for prefix in (corpus.train_prefix, corpus.validation_prefix):
        if TokenFile(prefix, fingerprint).manifest is None:
            raise UserError(f"{prefix}.json is missing")
    return corpus


def _put_in_place(temp: Path, folder: Path) -> PreparedCorpus:
    try:
        temp.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise UserError(f"cannot rename {temp} to {folder}: {error.strerror}") from error
        try:
            return _open(folder)  # another process was faster
        except UserError:
            damaged = temp.with_name(temp.name + ".damaged")
            folder.rename(damaged)
            temp.rename(folder)
            shutil.rmtree(damaged, ignore_errors=True)
    return _open(folder)


def _build(source: TextSource, options: CorpusOptions, tokenizer: Tokenizer | None, folder: Path, report) -> None:
    """Write tokenizer and token files into `folder`."""
    corpus = PreparedCorpus.in_folder(folder)
    train, validation = _split(source, options)
    if tokenizer is None:
        tokenizer = _make_tokenizer(source, train, options, report)
    tokenizer.save(corpus.tokenizer_dir)
    for part, prefix, documents in (
        ("train", corpus.train_prefix, train),
        ("validation", corpus.validation_prefix, validation),
    ):
        start = time.perf_counter()
        manifest = build_token_file(
            documents(),
            tokenizer,
            prefix,
            sources=source.files,
            options={**vars(options), "part": part},
            tokenizer_dir=corpus.tokenizer_dir,
            report=report,
        )
        report(f"{part}: {describe(manifest, time.perf_counter() - start)}")
    if source.num_empty:
        report(f"skipped {source.num_empty:,} empty documents")


def describe(manifest: dict, seconds: float | None = None) -> str:
    """One line about a token file, and its speed if it took `seconds` to build; MB are 10^6 bytes of UTF-8 text."""
    text_bytes, tokens = manifest["text_bytes"], manifest["tokens"]
    line = f"{manifest['documents']:,} documents, {tokens:,} tokens, {text_bytes / tokens:.2f} bytes/token"
    if seconds is not None:
        line += f", {text_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s"
    if packing := manifest.get("packing"):
        line += f", {packing['bins']:,} bins of {packing['length']:,} tokens, {packing['padding'] / tokens:.2%} padding"
    if mapped := manifest["mapped_characters"]:
        line += f", {mapped:,} unknown characters mapped"
    return line


def _make_tokenizer(source: TextSource, train: Callable[[], Iterator[Document]], options: CorpusOptions, report):
    if options.tokenizer_type == "char":
        tokenizer = character_tokenizer((document.text for document in source), options.unknown)
    elif options.tokenizer_type == "ascii":
        tokenizer = ascii_tokenizer(options.unknown)
    else:
        start = time.perf_counter()
        tokenizer = train_bpe((document.text for document in train()), options.vocab_size or DEFAULT_VOCAB_SIZE)
        report(f"trained a byte-level BPE in {time.perf_counter() - start:.1f} s")
    report(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens")
    return tokenizer


def _split(source: TextSource, options: CorpusOptions):
    """Two functions, each of which reads one part of the documents from the start."""
    if options.validation_unit == "character":
        return _split_characters(source, options.validation_fraction)
    total = sum(1 for _ in source)
    if total < 2:
        raise UserError(
            f"the input has {total} document, and validation_unit document needs one on each side: set "
            "data.validation_unit to character to hold out the last part of each document, or give more documents"
        )
    held_out = min(max(1, round(total * options.validation_fraction)), total - 1)
    return lambda: islice(source, total - held_out), lambda: islice(source, total - held_out, None)


def _split_characters(source: TextSource, fraction: float):
    # Through the decimal that was written: 1 - 0.9 as floats is a hair under 0.1, and int() would lose a character.
    train_share = 1 - Fraction(str(fraction))

    def part(first: bool) -> Iterator[Document]:
        for document in source:
            cut = int(len(document.text) * train_share)
            text = document.text[:cut] if first else document.text[cut:]
            if text:
                yield document._replace(text=text)

    return lambda: part(True), lambda: part(False)
