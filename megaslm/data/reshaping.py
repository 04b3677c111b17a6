"""Several token files into one, and one into several. Tokens are copied, never encoded again."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megaslm.data.assembly import split_prefixes
from megaslm.data.builder import copy_tokenizer, find_tokenizer
from megaslm.data.packing import PaddingCount
from megaslm.data.token_file import (
    TOKENIZER_SUFFIX,
    TokenFile,
    check_sha256,
    read_chunks,
    verify_index,
)
from megaslm.data.token_range import split_bounds
from megaslm.data.token_writer import TokenFileWriter, check_prefix, commit
from megaslm.data.tokenizer import Tokenizer, load_tokenizer
from megaslm.errors import UserError

# What a manifest says about the build as a whole: it goes along with every part, and with every file of a merge.
BUILD_FACTS = ("encoder", "assembly", "filtered", "skipped", "merged")


def merge_token_files(
    inputs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict:
    """Write the documents of `inputs`, one after another, to the token file `output`; return its manifest.

    Documents keep their boundaries; where the inputs' widths differ, the wider is written. The tokenizer's copy goes to
    OUTPUT.tokenizer. The manifest names a tokenizer only if all of the inputs' manifests do. Memory does not grow with
    the files. `progress` is called with the number of tokens that were just copied.

    UserError for inputs that were made with different tokenizers, or packed differently, or are damaged, and for an
    output that is there already, unless `overwrite` is set.
    """
    files = [TokenFile(prefix) for prefix in inputs]
    _check_no_input([output], files)
    _check_tokenizers(files)
    packing = _merge_packing(files)
    known = all(file.tokenizer_fingerprint for file in files)
    for file in files:
        verify_index(file)
    facts = _merge_facts(files) | ({"packing": packing} if packing else {})
    tokenizer = _find_tokenizer(files) if known else None
    folder = _tokenizer_folder(output)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(
            TokenFileWriter(
                output,
                files[0].vocab_size if known else None,
                files[0].tokenizer_fingerprint if known else None,
                folder.name if tokenizer else None,
                dtype=np.result_type(*(file.dtype for file in files)),
                boundaries=True,
                overwrite=overwrite,
            )
        )
        put_tokenizer = stack.enter_context(_tokenizer_copy(tokenizer, folder, output))
        for file in files:
            copy = _DocumentCopy(file, progress)
            copy.documents(writer, 0, file.num_documents)
            copy.check_whole()
        prepared = writer.prepare(**facts)
        put_tokenizer()
        commit([prepared])
    return prepared.manifest


def split_token_file(
    prefix: str | os.PathLike,
    output: str | os.PathLike,
    split: str,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, dict]:
    """Write contiguous parts of a token file to OUTPUT_train, OUTPUT_validation and OUTPUT_test.

    `split` has two or three shares, such as "90,5,5", of the documents (of a packed file: of the bins), with bounds at
    int(round(share * documents)) as in Megatron. All parts are on the disk before the first gets its final name.
    `progress` is called with the number of tokens that were just copied. Returns the manifest of each output by its
    PREFIX.

    UserError if a part has no documents, or the file is damaged, and for an output that is there already, unless
    `overwrite` is set.
    """
    outputs = split_prefixes(check_prefix(output), split)
    file = TokenFile(prefix)
    _check_no_input(outputs.values(), [file])
    bounds = split_bounds(split, file.num_documents)
    for number, part in enumerate(outputs):
        if bounds[number] == bounds[number + 1]:
            raise UserError(
                f"the {part} part of split {split} is empty: {file.prefix} has {file.num_documents:,} documents; "
                "give it a larger share"
            )
    verify_index(file)
    tokenizer = _find_tokenizer([file])
    folder = _tokenizer_folder(output)
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                TokenFileWriter(
                    target,
                    file.vocab_size,
                    file.tokenizer_fingerprint,
                    folder.name if tokenizer else None,
                    dtype=file.dtype,
                    boundaries=True,
                    overwrite=overwrite,
                )
            )
            for target in outputs.values()
        ]
        put_tokenizer = stack.enter_context(_tokenizer_copy(tokenizer, folder, outputs["train"]))
        copy, facts_of, text_bytes = _DocumentCopy(file, progress, tokenizer), [], []
        for number, part in enumerate(outputs):
            first, last = bounds[number : number + 2]
            facts = _take(file, ("sources", "options", *BUILD_FACTS))
            facts["split"] = {"of": _name(file), "shares": split, "part": part, "first_document": first}
            padding = PaddingCount(file.packing["length"], file.packing["eod_id"]) if file.packing else None
            text_bytes.append(copy.documents(writers[number], first, last, padding))
            if padding:
                same = {key: file.packing[key] for key in ("length", "eod_id")}
                facts["packing"] = {**same, "bins": last - first, "padding": padding.padding}
            facts_of.append(facts)
        copy.check_whole()
        # Where the tokens do not tell their text's bytes exactly, no part says how many it has.
        if file.manifest and sum(text_bytes) == file.manifest.get("text_bytes"):
            for facts, size in zip(facts_of, text_bytes, strict=True):
                facts["text_bytes"] = size
        prepared = [writer.prepare(**facts) for writer, facts in zip(writers, facts_of, strict=True)]
        put_tokenizer()
        commit(prepared)
    return {target: one.manifest for target, one in zip(outputs.values(), prepared, strict=True)}


class _DocumentCopy:
    """Documents of one token file, whose index is verified, from the first to the last, to others."""

    def __init__(self, file: TokenFile, progress: Callable[[int], None], tokenizer: Tokenizer | None = None):
        self.file, self.progress, self.tokenizer = file, progress, tokenizer
        self._sha256 = hashlib.sha256()

    def documents(self, writer: TokenFileWriter, first: int, last: int, padding: PaddingCount | None = None) -> int:
        """Append documents [first, last), with their sequences, to `writer`; `padding` counts along.

        Returns how many bytes of text the tokenizer counts in them; 0 without one.
        """
        file, text_bytes = self.file, 0
        sequences = [int(file.document_boundaries[document]) for document in (first, last)]
        for lengths in file.read_index("lengths", *sequences):
            writer.add_sequences(lengths)
        end = sequences[0]
        for ends in file.read_index("boundaries", first + 1, last + 1):
            writer.add_documents(np.diff(ends, prepend=end))
            end = int(ends[-1])
        for ids in read_chunks(file.bin_path, file.dtype, *(file.token_bound(sequence) for sequence in sequences)):
            self._sha256.update(ids)
            writer.add_tokens(ids)
            if padding:
                padding.add(ids)
            if self.tokenizer:
                text_bytes += self.tokenizer.count_bytes(ids)
            self.progress(len(ids))
        return text_bytes

    def check_whole(self) -> None:
        """After the last document: UserError if the tokens are not those that the manifest describes."""
        if self.file.manifest is not None:
            check_sha256(self.file, self.file.bin_path, "bin_sha256", self._sha256.hexdigest())


def _name(file: TokenFile) -> str:
    return Path(file.prefix).name


def _take(file: TokenFile, keys: Sequence[str]) -> dict:
    """These entries of the manifest, as far as it has them."""
    return {key: file.manifest[key] for key in keys if file.manifest and key in file.manifest}


def _check_no_input(outputs: Sequence[str | os.PathLike], files: Sequence[TokenFile]) -> None:
    inputs = {Path(file.prefix).resolve() for file in files}
    for output in outputs:
        if Path(output).resolve() in inputs:
            raise UserError(f"{os.fspath(output)} is an input and the output: choose another output PREFIX")


def _check_tokenizers(files: Sequence[TokenFile]) -> None:
    known = [file for file in files if file.tokenizer_fingerprint]
    for file in known[1:]:
        if file.tokenizer_fingerprint != known[0].tokenizer_fingerprint:
            raise UserError(
                f"{known[0].prefix} and {file.prefix} were made with different tokenizers (fingerprints "
                f"{known[0].tokenizer_fingerprint} and {file.tokenizer_fingerprint}), so that one id means two texts: "
                "tokenize both with the same"
            )


def _find_tokenizer(files: Sequence[TokenFile]) -> Tokenizer | None:
    """That of `files`, which all have the same, where one of them knows where it lies."""
    found = next((folder for file in files if (folder := find_tokenizer(file.prefix))), None)
    return None if found is None else load_tokenizer(found)


def _tokenizer_folder(prefix: str | os.PathLike) -> Path:
    return Path(f"{os.fspath(prefix)}{TOKENIZER_SUFFIX}")


def _tokenizer_copy(
    tokenizer: Tokenizer | None, folder: Path, output: str | os.PathLike
) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """`copy_tokenizer`, or nothing to do without a tokenizer."""
    return copy_tokenizer(tokenizer, folder, output) if tokenizer else contextlib.nullcontext(lambda: None)


def _merge_packing(files: Sequence[TokenFile]) -> dict | None:
    """The manifest's entry for packed files of one length; None if no file is packed."""
    first = files[0]
    kinds = [(file.packing["length"], file.packing["eod_id"]) if file.packing else None for file in files]
    for file, kind in zip(files, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(
                f"{first.prefix} is {_describe_packing(first)}, and {file.prefix} is {_describe_packing(file)}: only "
                "files that are packed alike can be merged; merge first and pack then, or pack again"
            )
    if kinds[0] is None:
        return None
    sums = {
        key: sum(file.packing[key] for file in files)
        for key in ("bins", "padding", "documents", "cut_documents")
        if all(key in file.packing for file in files)
    }
    return {"length": first.packing["length"], "eod_id": first.packing["eod_id"], **sums}


def _describe_packing(file: TokenFile) -> str:
    if not file.packing:
        return "not packed"
    return f"packed into bins of {file.packing['length']} tokens (end-of-document token {file.packing['eod_id']})"


def _merge_facts(files: Sequence[TokenFile]) -> dict:
    """For the manifest: sums and lists of what every input has, options that are the same in all, and the inputs."""
    manifests = [file.manifest or {} for file in files]
    facts: dict = {
        key: sum(manifest[key] for manifest in manifests)
        for key in ("text_bytes", "mapped_characters")
        if all(key in manifest for manifest in manifests)
    }
    facts["sources"] = [source for manifest in manifests for source in manifest.get("sources", [])]
    options = [manifest.get("options", {}) for manifest in manifests]
    facts["options"] = {
        key: value
        for key, value in options[0].items()
        if all(key in other and other[key] == value for other in options)
    }
    facts["merged"] = [
        {
            "name": _name(file),
            "documents": file.num_documents,
            "tokens": file.num_tokens,
            "fingerprint": file.fingerprint,
            **_take(file, (*BUILD_FACTS, "split")),
        }
        for file in files
    ]
    return facts
