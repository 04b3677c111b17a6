"""A stream of documents as the assembly reads it, without a tokenizer."""

import hashlib
from pathlib import Path

import numpy as np

from megaslm.data.work import KEYS, LENGTHS, TEXT_BYTES, TOKENS, TokenStream

EOD = 9
TOKENIZER = {"fingerprint": "f00d", "vocab_size": 1000, "folder": "corpus.tokenizer"}


def key_of(document: list[int]) -> bytes:
    """Of its ids, as if they were its text."""
    return hashlib.blake2b(str(document).encode(), digest_size=16).digest()


def write_stream(folder: Path, documents: list[list[int]]) -> TokenStream:
    """Each document is its ids and the end-of-document token, and has three bytes of text for each."""
    folder.mkdir(parents=True, exist_ok=True)
    ended = [[*document, EOD] for document in documents]
    np.array(sum(ended, []), np.uint16).tofile(folder / TOKENS)
    lengths = np.array([len(document) for document in ended], np.int64)
    lengths.astype(np.int32).tofile(folder / LENGTHS)
    (3 * lengths).tofile(folder / TEXT_BYTES)
    (folder / KEYS).write_bytes(b"".join(map(key_of, documents)))
    return TokenStream(folder / TOKENS, np.dtype(np.uint16), int(lengths.sum()), len(documents), sha256="")
