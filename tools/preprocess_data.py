"""Tokenize text into a token file: PREFIX.bin and PREFIX.idx (Megatron's format), PREFIX.json, and PREFIX.tokenizer/,
a copy of the tokenizer, which training finds there.

    python tools/preprocess_data.py --input corpus.jsonl notes/ --tokenizer tokenizer --output data/corpus

Inputs are jsonl files, text files, folders, globs, or python-stdlib.
"""

import argparse
import sys
import time

from megaslm.commands import run_command
from megaslm.data import BuildProgress, TextSource, build_token_file, describe, find_tokenizer, load_tokenizer

REPORT_SECONDS = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text to tokenize")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the token file, without ending")
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="tokenizer folder, or a name on the Hugging Face hub"
    )
    parser.add_argument("--text_key", default="text", metavar="KEY", help="field of a jsonl record (default: text)")
    parser.add_argument("--no_eod", action="store_true", help="write no end-of-document token after each document")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    tokenizer = load_tokenizer(arguments.tokenizer)
    source = TextSource(arguments.input, arguments.text_key)
    print(f"reading {len(source.files):,} files, {source.num_bytes / 1e6:,.1f} MB", flush=True)
    start = reported = time.perf_counter()

    def progress(done: BuildProgress) -> None:
        nonlocal reported
        now = time.perf_counter()
        if now - reported >= REPORT_SECONDS:
            reported = now
            speed = done.text_bytes / 1e6 / (now - start)
            print(f"{done.documents:,} documents, {done.tokens:,} tokens, {speed:.1f} MB/s", file=sys.stderr)

    manifest = build_token_file(
        source,
        tokenizer,
        arguments.output,
        append_eod=not arguments.no_eod,
        sources=source.files,
        options={"text_key": arguments.text_key},
        progress=progress,
    )
    if source.num_other_files:
        print(f"left out {source.num_other_files:,} files in folders for their ending")
    if source.num_empty:
        print(f"skipped {source.num_empty:,} empty documents")
    if tokenizer.eod_id is None and not arguments.no_eod:
        print("the tokenizer has no end-of-document token: documents stand back to back")
    print(f"{find_tokenizer(arguments.output)}: the tokenizer, {tokenizer.vocab_size:,} tokens")
    print(f"{arguments.output}: {describe(manifest, time.perf_counter() - start)}")


if __name__ == "__main__":
    run_command(main)
