"""Inputs to token files, on all cores, in fixed memory, and in steps that survive a kill.

The source cuts its inputs into units (about 8 MB). Workers read, filter and encode units by themselves; this process
appends them in order to the streams in PREFIX.work/ (see work.py), from which the same command goes on if it is
stopped at any moment. At the end the stream is PREFIX.bin, or the assembly makes the outputs of it (no duplicates,
parts, another order, packed). The outputs depend on the inputs and the options alone: not on the number of workers, on
the encoder, or on how often the build was stopped.
"""

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megaslm.data.assembly import Assembly, assemble, split_prefixes
from megaslm.data.builder import check_tokenizer_folder, copy_tokenizer
from megaslm.data.encoder import ChosenEncoder, choose_encoder
from megaslm.data.sources import TextSource, Unit
from megaslm.data.token_file import TOKENIZER_SUFFIX, TokenFile, file_paths, read_manifest, token_dtype
from megaslm.data.token_writer import check_output, commit, disk_errors, output_lock, prepared_token_file
from megaslm.data.tokenizer import Tokenizer
from megaslm.data.unit_encoder import PieceFacts, UnitEncoder, UnitFacts, UnitRules, encode_here
from megaslm.data.work import (
    KEYS,
    SKIPPED,
    TEXT_BYTES,
    TOKENS,
    WORK_SUFFIX,
    BuildProgress,
    TokenStream,
    Work,
    work_errors,
)
from megaslm.data.workers import WorkerProcesses
from megaslm.errors import UserError
from megaslm.resources import num_cores

ON_ERROR = ("stop", "skip")
BOUNDS = ("min_chars", "max_chars", "min_tokens", "max_tokens")
REPORT_SECONDS = 10
SKIPPED_SUFFIX = ".skipped.jsonl"
INLINE_BYTES = 32 << 20  # an input below it is done before worker processes have started
SAMPLE_UNITS = 16
SAMPLE_CHARACTERS = 1 << 14  # of each of these units: what both encoders must encode alike
SAMPLE_BYTES = 1 << 18


@dataclass(frozen=True)
class BuildOptions:
    """What the token files hold.

    append_eod: the tokenizer's end-of-document token behind each document, if it has one.
    encoder: "auto", "gigatoken" or "huggingface", see encoder.py.
    min_chars, max_chars: bounds on a document's characters, inclusive; documents that come as ids have none.
    min_tokens, max_tokens: bounds on its tokens, without the end-of-document token.
    """

    append_eod: bool = True
    encoder: str = "auto"
    min_chars: int | None = None
    max_chars: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    assembly: Assembly = field(default_factory=Assembly)

    def __post_init__(self):
        for unit in ("chars", "tokens"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if min(low or 0, high or 0) < 0 or (None not in (low, high) and low > high):
                raise UserError(f"min_{unit} {low} and max_{unit} {high} leave no document: 0 <= min <= max is needed")


def preprocess(
    source: TextSource,
    tokenizer: Tokenizer,
    prefix: str | os.PathLike,
    options: BuildOptions | None = None,
    *,
    workers: int | None = None,
    on_error: str = "stop",
    overwrite: bool = False,
    progress: Callable[[BuildProgress], None] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, dict]:
    """Encode `source` into token files; return the manifest of each output by its PREFIX.

    The tokenizer is copied to PREFIX.tokenizer/. Where another process, or this one before it was stopped, has done a
    part of the same build, PREFIX.work/ has it and the build goes on from there; outputs of the same inputs and options
    that are finished are left as they are.

    Args:
        workers: processes that encode; 0: this one alone, with the encoder's threads on all cores; None: one per core,
            or 0 for an input of a few MB. With workers a script needs the guard `if __name__ == "__main__":`, since
            they are started with spawn.
        on_error: "stop" at the first record that gives no document; or "skip" them, and list them in
            PREFIX.skipped.jsonl ({"where", "reason"} a line).
        overwrite: replace token files of another build, and what a build with other options has done so far; and build
            again what is finished. Without it they are a UserError.
        progress: called at the start and after every unit, with all that is done, by runs before this one as well.
        report: called with lines on what was chosen and found.

    UserError for every fault of input, options and disk; what is done by then is kept for the next run.
    """
    if workers is not None and workers < 0:
        raise UserError(f"workers {workers} is below zero")
    build = _Build(source, tokenizer, os.fspath(prefix), options or BuildOptions(), on_error, overwrite, report)
    with output_lock(build.prefix):
        if finished := build.finished():
            return finished
        try:
            stream, done = build.encode(workers, progress or (lambda done: None))
        except MemoryError:
            raise UserError(
                "memory ran out: the same command with fewer --workers, or with a lower --max_document_mb and "
                "--on_error skip, goes on where this one stopped"
            ) from None
        return build.put_in_place(stream, done)


def skipped_records(prefix: str | os.PathLike, count: int) -> list[str]:
    """The first records, "where: reason" each, that a build with on_error "skip" left out.

    UserError if the list of them is gone, or is not as it was written.
    """
    path = f"{os.fspath(prefix)}{SKIPPED_SUFFIX}"
    try:
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in itertools.islice(file, count)]
            return [f"{record['where']}: {record['reason']}" for record in records]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path}, the list of the records that were left out, cannot be read ({error}); build again with "
            "--overwrite to have it"
        ) from None


class _Build:
    """One call of `preprocess`."""

    def __init__(
        self,
        source: TextSource,
        tokenizer: Tokenizer,
        prefix: str,
        options: BuildOptions,
        on_error: str,
        overwrite: bool,
        report: Callable[[str], None],
    ):
        if on_error not in ON_ERROR:
            raise UserError(f"on_error {on_error!r} is none of {', '.join(ON_ERROR)}")
        self.source, self.tokenizer, self.prefix = source, tokenizer, prefix
        self.options, self.on_error, self.overwrite, self.report = options, on_error, overwrite, report
        self.folder = Path(f"{prefix}{WORK_SUFFIX}")
        self.outputs = options.assembly.prefixes(prefix)
        self.eod_id = tokenizer.eod_id if options.append_eod else None
        options.assembly.check_padding(self.eod_id)  # now, and not after hours
        self.chosen: ChosenEncoder | None = None  # once `encode` has seen a sample
        self.rules = UnitRules(
            eod_id=self.eod_id,
            dtype=token_dtype(tokenizer.vocab_size).newbyteorder("<"),
            **{name: getattr(options, name) for name in BOUNDS},
            columns=self._columns(),
        )
        self.identity = self._identity()

    def _columns(self) -> tuple[str, ...]:
        assembly = self.options.assembly
        if assembly.identity:
            return ()
        return (KEYS, TEXT_BYTES) if assembly.needs_keys else (TEXT_BYTES,)

    def _content(self) -> dict:
        """The options on which the stream depends, by the names that a message gives them."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "append_eod": self.eod_id,
            **self.source.record_options,
            **{name: getattr(self.options, name) for name in BOUNDS},
            "dedup, split, shuffle or pack": self.rules.columns,
        }

    def _identity(self) -> str:
        """Hash of what the outputs depend on; never the same twice where an input can be read but once."""
        digest = hashlib.blake2b(digest_size=16)
        whole = [self._content(), asdict(self.options.assembly), self.source.max_document_bytes]
        digest.update(json.dumps(whole, sort_keys=True, default=str).encode())
        for file in self.source.files:
            digest.update(repr((file.location, file.name, file.size, file.mtime_ns)).encode())
            if file.kind == "stdin":
                digest.update(secrets.token_bytes(16))
        return digest.hexdigest()

    # --- what is there already ----------------------------------------------------------------------------------------

    def finished(self) -> dict[str, dict] | None:
        """The manifests of the outputs if this build is finished; UserError if another build's stand in its place."""
        for output in self.outputs:
            check_output(output, overwrite=True)  # what must not be overwritten whatever stands there
        manifests = {output: read_manifest(file_paths(output)[2]) for output in self.outputs}
        check_tokenizer_folder(self.tokenizer, self._tokenizer_folder, self._tokenizer_owner)
        self._drop_work_of_a_finished_build(manifests)
        if self.overwrite:
            return None
        done = [manifest is not None and manifest.get("build") == self.identity for manifest in manifests.values()]
        if all(done) and all(map(_is_whole, self.outputs)):
            count = manifests[self.outputs[0]]["skipped"]["records"]
            if count and self.on_error == "stop":
                raise UserError(
                    f"{self.prefix} is finished, but {count:,} records were left out (see {self.prefix}"
                    f"{SKIPPED_SUFFIX}): --on_error skip takes it as it is, --overwrite builds it again"
                )
            with copy_tokenizer(self.tokenizer, self._tokenizer_folder, self._tokenizer_owner) as put_tokenizer:
                put_tokenizer()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.report(f"{', '.join(self.outputs)}: finished before from the same inputs and options; nothing to do")
            return manifests
        for (output, manifest), same in zip(manifests.items(), done, strict=True):
            foreign = manifest is None and file_paths(output)[0].exists() and not self.folder.exists()
            if foreign or (manifest is not None and not same):
                raise UserError(
                    f"{output} exists and is of another build (other inputs or options): choose another output "
                    "PREFIX, or replace it with --overwrite"
                )
        for other in self._of_other_splits():
            raise UserError(
                f"{other} is of a build of {self.prefix} with another --split, or without, and would stand beside the "
                "new files: choose another output PREFIX, or let --overwrite remove it"
            )
        return None

    def _of_this_prefix(self) -> list[str]:
        """Which of PREFIX and the parts of a split of it are there, made with this PREFIX: they name its tokenizer."""
        found = []
        for output in (self.prefix, *split_prefixes(self.prefix, "1,1,1").values()):
            with contextlib.suppress(UserError):  # what is not ours stays as it is
                manifest = read_manifest(file_paths(output)[2])
                if manifest and manifest["tokenizer"].get("folder") == self._tokenizer_folder.name:
                    found.append(output)
        return found

    def _of_other_splits(self) -> list[str]:
        """What this build would leave there, and does not write."""
        return [output for output in self._of_this_prefix() if output not in self.outputs]

    @property
    def _tokenizer_owner(self) -> str:
        """A PREFIX with which the tokenizer's folder, if it is there, may have come."""
        return next(iter(self._of_this_prefix()), self.outputs[0])

    def _drop_work_of_a_finished_build(self, manifests: dict[str, dict | None]) -> None:
        """A build that was killed after it had put all in place: its stream is PREFIX.bin, which nothing may change."""
        stream, output = self.folder / TOKENS, file_paths(self.prefix)[0]
        if manifests.get(self.prefix) and stream.exists() and output.exists() and os.path.samefile(stream, output):
            if _is_whole(self.prefix):
                shutil.rmtree(self.folder)

    # --- encoding -----------------------------------------------------------------------------------------------------

    def encode(
        self, workers: int | None, progress: Callable[[BuildProgress], None]
    ) -> tuple[TokenStream, BuildProgress]:
        """Do what is left to do of the stream; return it and its totals."""
        units, workers = _number_of_workers(self.source.units(), workers)
        stop_at_fault = self.on_error == "stop"
        with contextlib.ExitStack() as stack:
            if workers:
                processes = stack.enter_context(
                    WorkerProcesses(workers, self.source, self.tokenizer, self.rules, stop_at_fault)
                )
            first = list(itertools.islice(units, 1))
            self.chosen = choose_encoder(self.tokenizer, self.options.encoder, self._sample(first))
            self.report(f"encoder: {self.chosen}")
            work = stack.enter_context(contextlib.closing(self._open_work()))
            stack.callback(self._drop_if_nothing_is_done, work)
            units = self._resume(work, itertools.chain(first, units))
            if workers:
                results = processes.encode(units, self.chosen.encoder.name, self.folder)
            else:
                encode = UnitEncoder(self.source, self.tokenizer, self.chosen.encoder, self.rules, stop_at_fault)
                results = encode_here(units, encode)
            stack.enter_context(contextlib.closing(results))
            progress(work.done)
            for unit, facts, columns in results:
                self._append(work, unit, facts, columns)
                progress(work.done)
            if not work.done.documents:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise UserError(f"there are no documents to write to {self.prefix}: the input holds no text")
            return work.finish(self.rules.dtype), work.done

    def _drop_if_nothing_is_done(self, work: Work) -> None:
        if not (work.found.units or work.done.units):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _open_work(self) -> Work:
        work = Work(self.folder, self._content(), self.rules.columns, self.overwrite)
        if work.replaced:
            self.report(f"{self.folder} was of a build with another {', '.join(work.replaced)}, and is started over")
        return work

    def _resume(self, work: Work, units: Iterator[Unit]) -> Iterator[Unit]:
        """Go on from what is whole in the work folder; return the units that are left to do."""
        found = work.found
        if not found.units:
            return work.resume(units, self.source.identity, self._accepts)
        size, is_due = work.size / 1e6, _Pace()
        self.report(f"checking {size:,.1f} MB of finished work in {self.folder}")

        def progress(checked: int) -> None:
            if is_due():
                self.report(f"checked {checked / 1e6:,.0f} of {size:,.0f} MB of finished work")

        units, done = work.resume(units, self.source.identity, self._accepts, progress), work.done
        if done.units:
            self.report(
                f"going on from {self.folder}: {done.units:,} units are done, {done.tokens:,} tokens of "
                f"{done.input_bytes / 1e6:,.1f} MB of input"
            )
        if left := found.units - done.units:
            self.report(
                f"{left:,} more units in {self.folder}, of {(found.input_bytes - done.input_bytes) / 1e6:,.1f} MB of "
                "input, are dropped, and the input is read again from there: it has changed, or they are not whole"
            )
        return units

    def _accepts(self, notes: dict) -> bool:
        """Whether this build would leave the same records of a unit out; UserError rather than to do it again unasked.

        Where none was left out, each was within the limit of that time, and so it is within a higher one.
        """
        limit, before = self.source.max_document_bytes, notes["max_document_bytes"]
        if limit == before and self.on_error == "skip" or limit >= before and not notes["skipped"]:
            return True
        if self.overwrite:
            return False
        skipped = "records left out by --on_error skip, and " if notes["skipped"] else ""
        raise UserError(
            f"{self.folder} holds work with {skipped}documents of up to {before:,} bytes (--max_document_mb): give "
            "these options as before to go on with it, or do that part again with --overwrite"
        )

    def _append(self, work: Work, unit: Unit, facts: UnitFacts, columns: Iterable) -> None:
        """Append an encoded unit to the stream; UserError at its first fault under "stop"."""
        done, skipped = replace(work.done), []
        for piece in facts.pieces:
            if done.file != (name := str(piece.file.path)):
                done.file, done.records = name, 0
            for where, reason in _left_out(piece, done.records):
                if self.on_error == "stop":
                    raise UserError(
                        f"{where}: {reason}; once that is mended the same command goes on from here, or "
                        "--on_error skip leaves such records out"
                    )
                skipped.append(json.dumps({"where": where, "reason": reason}, ensure_ascii=False) + "\n")
            done.skipped += piece.num_faults
            done.empty += piece.num_empty
            done.records += piece.num_records
            done.input_bytes += piece.size
        done.units += 1
        done.largest_id = max(done.largest_id, facts.largest_id)
        for name in ("documents", "tokens", "text_bytes", "mapped_characters", "filtered"):
            setattr(done, name, getattr(done, name) + getattr(facts, name))
        notes = {"max_document_bytes": self.source.max_document_bytes, "skipped": done.skipped - work.done.skipped}
        lines = [(SKIPPED, "".join(skipped).encode())]
        work.commit(self.source.identity(unit), itertools.chain(columns, lines), done, notes)

    def _sample(self, first: list[Unit]) -> list[tuple[str, str]]:
        """Starts of documents spread over the input; of its start alone where it can be read but once."""
        once = any(file.kind != "file" for file in self.source.files)
        files = self.source.files[:: len(self.source.files) // SAMPLE_UNITS + 1]  # to list the units of all takes time
        units = first if once else _spread(self.source.units(files), SAMPLE_UNITS)
        sample = []
        for unit in units:
            left = SAMPLE_CHARACTERS
            for text, where in self._texts(unit):
                sample.append((text[:left], f"a document of {where}"))
                left -= len(text)
                if left <= 0:
                    break
        return sample

    def _texts(self, unit: Unit) -> Iterator[tuple[str, str]]:
        """Texts of a unit and where they stand, as near as is known without reading what comes before."""
        for piece in unit:
            if piece.format == "jsonl" and piece.data is None:  # no need to parse all of it
                piece = piece._replace(stop=min(piece.stop, piece.start + SAMPLE_BYTES))
            content = self.source.read(piece)
            for i, text in enumerate(content.texts):
                yield text, piece.file.place(content.numbers[i] if content.numbered and not piece.start else None)

    # --- outputs ------------------------------------------------------------------------------------------------------

    @property
    def _tokenizer_folder(self) -> Path:
        return Path(f"{self.prefix}{TOKENIZER_SUFFIX}")

    def put_in_place(self, stream: TokenStream, done: BuildProgress) -> dict[str, dict]:
        """Make the outputs of the stream and remove the work folder; return the manifests."""
        assembly, facts = self.options.assembly, self._facts(done)
        tokenizer = {
            "fingerprint": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            "folder": self._tokenizer_folder.name,
        }
        with copy_tokenizer(self.tokenizer, self._tokenizer_folder, self._tokenizer_owner) as put_tokenizer:

            def before_commit() -> None:
                put_tokenizer()
                self._remove_other_splits()

            self._put_skipped(done)
            if assembly.identity:
                with prepared_token_file(
                    self.prefix,
                    _second_name(stream.tokens_path),
                    stream.lengths_path,
                    dtype=stream.dtype,
                    bin_sha256=stream.sha256,
                    largest_id=done.largest_id,
                    tokenizer=tokenizer,
                    facts={"text_bytes": done.text_bytes, **facts},
                ) as file:
                    before_commit()
                    commit([file])
                manifests = [file.manifest]
            else:
                manifests = assemble(
                    stream,
                    assembly,
                    self.outputs,
                    vocab_size=self.tokenizer.vocab_size,
                    tokenizer=tokenizer,
                    eod_id=self.eod_id,
                    facts=facts,
                    overwrite=True,  # what stands there may be replaced, see `finished`
                    before_commit=before_commit,
                    progress=self._assembly_progress(stream.num_tokens),
                )
        shutil.rmtree(self.folder, ignore_errors=True)
        return dict(zip(self.outputs, manifests, strict=True))

    def _facts(self, done: BuildProgress) -> dict:
        """What every manifest says about the build as a whole."""
        bounds = {name: getattr(self.options, name) for name in BOUNDS}
        return {
            "mapped_characters": done.mapped_characters,
            "sources": [{"name": file.name, "bytes": file.size} for file in self.source.files],
            "options": {
                "eod_id": self.eod_id,
                **self.source.record_options,
                **{name: bound for name, bound in bounds.items() if bound is not None},
            },
            "encoder": {"name": self.chosen.encoder.name, "version": self.chosen.version, "reason": self.chosen.reason},
            "filtered": done.filtered,
            "skipped": {"records": done.skipped, "empty": done.empty},
            "build": self.identity,
        }

    def _assembly_progress(self, num_tokens: int) -> Callable[[int], None]:
        """Reports every 10 seconds how much is written."""
        written, is_due = 0, _Pace()

        def progress(tokens: int) -> None:
            nonlocal written
            written += tokens
            if is_due():
                self.report(f"putting the outputs together: {written / 1e6:,.0f} of {num_tokens / 1e6:,.0f}M tokens")

        return progress

    def _remove_other_splits(self) -> None:
        """What `finished` has found there, and been told to overwrite."""
        for output in self._of_other_splits():
            lock = contextlib.nullcontext() if output == self.prefix else output_lock(output)
            bin_path, idx_path, json_path = file_paths(output)
            with lock, disk_errors(output):
                for path in (idx_path, bin_path, json_path):  # as long as it is not gone, the manifest says whose it is
                    path.unlink(missing_ok=True)

    def _put_skipped(self, done: BuildProgress) -> None:
        target = Path(f"{self.prefix}{SKIPPED_SUFFIX}")
        with work_errors(self.folder):
            if done.skipped:
                shutil.copyfile(self.folder / SKIPPED, target.with_name(f".{target.name}.tmp"))
                os.replace(target.with_name(f".{target.name}.tmp"), target)
            else:
                target.unlink(missing_ok=True)


class _Pace:
    """Called, it is True once in REPORT_SECONDS."""

    def __init__(self):
        self._last = time.monotonic()

    def __call__(self) -> bool:
        now = time.monotonic()
        if is_due := now - self._last >= REPORT_SECONDS:
            self._last = now
        return is_due


def _left_out(piece: PieceFacts, before: int) -> Iterator[tuple[str, str]]:
    """Where records of a piece give no document, which has `before` records of its file before it, and why not."""
    for fault in piece.faults:
        yield piece.file.place(None if fault.number is None else before + fault.number), fault.reason
    if more := piece.num_faults - len(piece.faults):
        records = f"records {before + 1:,} to {before + piece.num_records:,}"
        yield piece.file.place(None), f"{more:,} more of the {records}, which are not listed"


def _is_whole(prefix: str) -> bool:
    """Whether the token file opens, which checks all sizes."""
    try:
        TokenFile(prefix)
    except UserError:
        return False
    return True


def _second_name(path: Path) -> Path:
    """Another name of the file, to be moved away: a build that is killed on the way still has the first.

    Where the file system knows one name per file, that one.
    """
    second = path.with_name(f"{path.name}.out")
    try:
        second.unlink(missing_ok=True)
        os.link(path, second)
    except OSError:
        return path
    return second


def _number_of_workers(units: Iterator[Unit], workers: int | None) -> tuple[Iterator[Unit], int]:
    """All the units, and `workers`; or by the size of the input as many as there are cores, or none."""
    if workers is not None:
        return units, workers
    head, weight = [], 0
    for unit in units:
        head.append(unit)
        weight += sum(piece.weight for piece in unit)
        if weight >= INLINE_BYTES:
            return itertools.chain(head, units), num_cores()
    return iter(head), 0


def _spread(units: Iterable[Unit], count: int) -> list[Unit]:
    """At most `count` units, evenly spread; up to the first that had to be read in order, of which one is enough."""
    kept: list[Unit] = []
    step = 1
    for number, unit in enumerate(units):
        if number % step == 0:
            if len(kept) == count:
                kept, step = kept[::2], step * 2
            if number % step == 0:
                kept.append(unit)
        if any(piece.data is not None for piece in unit):
            break
    return kept
