"""Split a token file by its documents, in their order, into PREFIX_train, PREFIX_validation and PREFIX_test.

    python tools/split_dataset.py --input data/corpus --output data/corpus --split 98,2
    python tools/split_dataset.py --input data/corpus --output parts/corpus --split 90,5,5

The input stays as it is. For training nothing needs to be split: data.split takes contiguous parts of one token file.
To split by text, so that equal documents stay together, see --split of tools/preprocess_data.py.
"""

import argparse

from megaslm.commands import run_command
from megaslm.data import TokenFile, split_token_file


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, metavar="PREFIX", help="a token file, without ending")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="beginning of the parts' paths")
    parser.add_argument("--split", required=True, metavar="SHARES", help="two or three, such as 98,2 or 90,5,5")
    parser.add_argument("--overwrite", action="store_true", help="replace token files at the parts' paths")
    return parser.parse_args()


def main() -> None:
    from tqdm import tqdm

    arguments = parse_arguments()
    tokens = TokenFile(arguments.input).num_tokens
    with tqdm(total=tokens, unit=" tokens", unit_scale=True, disable=None) as bar:
        manifests = split_token_file(
            arguments.input, arguments.output, arguments.split, arguments.overwrite, progress=bar.update
        )
    for output, manifest in manifests.items():
        print(f"{output}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens")


if __name__ == "__main__":
    run_command(main)
