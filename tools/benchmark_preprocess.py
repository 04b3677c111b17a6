"""Section of benchmark_data.py: jsonl to token files against the encoder alone on the same file, and peak memory.

The encoder's own rate is that of gigatoken's `encode_files` (its reader of jsonl, all cores, everything in memory),
called twice in a process: the first call starts with empty caches of words, as the workers of every command do; the
second is its warm rate. Ours is one call of `preprocess` with its default workers in a process of its own, from call to
return: start of the workers, proof of the encoder, parsing, checks, encoding, hashes, index, fsync, renames. Both run
in turn, with the file in the page cache, nothing left to be written back, and nobody looking on.

Peak memory is sampled in a run of its own, on a larger file. `taskset -c 0,1` gives the figures of two cores.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson
import psutil

from megaslm.data import PYTHON_STDLIB, TextSource, choose_encoder, load_tokenizer, preprocess, train_bpe
from megaslm.errors import UserError

SHARE_OF_ENCODER = 0.75
PEAK_BYTES = 1e9
VOCAB_SIZE = 32_000
TRAINING_BYTES = 16_000_000
HUGGING_FACE_BYTES = 8_000_000
ENCODER_MEMORY = 4  # bytes that the encoder alone holds per byte of jsonl, besides the file in the page cache
OUTPUT_SHARE = 1  # bytes of token files per byte of jsonl, with room to spare
SAMPLE_SECONDS = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--gigabytes", type=float, default=2.0,
        help=f"size of the jsonl file that is timed (2); takes {ENCODER_MEMORY + 1} times as much memory",
    )  # fmt: skip
    add("--jsonl", type=Path, metavar="FILE", help="a jsonl file to time instead")
    add("--memory_gigabytes", type=float, default=4.0, help="size of the file for peak memory, on disk only (4)")
    add("--tokenizer", metavar="DIR", help=f"default: a byte-level BPE of {VOCAB_SIZE:,}")
    add("--rounds", type=int, default=3, help="of which the medians are taken (3)")


def run(arguments: argparse.Namespace, folder: Path) -> dict:
    """All measurements, and "figures" as lines of the table."""
    check_room(arguments, folder)
    path = arguments.jsonl or make_corpus(folder / "timed.jsonl", arguments.gigabytes)
    tokenizer = arguments.tokenizer or train_tokenizer(path, folder / "tokenizer")
    rounds = {name: [] for name in MEASURED}
    for number in range(arguments.rounds):
        for name, measured in rounds.items():
            measured.append(in_process(name, path, tokenizer, folder))
            rates = ", ".join(f"{call} {rate / 1e6:,.0f} MB/s" for call, rate in measured[-1]["rates"].items())
            print(f"  round {number + 1}, {name}: {rates}", flush=True)
    if len({measured["sha256"] for runs in rounds.values() for measured in runs}) > 1:
        raise UserError("preprocess and the encoder gave different ids: this is a bug, please report it")
    found = {"bytes": path.stat().st_size, "rounds": rounds, "hugging_face": hugging_face_rate(path, tokenizer)}
    large = make_corpus(folder / "large.jsonl", arguments.memory_gigabytes)
    found["memory"] = in_process("preprocess", large, tokenizer, folder, sampled=True)["memory"]
    found["memory"]["bytes"] = large.stat().st_size
    return found | {"figures": figures(found)}


def check_room(arguments: argparse.Namespace, folder: Path) -> None:
    """UserError for sizes that are none, or that this machine has no room for: it would time swapping and reads."""
    if min(arguments.gigabytes, arguments.memory_gigabytes, arguments.rounds) <= 0:
        raise UserError("--gigabytes, --memory_gigabytes and --rounds have to be above zero")
    made, timed = arguments.gigabytes, arguments.gigabytes
    if arguments.jsonl:
        if not arguments.jsonl.is_file():
            raise UserError(f"--jsonl {arguments.jsonl} is not a file")
        made, timed = 0.0, arguments.jsonl.stat().st_size / 1e9
    memory = (ENCODER_MEMORY + 1) * timed
    disk = made + arguments.memory_gigabytes + OUTPUT_SHARE * max(timed, arguments.memory_gigabytes)
    available, free = psutil.virtual_memory().available / 1e9, shutil.disk_usage(folder).free / 1e9
    if memory > available or disk > free:
        raise UserError(
            f"this machine has no room for it: timing the encoder alone on {timed:g} GB takes {memory:g} GB of memory "
            f"({available:.1f} GB available), and all files {disk:g} GB of disk in {folder} ({free:.1f} GB free); "
            "choose a smaller --gigabytes or --memory_gigabytes, or another --directory"
        )


def figures(found: dict) -> list[dict]:
    rates = {
        (name, call): [measured["rates"][call] for measured in runs]
        for name, runs in found["rounds"].items()
        for call in runs[0]["rates"]
    }
    median = {key: statistics.median(values) for key, values in rates.items()}

    def text(name: str, call: str) -> str:
        """Median and range of the rounds."""
        low, middle, high = (
            f"{rate / 1e6:,.0f}" for rate in (min(rates[name, call]), median[name, call], max(rates[name, call]))
        )
        return f"{middle} MB/s ({low} to {high})"

    def row(figure: str, asked: str, measured: str, met: bool | None = None) -> dict:
        return {"figure": figure, "asked": asked, "measured": measured, "met": met}

    size, large = (f"{num_bytes / 1e9:.1f} GB of jsonl" for num_bytes in (found["bytes"], found["memory"]["bytes"]))
    share, of_first = (median["preprocess", "whole"] / median["encoder", call] for call in ("warm", "first"))
    peak = found["memory"]["pss"]
    return [
        row(f"{size}, the encoder alone, its first call", "", text("encoder", "first")),
        row(f"{size}, the encoder alone, warm", "", text("encoder", "warm")),
        row(f"{size} to token files, the whole call", "", text("preprocess", "whole")),
        row("  of the encoder's warm rate", f">= {SHARE_OF_ENCODER:.0%}", f"{share:.1%}", share >= SHARE_OF_ENCODER),
        row("  of the encoder's first call", "", f"{of_first:.1%}"),
        row("Hugging Face tokenizers, a sample of its text", "", f"{found['hugging_face'] / 1e6:,.1f} MB/s"),
        row(
            f"{large} to token files, peak memory",
            "< 1 GB",
            f"{peak / 1e6:,.0f} MB in {found['memory']['processes']} processes",
            peak < PEAK_BYTES,
        ),
    ]


# --- what is read -----------------------------------------------------------------------------------------------------


def make_corpus(path: Path, gigabytes: float) -> Path:
    """Python sources of this machine, in a new order each time around, with a number in each record."""
    packages = {str(Path(module.__file__).parents[1]) for module in (np, psutil)}
    texts = [document.text for document in TextSource([PYTHON_STDLIB])]
    for package in packages:
        for file in sorted(Path(package).rglob("*.py")):
            try:
                texts.append(file.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError):
                continue
    texts = [text for text in texts if text.strip()]
    order, written, number = random.Random(0), 0, 0
    with open(path, "wb") as out:
        while written < gigabytes * 1e9:
            order.shuffle(texts)
            for text in texts:
                written += out.write(orjson.dumps({"id": number, "text": text}) + b"\n")
                number += 1
                if written >= gigabytes * 1e9:
                    break
    print(f"  {number:,} records, {written / 1e9:.2f} GB, of {len(texts):,} Python files", flush=True)
    return path


def some_texts(path: Path, num_bytes: int) -> list[str]:
    """The first texts of the file."""
    texts = []
    with open(path, "rb") as file:
        while file.tell() < num_bytes and (line := file.readline()):
            texts.append(orjson.loads(line)["text"])
    return texts


def train_tokenizer(path: Path, folder: Path) -> str:
    train_bpe(some_texts(path, TRAINING_BYTES), VOCAB_SIZE).save(folder)
    return str(folder)


# --- what is measured -------------------------------------------------------------------------------------------------


def in_process(name: str, path: Path, tokenizer: str, folder: Path, sampled: bool = False) -> dict:
    """Run one of MEASURED in a process of its own; with `sampled`, adds the peak memory of all its processes."""
    with open(path, "rb") as file:  # into the page cache
        while file.read(1 << 24):
            pass
    os.sync()  # what was written before is not to be waited for by an fsync that is timed
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, __file__, name, path, tokenizer, Path(out) / "tokens"]
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
            memory = sample_memory(process) if sampled else {}
            output = process.stdout.read()
    if process.returncode:
        raise UserError(f"the measurement of {name} ended with exit code {process.returncode}")
    found = json.loads(output)
    if "error" in found:
        raise UserError(found["error"])
    return found | {"memory": memory}


def sample_memory(process: subprocess.Popen) -> dict[str, int]:
    """Peaks of the memory of a process and all its children until it ends.

    pss: proportional, what they share counts once; uss: what each has for itself; both in bytes, with mapped pages.
    """
    watched, peaks = psutil.Process(process.pid), {"pss": 0, "uss": 0, "processes": 0}
    while process.poll() is None:
        now = dict.fromkeys(peaks, 0)
        for each in (watched, *children(watched)):
            try:
                used = each.memory_full_info()
            except psutil.Error:  # it has just ended
                continue
            now = {"pss": now["pss"] + used.pss, "uss": now["uss"] + used.uss, "processes": now["processes"] + 1}
        peaks = {key: max(peak, now[key]) for key, peak in peaks.items()}
        time.sleep(SAMPLE_SECONDS)
    return peaks


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def measure_encoder(path: Path, tokenizer: str, _out: Path) -> dict:
    """gigatoken on the file, twice; the digest is that of the ids with end-of-document tokens."""
    import gigatoken

    loaded = load_tokenizer(tokenizer)
    # Special tokens that a text spells are text to us, so the encoder must not know them.
    added = [token for token in loaded.json["added_tokens"] if not token["special"]]
    backend = gigatoken.Tokenizer.from_json(json.dumps({**loaded.json, "added_tokens": added}))
    rates = {}
    for call in ("first", "warm"):
        ids = None  # the memory of the first call
        start = time.perf_counter()
        ids = backend.encode_files(gigatoken.JsonlFileSource([str(path)], "text"))
        rates[call] = path.stat().st_size / (time.perf_counter() - start)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    digest = hashlib.sha256()
    offsets, content = ids.layout.offsets.data, ids.layout.content.data
    dtype = np.uint16 if loaded.vocab_size < 65_500 else np.int32
    end = np.array([loaded.eod_id], dtype) if loaded.eod_id is not None else np.array([], dtype)
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        digest.update(content[start:stop].astype(dtype))
        digest.update(end)
    return {"rates": rates, "sha256": digest.hexdigest(), "peak_rss": peak}


def measure_preprocess(path: Path, tokenizer: str, out: Path) -> dict:
    """`preprocess` as a command calls it, all of it."""
    loaded = load_tokenizer(tokenizer)
    start = time.perf_counter()
    manifests = preprocess(TextSource([path]), loaded, out)
    rate = path.stat().st_size / (time.perf_counter() - start)
    return {"rates": {"whole": rate}, "sha256": manifests[str(out)]["bin_sha256"]}


def hugging_face_rate(path: Path, tokenizer: str) -> float:
    """Bytes of text per second of the tokenizers library, on all cores."""
    texts = some_texts(path, HUGGING_FACE_BYTES)
    encoder = choose_encoder(load_tokenizer(tokenizer), "huggingface").encoder
    start = time.perf_counter()
    encoder.encode(texts)
    return sum(len(text.encode()) for text in texts) / (time.perf_counter() - start)


MEASURED = {"encoder": measure_encoder, "preprocess": measure_preprocess}

if __name__ == "__main__":
    name, path, tokenizer, out = sys.argv[1:]
    try:
        found = MEASURED[name](Path(path), tokenizer, Path(out))
    except UserError as error:
        found = {"error": str(error)}
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # without taking gigabytes of ids down piece by piece
