"""Documents to token files, and the tokenizer that stands beside them."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaslm.data.sources import Document, SourceFile
from megaslm.data.token_file import TOKENIZER_SUFFIX, TokenFile, TokenFileWriter, file_paths, read_manifest
from megaslm.data.tokenizer import Tokenizer, load_tokenizer
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
    tokenizer_dir: str | os.PathLike | None = None,
) -> dict:
    """Encode `documents` in order into PREFIX.bin, PREFIX.idx and PREFIX.json; return the manifest.

    Each document is one sequence, with the tokenizer's end-of-document token behind it if it has one and `append_eod`
    is set. `sources` and `options` are recorded in the manifest; `progress` is called after every batch (about 2M
    characters). Memory is bounded by the batch and the longest document.

    The tokenizer is copied to PREFIX.tokenizer/, unless `tokenizer_dir`, a folder below PREFIX's own, holds it already.
    The manifest has the folder's path from there, so that `find_tokenizer` finds it where all are moved together.

    UserError if there are no documents, the disk is full, a character is refused, or PREFIX.tokenizer/ is another
    tokenizer that did not come with PREFIX; an older PREFIX is then left as it was.
    """
    eod_id = tokenizer.eod_id if append_eod else None
    done = BuildProgress()
    folder = Path(tokenizer_dir or f"{os.fspath(prefix)}{TOKENIZER_SUFFIX}")
    recorded = folder.relative_to(Path(prefix).parent).as_posix()
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(
            TokenFileWriter(prefix, tokenizer.vocab_size, tokenizer.fingerprint, tokenizer_folder=recorded)
        )
        put_in_place = None if tokenizer_dir else stack.enter_context(_copy_tokenizer(tokenizer, folder, prefix))
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
        manifest = writer.finish(
            text_bytes=done.text_bytes,
            mapped_characters=done.mapped_characters,
            sources=[{"name": file.name, "bytes": file.size} for file in sources],
            options={"eod_id": eod_id, **(options or {})},
        )
        if put_in_place:
            put_in_place()
    return manifest


@contextlib.contextmanager
def _copy_tokenizer(tokenizer: Tokenizer, folder: Path, prefix: str | os.PathLike) -> Iterator[Callable[[], None]]:
    """Save the tokenizer under a hidden name beside `folder` and give the function that puts it there.

    Without that call nothing is left behind. UserError if `folder` has something else that did not come with PREFIX.
    """
    if _holds(folder, tokenizer):
        yield lambda: None
        return
    manifest = read_manifest(file_paths(prefix)[2])
    if folder.exists() and (manifest is None or manifest["tokenizer"].get("folder") != folder.name):
        raise UserError(
            f"{folder} exists and is not the tokenizer {tokenizer.name}, whose copy goes there: it would be "
            "overwritten; move it away, or choose another output PREFIX"
        )
    new, old = (folder.with_name(f".{folder.name}.{state}-{secrets.token_hex(4)}") for state in ("new", "old"))

    def put_in_place() -> None:
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except OSError as error:
            raise UserError(f"cannot put the copy of the tokenizer at {folder}: {error.strerror or error}") from error

    try:
        tokenizer.save(new)
        yield put_in_place
    finally:
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True)


def _holds(folder: Path, tokenizer: Tokenizer) -> bool:
    try:
        return folder.is_dir() and load_tokenizer(folder).same_files(tokenizer)
    except UserError:
        return False


def find_tokenizer(prefix: str | os.PathLike) -> str | None:
    """Folder of the tokenizer that wrote PREFIX, as the manifest has it; None if it names none, or that is gone.

    UserError if another tokenizer lies there, or none that opens, and for every fault of the token file.
    """
    file = TokenFile(prefix)
    folder = file.tokenizer_folder
    if folder is None or not folder.is_dir():
        return None
    found = load_tokenizer(folder).fingerprint
    if found != file.tokenizer_fingerprint:
        raise UserError(
            f"{folder} (fingerprint {found}) is not the tokenizer that {file.prefix} was built with (fingerprint "
            f"{file.tokenizer_fingerprint}): put that one back, or name it with tokenizer.path"
        )
    return str(folder)


def vocab_size_of(prefix: str | os.PathLike) -> int | None:
    """Vocabulary size of the tokenizer that wrote PREFIX, which need not be there; None without a manifest."""
    return TokenFile(prefix).vocab_size


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
