"""Documents to token files."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megaslm.data.sources import Document, SourceFile
from megaslm.data.token_file import TokenFileWriter
from megaslm.data.tokenizer import Tokenizer
from megaslm.errors import UserError

# Encoding takes about 120 bytes per token while it lasts: some 100 MB for a batch, and enough work for every core.
BATCH_CHARACTERS = 1 << 21
BATCH_DOCUMENTS = 1 << 13


@dataclass
class BuildProgress:
    """What has been written so far; `text_bytes` is UTF-8, without end-of-document tokens."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    mapped_characters: int = 0


def build_token_file(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    prefix: str | os.PathLike,
    append_eod: bool = True,
    sources: Sequence[SourceFile] = (),
    options: dict | None = None,
    progress: Callable[[BuildProgress], None] | None = None,
) -> dict:
    """Encode `documents` in order into PREFIX.bin, PREFIX.idx and PREFIX.json; return the manifest.

    Each document is one sequence, with the tokenizer's end-of-document token behind it if it has one and `append_eod`
    is set. `sources` and `options` are recorded in the manifest; `progress` is called after every batch (about 2M
    characters). Memory is bounded by the batch and the longest document. UserError if there are no documents, the
    disk is full, or a character is refused; an older PREFIX is then left as it was.
    """
    eod_id = tokenizer.eod_id if append_eod else None
    done = BuildProgress()
    with TokenFileWriter(prefix, tokenizer.vocab_size, tokenizer.fingerprint) as writer:
        for batch in _batches(documents):
            texts = [document.text for document in batch]
            encoded = tokenizer.encode_batch(texts, batch)
            if eod_id is not None:
                encoded = [np.append(ids, np.int32(eod_id)) for ids in encoded]
            writer.extend(encoded)
            done.documents, done.tokens = writer.num_documents, writer.num_tokens
            done.text_bytes += sum(len(text.encode()) for text in texts)
            done.mapped_characters += sum(map(tokenizer.count_unknown, texts))
            if progress:
                progress(done)
        if not writer.num_tokens:
            raise UserError(f"there are no documents to write to {writer.prefix}: the input holds no text")
        return writer.finish(
            text_bytes=done.text_bytes,
            mapped_characters=done.mapped_characters,
            sources=[{"name": file.name, "bytes": file.size} for file in sources],
            options={"eod_id": eod_id, **(options or {})},
        )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
