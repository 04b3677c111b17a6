"""Make a tokenizer: byte-level BPE trained on text, the characters of a text, or pad + printable ASCII.

    python tools/train_tokenizer.py --input corpus.jsonl notes/ --vocab_size 32000 --output tokenizer
    python tools/train_tokenizer.py --input shakespeare.txt --type char --output tokenizer

Inputs are jsonl files, text files, folders, globs, or python-stdlib. The folder written opens with
transformers.AutoTokenizer.from_pretrained as well.
"""

import argparse
import time

from megaslm.commands import run_command
from megaslm.data import DEFAULT_VOCAB_SIZE, TextSource, Tokenizer, ascii_tokenizer, character_tokenizer, train_bpe
from megaslm.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", metavar="FILE", help="text to train on (not for --type ascii)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--type", choices=["bpe", "char", "ascii"], default="bpe", help="default: bpe (byte-level)")
    parser.add_argument(
        "--vocab_size", type=int, metavar="N", help=f"bpe: tokens, special ones included (default {DEFAULT_VOCAB_SIZE})"
    )
    parser.add_argument("--keep_whole", metavar="FILE", help="bpe: phrases that stay single tokens, one a line")
    parser.add_argument(
        "--unknown",
        choices=["map", "refuse"],
        help="char, ascii: map a character without a symbol to a space (default), or refuse the text",
    )
    parser.add_argument("--text_key", default="text", metavar="KEY", help="field of a jsonl record (default: text)")
    arguments = parser.parse_args()
    if arguments.type == "bpe" and arguments.unknown:
        parser.error("--unknown has no effect with --type bpe: its tokens cover every byte")
    if arguments.type != "bpe" and (arguments.vocab_size or arguments.keep_whole):
        parser.error(f"--vocab_size and --keep_whole have no effect with --type {arguments.type}")
    if (arguments.type == "ascii") == bool(arguments.input):
        parser.error("--type ascii takes no --input" if arguments.input else "--input is needed")
    return arguments


def read_phrases(path: str) -> list[str]:
    """Phrases of a file, one a line, spaces kept; empty lines are skipped."""
    try:
        with open(path, encoding="utf-8") as file:
            return [phrase for line in file if (phrase := line.rstrip("\r\n"))]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the phrases in {path}: {error}") from error


def make_tokenizer(arguments: argparse.Namespace) -> Tokenizer:
    if arguments.type == "ascii":
        return ascii_tokenizer(arguments.unknown or "map")
    phrases = read_phrases(arguments.keep_whole) if arguments.keep_whole else []
    source = TextSource(arguments.input, arguments.text_key)
    print(f"reading {len(source.files):,} files, {source.num_bytes / 1e6:,.1f} MB", flush=True)
    texts = (document.text for document in source)
    if arguments.type == "char":
        return character_tokenizer(texts, arguments.unknown or "map")
    return train_bpe(texts, arguments.vocab_size or DEFAULT_VOCAB_SIZE, phrases)


def main() -> None:
    arguments = parse_arguments()
    start = time.perf_counter()
    tokenizer = make_tokenizer(arguments)
    tokenizer.save(arguments.output)
    wanted = arguments.vocab_size or DEFAULT_VOCAB_SIZE
    if arguments.type == "bpe" and tokenizer.vocab_size < wanted:
        print(f"the text gave no more than {tokenizer.vocab_size:,} of {wanted:,} tokens")
    print(
        f"{arguments.output}: {arguments.type} tokenizer of {tokenizer.vocab_size:,} tokens, fingerprint "
        f"{tokenizer.fingerprint}, {time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    run_command(main)
