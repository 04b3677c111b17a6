"""What is in a token file: figures, lengths of documents, and documents as text. Changes nothing.

    python tools/inspect_dataset.py data/corpus                            3 documents spread over the file, and figures
    python tools/inspect_dataset.py data/corpus --at 1000 --documents 5    documents 1000 to 1004
    python tools/inspect_dataset.py data/corpus --histogram lengths.png    lengths of documents as a picture
    python tools/inspect_dataset.py data/corpus --no_counts                without reading all tokens

Documents are decoded with the tokenizer that the manifest names, or with --tokenizer; without one, ids are shown.
Whether a file is sound: tools/verify_dataset.py.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from megaslm.commands import run_command
from megaslm.data import DatasetStatistics, TokenFile, dataset_statistics, excerpts, plot_lengths, tokenizer_of
from megaslm.errors import UserError

DOCUMENTS = 3
CHARACTERS = 400
BAR_WIDTH = 40
MAX_SOURCES = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", metavar="PREFIX", help="path of a token file, without ending")
    parser.add_argument(
        "--documents", type=int, default=DOCUMENTS, metavar="N", help=f"show N documents (default: {DOCUMENTS})"
    )
    parser.add_argument("--at", type=int, metavar="K", help="show those from document K on (default: spread evenly)")
    parser.add_argument(
        "--characters",
        type=int,
        default=CHARACTERS,
        metavar="N",
        help=f"show up to N characters of a document (default: {CHARACTERS})",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="decode with this tokenizer")
    parser.add_argument("--histogram", metavar="FILE.png", help="save the lengths of documents as a picture")
    parser.add_argument(
        "--no_counts", action="store_true", help="do not read all tokens to count them: no figures of the vocabulary"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    for name, least in (("documents", 0), ("characters", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} {getattr(arguments, name)}: give {least} or more")
    # Before all is read, which may take long.
    if arguments.histogram and not Path(arguments.histogram).absolute().parent.is_dir():
        raise UserError(f"--histogram {arguments.histogram}: there is no such folder")
    return arguments


def main() -> None:
    from tqdm import tqdm

    arguments = parse_arguments()
    tokenizer = tokenizer_of(arguments.prefix, arguments.tokenizer)
    shown = excerpts(arguments.prefix, tokenizer, arguments.documents, arguments.at, arguments.characters)
    if not arguments.json:
        for one in shown:
            text = f"{one.text}{' ...' if one.cut else ''}"
            print(f"--- document {one.document:,}, {one.tokens:,} tokens\n{text}\n", flush=True)
    num_bytes = TokenFile(arguments.prefix).bin_path.stat().st_size
    quiet = True if arguments.no_counts else None  # None: no bar but on a terminal
    with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=quiet, leave=False) as bar:
        statistics = dataset_statistics(arguments.prefix, tokenizer, not arguments.no_counts, progress=bar.update)
    if arguments.histogram:
        plot_lengths(statistics, arguments.histogram)
    if arguments.json:
        print(json.dumps({**asdict(statistics), "excerpts": [asdict(one) for one in shown]}, indent=2))
        return
    print("\n".join(f"{name:<13}{value}" for name, value in facts(statistics)))
    print("\n".join(length_lines(statistics)))
    if arguments.histogram:
        print(f"\n{arguments.histogram}: the lengths as a picture")


def facts(statistics: DatasetStatistics) -> list[tuple[str, str]]:
    manifest = statistics.manifest or {}
    vocabulary = f"{statistics.vocab_size:,} tokens" if statistics.vocab_size else "-"
    if statistics.used_ids is not None:
        of = f" of {statistics.vocab_size:,}" if statistics.vocab_size else ""
        share = f" ({100 * statistics.used_ids / statistics.vocab_size:.1f} %)" if statistics.vocab_size else ""
        vocabulary = f"{statistics.used_ids:,}{of} ids used{share}, the largest {statistics.largest_id:,}"
    found = [
        ("token file", statistics.prefix),
        ("documents", f"{statistics.documents:,}"),
        ("sequences", f"{statistics.sequences:,}"),
        ("tokens", f"{statistics.tokens:,} of {statistics.dtype}"),
        ("size", f"{statistics.bytes / 1e6:,.1f} MB"),
        ("vocabulary", vocabulary),
        ("ends", "-" if statistics.eod_tokens is None else f"{statistics.eod_tokens:,} x token {statistics.eod_id}"),
        ("bytes/token", "-" if statistics.bytes_per_token is None else f"{statistics.bytes_per_token:.3f}"),
        ("tokenizer", statistics.tokenizer_folder or "-"),
        ("fingerprint", statistics.tokenizer_fingerprint or "-"),
    ]
    if packing := manifest.get("packing"):
        share = 100 * packing["padding"] / max(statistics.tokens, 1)
        found.append(
            (
                "packing",
                f"{packing['bins']:,} bins of {packing['length']:,} tokens, {packing['padding']:,} tokens of padding "
                f"({share:.3f} %)",
            )
        )
    for key in ("options", "assembly", "split"):
        if values := manifest.get(key):
            given = {name: value for name, value in values.items() if value is not None and value is not False}
            found.append((key, ", ".join(f"{name} {value}" for name, value in given.items()) or "-"))
    for key in ("merged", "sources"):
        if names := [one["name"] for one in manifest.get(key, [])]:
            more = f", and {len(names) - MAX_SOURCES:,} more" if len(names) > MAX_SOURCES else ""
            found.append((key, ", ".join(names[:MAX_SOURCES]) + more))
    return found if statistics.manifest else [*found, ("manifest", "none: hashes and tokenizer are not known")]


def length_lines(statistics: DatasetStatistics) -> list[str]:
    lengths = statistics.lengths
    if lengths is None:
        return ["", "no documents"]
    what = "piece" if (statistics.manifest or {}).get("packing") else "document"
    percentiles = ", ".join(f"{percent} %: {length:,}" for percent, length in lengths.percentiles.items())
    lines = [
        "",
        f"tokens per {what}: {lengths.shortest:,} to {lengths.longest:,}, mean {lengths.mean:,.1f}",
        f"percentiles: {percentiles}",
    ]
    most = max(one.documents for one in lengths.bins)
    width = len(f"{lengths.bins[-1].high:,}")
    for one in lengths.bins:
        bar = "#" * -(-BAR_WIDTH * one.documents // most)
        lines.append(
            f"  {one.low:>{width},} to {one.high:>{width},}  {one.documents:>{len(f'{most:,}')},}  {bar}".rstrip()
        )
    return lines


if __name__ == "__main__":
    run_command(main)
