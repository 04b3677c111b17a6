"""Merge token files into one: the documents of the first input, then those of the second ...

    python tools/merge_datasets.py --input data/books data/code --output data/all

The inputs must be made with the same tokenizer, and stay as they are. For training on several token files nothing needs
to be merged: data.train takes a list of them, with weights.
"""

import argparse
import sys

from megaslm.commands import run_command
from megaslm.data import TokenFile, merge_token_files


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="token files, without ending")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the merged one")
    parser.add_argument("--overwrite", action="store_true", help="replace a token file at the output's path")
    return parser.parse_args()


def main() -> None:
    from tqdm import tqdm

    arguments = parse_arguments()
    files = [TokenFile(prefix) for prefix in arguments.input]
    for file in files:
        if file.tokenizer_fingerprint is None:
            unchecked = ", and whether all have the same can't be checked" if len(files) > 1 else ""
            print(
                f"warning: {file.prefix} does not say which tokenizer made it: {arguments.output} will name none"
                f"{unchecked}",
                file=sys.stderr,
            )
    with tqdm(total=sum(file.num_tokens for file in files), unit=" tokens", unit_scale=True, disable=None) as bar:
        manifest = merge_token_files(arguments.input, arguments.output, arguments.overwrite, progress=bar.update)
    print(f"{arguments.output}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens")


if __name__ == "__main__":
    run_command(main)
