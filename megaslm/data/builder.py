"""Documents to token files, and the tokenizer that stands beside them."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megaslm.data.encoder import Encoder, choose_encoder, make_encoder
from megaslm.data.sources import Document, SourceFile
from megaslm.data.token_file import TOKENIZER_SUFFIX, TokenFile, file_paths, read_manifest
from megaslm.data.token_writer import TokenFileWriter, commit, disk_errors
from megaslm.data.tokenizer import Tokenizer, load_tokenizer
from megaslm.data.work import BuildProgress
from megaslm.errors import UserError

# Encoding takes about 120 bytes per token while it lasts: some 100 MB for a batch, and enough work for every core.
BATCH_CHARACTERS = 1 << 21
BATCH_DOCUMENTS = 1 << 13
SAMPLE_TEXTS = 16
SAMPLE_CHARACTERS = 1 << 14


def build_token_file(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    prefix: str | os.PathLike,
    append_eod: bool = True,
    sources: Sequence[SourceFile] = (),
    options: dict | None = None,
    progress: Callable[[BuildProgress], None] | None = None,
    tokenizer_dir: str | os.PathLike | None = None,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> dict:
    """Encode `documents` in order into PREFIX.bin, PREFIX.idx and PREFIX.json; return the manifest.

    Each document is one sequence, with the tokenizer's end-of-document token behind it if it has one and `append_eod`
    is set. `sources` and `options` are recorded in the manifest; `progress` is called after every batch (about 2M
    characters), `report` with a line if huggingface encodes because gigatoken does not cover the tokenizer. Memory is
    bounded by the batch and the longest document.

    For inputs of any size there is `preprocess`, which is parallel and goes on where it was stopped.

    The tokenizer is copied to PREFIX.tokenizer/, unless `tokenizer_dir`, a folder below PREFIX's own, holds it already.
    The manifest has the folder's path from there, so that `find_tokenizer` finds it where all are moved together.

    UserError if PREFIX exists and `overwrite` is not set, there are no documents, the disk is full, a character is
    refused, or PREFIX.tokenizer/ is another tokenizer that did not come with PREFIX; an older PREFIX is then left as it
    was.
    """
    eod_id = tokenizer.eod_id if append_eod else None
    done = BuildProgress()
    encoder: Encoder | None = None
    folder = Path(tokenizer_dir or f"{os.fspath(prefix)}{TOKENIZER_SUFFIX}")
    recorded = folder.relative_to(Path(prefix).parent).as_posix()
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(
            TokenFileWriter(
                prefix, tokenizer.vocab_size, tokenizer.fingerprint, tokenizer_folder=recorded, overwrite=overwrite
            )
        )
        put_tokenizer = None if tokenizer_dir else stack.enter_context(copy_tokenizer(tokenizer, folder, prefix))
        for batch in _batches(documents):
            texts = [document.text for document in batch]
            encoder = encoder or _encoder_for(tokenizer, batch, report)
            encoded = encoder.encode(texts, batch)
            writer.extend_flat(*encoded.with_end(eod_id, writer.dtype))
            done.documents, done.tokens = writer.num_documents, writer.num_tokens
            done.text_bytes += sum(len(text.encode()) for text in texts)
            done.mapped_characters += 0 if encoded.mapped is None else int(encoded.mapped.sum())
            if progress:
                progress(done)
        if not writer.num_tokens:
            raise UserError(f"there are no documents to write to {writer.prefix}: the input holds no text")
        file = writer.prepare(
            text_bytes=done.text_bytes,
            mapped_characters=done.mapped_characters,
            sources=[{"name": file.name, "bytes": file.size} for file in sources],
            options={"eod_id": eod_id, **(options or {})},
            encoder={"name": encoder.name},
        )
        if put_tokenizer:
            put_tokenizer()
        commit([file])
    return file.manifest


def _encoder_for(tokenizer: Tokenizer, first: Sequence[Document], report: Callable[[str], None]) -> Encoder:
    """The fastest that covers the tokenizer; for no more than one batch it is not worth its import and its proof."""
    if tokenizer.is_character:
        return make_encoder("characters", tokenizer)
    if not _is_full(len(first), sum(len(document.text) for document in first)):
        return make_encoder("huggingface", tokenizer)
    sample = [(document.text[:SAMPLE_CHARACTERS], document) for document in first[:: len(first) // SAMPLE_TEXTS + 1]]
    chosen = choose_encoder(tokenizer, "auto", sample, differences="fall_back")
    if chosen.reason:
        report(f"encoder: {chosen}")
    return chosen.encoder


@contextlib.contextmanager
def copy_tokenizer(tokenizer: Tokenizer, folder: Path, prefix: str | os.PathLike) -> Iterator[Callable[[], None]]:
    """Save the tokenizer under a hidden name beside `folder` and give the function that puts it there.

    That is to be called just before the token file gets its name. If the `with` block ends in an error after it, what
    stood at `folder` is there again; without the call nothing is left behind. The caller holds the lock of the output.
    UserError if `folder` has something else that did not come with PREFIX.
    """
    new, old = (folder.with_name(f".{folder.name}.{state}") for state in ("new", "old"))
    with disk_errors(folder):
        if old.exists() and not folder.exists():  # a build was killed between the two renames below
            old.rename(folder)
    _remove_folders(new, old)
    if _holds(folder, tokenizer):
        yield lambda: None
        return
    check_tokenizer_folder(tokenizer, folder, prefix)
    placed = False

    def put_in_place() -> None:
        nonlocal placed
        with disk_errors(folder):
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        placed = True

    try:
        tokenizer.save(new)
        yield put_in_place
    except BaseException:
        with contextlib.suppress(OSError):
            if placed:
                folder.rename(new)
            if old.exists():
                old.rename(folder)
        _remove_folders(new)
        raise
    _remove_folders(new, old)


def check_tokenizer_folder(tokenizer: Tokenizer, folder: Path, prefix: str | os.PathLike) -> None:
    """UserError if `folder`, where a copy of the tokenizer goes, has something else that did not come with PREFIX."""
    if not folder.exists() or _holds(folder, tokenizer):
        return
    manifest = read_manifest(file_paths(prefix)[2])
    if manifest is None or manifest["tokenizer"].get("folder") != folder.name:
        raise UserError(
            f"{folder} exists and is not the tokenizer {tokenizer.name}, whose copy goes there: it would be "
            "overwritten; move it away, or choose another output PREFIX"
        )


def _remove_folders(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


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
        if _is_full(len(batch), characters):
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _is_full(documents: int, characters: int) -> bool:
    return characters >= BATCH_CHARACTERS or documents >= BATCH_DOCUMENTS
