"""Tokenize data into token files: PREFIX.bin and PREFIX.idx (Megatron's format), PREFIX.json, and PREFIX.tokenizer/, a
copy of the tokenizer, which training finds there.

    python tools/preprocess_data.py --input corpus.jsonl notes/ --tokenizer tokenizer --output data/corpus
    zcat crawl.gz | python tools/preprocess_data.py --input - --tokenizer tokenizer --output data/crawl
    python tools/preprocess_data.py --input 'qa/*.parquet' --format 'Q: {question}\\nA: {answer}' --split 90,5,5 \\
        --tokenizer tokenizer --output data/qa

Inputs are files, folders, globs, Hugging Face datasets, - (standard input) or python-stdlib; megaslm/data/sources says
which kinds of files. A run that was stopped, in whatever way, goes on where it was when the same command is given.
"""

import argparse
import math
import re
import signal
import sys
import time

from megaslm.commands import handle_termination, interrupt_on_termination, run_command
from megaslm.data import (
    ENCODERS,
    ON_ERROR,
    Assembly,
    BuildOptions,
    BuildProgress,
    TextSource,
    describe,
    find_tokenizer,
    load_tokenizer,
    preprocess,
    skipped_records,
)
from megaslm.errors import UserError

REPORT_SECONDS = 10
LISTED_RECORDS = 20
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="INPUT", help="data to tokenize; - is standard input")
    add("--output", required=True, metavar="PREFIX", help="path of the token files, without ending")
    add("--tokenizer", required=True, metavar="DIR", help="tokenizer folder, or a name on the Hugging Face hub")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text_key", default="text", metavar="KEY", help="field of a record (default: text)")
    text.add_argument(
        "--format", metavar="TEMPLATE", help=r"several fields as one text: 'Q: {question}\nA: {answer}' (\n, \t, \\)"
    )
    add("--stdin_format", choices=["jsonl", "text"], help="of standard input (default: jsonl)")
    add("--no_eod", action="store_true", help="write no end-of-document token after each document")
    add("--split", metavar="SHARES", help="write PREFIX_train, _validation and _test: 90,5,5, or 98,2 without _test")
    add("--dedup", action="store_true", help="keep the first of all documents with the same text")
    add("--shuffle", type=int, nargs="?", const=0, metavar="SEED", help="shuffle the documents (default seed: 0)")
    add("--pack", type=int, metavar="SEQ_LENGTH", help="pack documents into sequences of this length, best fit first")
    for name in ("min_chars", "max_chars", "min_tokens", "max_tokens"):
        bound, unit = name.split("_")
        of = {"chars": "characters", "tokens": "tokens"}[unit]
        add(f"--{name}", type=int, metavar="N", help=f"leave out documents of {bound_word(bound)} than N {of}")
    add("--max_document_mb", type=float, metavar="MB", help="a larger document is an error (default: 67)")
    add("--on_error", choices=ON_ERROR, default="stop", help="skip records that cannot be used, and list them")
    add("--encoder", choices=ENCODERS, default="auto", help="default: gigatoken where it covers the tokenizer")
    add("--workers", type=int, metavar="N", help="processes, some 200 MB each (default: one per core; 0: no others)")
    add("--overwrite", action="store_true", help="replace finished token files, and work of other options")
    return parser.parse_args()


def bound_word(bound: str) -> str:
    return {"min": "fewer", "max": "more"}[bound]


class ProgressDisplay:
    """A bar on a terminal, else a line every 10 seconds; rates are those of this run."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        self.started = self.reported = time.perf_counter()
        self.first: BuildProgress | None = None
        self.last = BuildProgress()
        self.bar = None

    def __call__(self, done: BuildProgress) -> None:
        if self.first is None:
            self._start(done)
        self.last = done
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.tokens_per_second() / 1e6:.2f}M tokens/s", refresh=False)
            self.bar.update(done.input_bytes - self.bar.n)
        elif now - self.reported >= REPORT_SECONDS:
            self.reported = now
            print(self.line(), file=sys.stderr, flush=True)

    def _start(self, done: BuildProgress) -> None:
        self.first, self.started = done, time.perf_counter()
        if sys.stderr.isatty():
            from tqdm import tqdm

            total = self.num_bytes or None  # of a stream it is not known
            self.bar = tqdm(total=total, initial=done.input_bytes, unit="B", unit_scale=True, dynamic_ncols=True)

    def seconds(self) -> float:
        return max(time.perf_counter() - self.started, 1e-9)

    def input_bytes(self) -> int:
        """Bytes of the input that this run has done."""
        return self.last.input_bytes - (self.first or self.last).input_bytes

    def tokens_per_second(self) -> float:
        return (self.last.tokens - (self.first or self.last).tokens) / self.seconds()

    def line(self) -> str:
        done, rate = self.last, self.input_bytes() / self.seconds()
        line = f"{done.documents:,} documents, {done.tokens:,} tokens, {done.input_bytes / 1e6:,.0f} MB"
        if self.num_bytes:
            line += f" ({done.input_bytes / self.num_bytes:.0%})"
        line += f", {rate / 1e6:.1f} MB/s, {self.tokens_per_second() / 1e6:.2f}M tokens/s"
        if self.num_bytes and rate:
            left = int(max(self.num_bytes - done.input_bytes, 0) / rate)
            line += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        return line

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def build_options(arguments: argparse.Namespace) -> BuildOptions:
    return BuildOptions(
        append_eod=not arguments.no_eod,
        encoder=arguments.encoder,
        min_chars=arguments.min_chars,
        max_chars=arguments.max_chars,
        min_tokens=arguments.min_tokens,
        max_tokens=arguments.max_tokens,
        assembly=Assembly(arguments.dedup, arguments.split, arguments.shuffle, arguments.pack),
    )


def open_source(arguments: argparse.Namespace) -> TextSource:
    template = arguments.format and re.sub(r"\\([nt\\])", lambda match: ESCAPES[match[1]], arguments.format)
    limit = {}
    if (megabytes := arguments.max_document_mb) is not None:
        if not (math.isfinite(megabytes) and megabytes > 0):
            raise UserError(f"--max_document_mb {megabytes} is no size of a document: give a number above 0")
        limit["max_document_bytes"] = int(megabytes * 1e6)
    return TextSource(arguments.input, arguments.text_key, template, stdin_format=arguments.stdin_format, **limit)


def main() -> None:
    arguments = parse_arguments()
    options = build_options(arguments)
    tokenizer = load_tokenizer(arguments.tokenizer)
    source = open_source(arguments)
    print(f"reading {len(source.files):,} files, {source.num_bytes / 1e6:,.1f} MB", flush=True)
    interrupt_on_termination()
    display = ProgressDisplay(source.num_bytes)
    try:
        manifests = preprocess(
            source,
            tokenizer,
            arguments.output,
            options,
            workers=arguments.workers,
            on_error=arguments.on_error,
            overwrite=arguments.overwrite,
            progress=display,
            report=lambda line: print(line, flush=True),
        )
    except KeyboardInterrupt:
        handle_termination(signal.SIG_IGN)  # all is said and done
        print("the same command goes on from here", file=sys.stderr)
        raise
    finally:
        display.close()
    if source.num_other_files:
        print(f"left out {source.num_other_files:,} files in folders: of other endings, or read already")
    if source.num_empty_files:
        print(f"left out {source.num_empty_files:,} files without a byte")
    facts = next(iter(manifests.values()))
    if facts["filtered"]:
        print(f"left out {facts['filtered']:,} documents for their length")
    if count := facts["skipped"]["records"]:
        print(f"left out {count:,} records, {facts['skipped']['empty']:,} of them empty; all are in the list of")
        print(f"{arguments.output}.skipped.jsonl, which starts with")
        try:
            print("\n".join(f"  {record}" for record in skipped_records(arguments.output, LISTED_RECORDS)))
        except UserError as error:  # removed since: no reason to fail
            print(f"  {error}")
    if tokenizer.eod_id is None and not arguments.no_eod:
        print("the tokenizer has no end-of-document token: documents stand back to back")
    if num_bytes := display.input_bytes():
        print(f"{num_bytes / 1e6:,.1f} MB in {display.seconds():.1f} s: {num_bytes / 1e6 / display.seconds():.1f} MB/s")
    for prefix, manifest in manifests.items():
        print(f"{find_tokenizer(prefix)}: the tokenizer, {tokenizer.vocab_size:,} tokens")
        print(f"{prefix}: {describe(manifest)}")


if __name__ == "__main__":
    run_command(main)
