"""Check every byte of token files: sizes, offsets, document boundaries, ids, and the hashes of the manifest.

    python tools/verify_dataset.py data/corpus data/other
    python tools/verify_dataset.py data/megatron_text_document --vocab_size 50257    a file without PREFIX.json

Without PREFIX.json there are no hashes to compare with; ids are then compared with --tokenizer or --vocab_size. The
tokenizer that lies where PREFIX.json says must be the one that made the file.

Exit codes: 0 all are sound; 2 one is damaged or missing, or a mistake in the command.
"""

import argparse
import time

from megaslm.commands import run_command
from megaslm.data import TokenFile, find_tokenizer, load_tokenizer, verify
from megaslm.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="path of a token file, without ending")
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument("--tokenizer", metavar="DIR", help="ids must be of this tokenizer")
    vocabulary.add_argument("--vocab_size", type=int, metavar="N", help="ids must be below N")
    arguments = parser.parse_args()
    if arguments.vocab_size is not None and arguments.vocab_size < 1:
        raise UserError(f"--vocab_size {arguments.vocab_size}: give 1 or more")
    return arguments


def main() -> None:
    from tqdm import tqdm

    arguments = parse_arguments()
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    vocab_size = tokenizer.vocab_size if tokenizer else arguments.vocab_size
    faults = []
    for prefix in arguments.prefixes:
        start = time.perf_counter()
        try:
            num_bytes = TokenFile(prefix).bin_path.stat().st_size
            with tqdm(total=num_bytes, unit="B", unit_scale=True, desc=prefix, disable=None, leave=False) as bar:
                file = verify(prefix, vocab_size, tokenizer.fingerprint if tokenizer else None, progress=bar.update)
            its_tokenizer = find_tokenizer(prefix)
        except UserError as error:
            faults.append(str(error))
            continue
        seconds = time.perf_counter() - start
        size = (file.bin_path.stat().st_size + file.idx_path.stat().st_size) / 1e6
        if file.manifest is None:
            checked = "no manifest, so that no hashes were compared"
        elif its_tokenizer:
            checked = "hashes and tokenizer agree"
        else:
            checked = f"hashes agree, its tokenizer ({file.tokenizer_folder or 'in no known folder'}) is not there"
        print(
            f"{prefix}: sound, {checked}; {file.num_documents:,} documents, {file.num_tokens:,} tokens, "
            f"{size:,.1f} MB in {seconds:.1f} s ({size / max(seconds, 1e-9):,.0f} MB/s)",
            flush=True,
        )
    if faults:
        raise UserError("\n".join(faults))


if __name__ == "__main__":
    run_command(main)
