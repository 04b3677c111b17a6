"""Sections of benchmark_data.py about reading token files: the start on a huge index, the loader, and exactly once."""

import argparse
import errno
import gc
import json
import os
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from megaslm.data import TokenFileWriter, TrainingData

PAGE_BYTES = resource.getpagesize()
IDX_HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("dtype", "u1"), ("sequences", "<u8"), ("bounds", "<u8")])
UINT16 = 8  # its code in an .idx
FEW_PAGES = 16
START_MS = 50
LOADER_TOKENS_PER_S = 80e6
SEQ_LENGTH, MICRO_BATCH = 2048, 32
ROUNDS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index_documents", type=float, default=1e9, help="of the simulated index (1e9)")
    parser.add_argument("--loader_gigabytes", type=float, default=1.25, help="size of the file that is read (1.25)")
    parser.add_argument("--loader_batches", type=int, default=3000, help="micro-batches of one measurement (3000)")


def figure(name: str, asked: str, measured: str, met: bool | None) -> dict:
    """A line of the table; `met` is None where no figure is asked for."""
    return {"figure": name, "asked": asked, "measured": measured, "met": met}


# --- index ------------------------------------------------------------------------------------------------------------


def write_sparse(prefix: Path, documents: int, tokens_each: int) -> int:
    """An index of equal documents and their tokens as sparse files: header, first and last entries, holes between.

    Returns the number of documents, which is smaller where the file system has no files of that size.
    """
    while True:
        sizes = {".bin": 2 * documents * tokens_each, ".idx": IDX_HEADER.itemsize + 20 * documents + 8}
        try:
            for suffix, size in sizes.items():
                with open(f"{prefix}{suffix}", "wb") as file:
                    file.truncate(size)
            break
        except OSError as error:
            if error.errno not in (errno.EFBIG, errno.EINVAL, errno.ENOSPC) or documents < 10:
                raise
            print(f"  files of {max(sizes.values()):,} bytes are refused here ({error.strerror}): a tenth of it")
            documents //= 10
    lengths, offsets, bounds = (IDX_HEADER.itemsize + at * documents for at in (0, 4, 12))
    with open(f"{prefix}.idx", "r+b") as file:

        def put(at: int, value, dtype: str) -> None:
            file.seek(at)
            file.write(np.array(value, dtype).tobytes())

        put(0, (b"MMIDIDX", 1, UINT16, documents, documents + 1), IDX_HEADER)
        for place in (0, documents - 1):
            put(lengths + 4 * place, tokens_each, "<i4")
            put(offsets + 8 * place, 2 * tokens_each * place, "<i8")
        put(bounds + 8 * documents, documents, "<i8")
        file.flush()
        os.fsync(file.fileno())
    return documents


def resident_pages(prefix: Path) -> int:
    """Pages of the files of `prefix` that are in this process's memory."""
    pages, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith((f"{prefix}.bin", f"{prefix}.idx"))
        elif inside and line.startswith("Rss:"):
            pages += int(line.split()[1]) * 1024 // PAGE_BYTES
    return pages


def open_once(prefix: Path, seed: int) -> dict[str, float]:
    """What it takes to open a file for training that no page of is in memory."""
    gc.collect()  # what was opened before is unmapped
    for suffix in (".bin", ".idx"):
        with open(f"{prefix}{suffix}", "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    data = TrainingData([(prefix, 1.0)], SEQ_LENGTH, seed)
    opened, after = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    pages = resident_pages(prefix)
    first_batch = time.perf_counter()
    data.batch(0, MICRO_BATCH)
    return {
        "ms": 1e3 * (opened - started),
        "page_faults": after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt,
        "pages": pages,
        "first_batch_ms": 1e3 * (time.perf_counter() - first_batch),
    }


def run_index(arguments: argparse.Namespace, folder: Path) -> dict:
    """Start-up on the simulated index against one of a thousand documents, in turn; medians, the first left out."""
    sizes = {"large": int(arguments.index_documents), "small": 1000}
    documents = {name: write_sparse(folder / name, size, 1000) for name, size in sizes.items()}
    rounds = {name: [] for name in sizes}
    gc.freeze()  # the collections between the rounds are to look at no more than these leave behind
    for number in range(2 * ROUNDS):
        for name in sizes:
            rounds[name].append(open_once(folder / name, number))
    gc.unfreeze()
    found = {
        name: {key: statistics.median(opened[key] for opened in values[1:]) for key in values[0]}
        for name, values in rounds.items()
    }
    large, small = found["large"], found["small"]
    size = f"{documents['large']:.0e} documents, {1000.0 * documents['large']:.0e} tokens"
    added = large["ms"] - small["ms"]
    # A page fault is a page that we touch; the kernel reads and maps those around it as well.
    faults = f"{large['page_faults']:.0f} (1,000 documents: {small['page_faults']:.0f})"
    return {
        "documents": documents,
        "medians": found,
        "figures": [
            figure(f"start-up added by {size}", f"< {START_MS} ms", f"{added:+.2f} ms", added < START_MS),
            figure("  opening it, no page in memory", "", f"{large['ms']:.2f} ms ({small['ms']:.2f} ms)", None),
            figure("  pages touched (page faults)", "a few", faults, large["page_faults"] <= FEW_PAGES),
            figure("  pages mapped, with those around them", "", f"{large['pages']:.0f} ({small['pages']:.0f})", None),
            figure("  first batch", "", f"{large['first_batch_ms']:.1f} ms ({small['first_batch_ms']:.1f} ms)", None),
        ],
    }


# --- loader -----------------------------------------------------------------------------------------------------------


def write_random(prefix: Path, num_tokens: int) -> None:
    """A token file of random ids in documents of 1 to 1,000 tokens, which stays in the page cache."""
    random = np.random.default_rng(0)
    with TokenFileWriter(prefix, 50_257) as writer:
        while writer.num_tokens < num_tokens:
            lengths = random.integers(1, 1001, 20_000)
            writer.extend_flat(random.integers(0, 50_257, lengths.sum(), np.uint16), lengths)
        writer.finish()


def take_batch(data: TrainingData, firsts: Iterator[int]) -> None:
    data.batch(next(firsts), MICRO_BATCH)


def rate(batches: int, take: Callable[[], object]) -> float:
    """tokens/s of taking so many micro-batches, one after another."""
    started = time.perf_counter()
    for _ in range(batches):
        take()
    return batches * MICRO_BATCH * SEQ_LENGTH / (time.perf_counter() - started)


def run_loader(arguments: argparse.Namespace, folder: Path) -> dict:
    """tokens/s of the batches themselves, and through the thread that reads ahead, as a run here would have them."""
    import torch

    from megaslm.config import BatchLayout
    from megaslm.parallel import init_distributed
    from megaslm.training import StepBatches

    write_random(folder / "random", int(arguments.loader_gigabytes * 1e9 / 2))
    ranks = init_distributed()
    samples = arguments.loader_batches * MICRO_BATCH
    kinds = {
        "windows": {},
        "windows, mask_documents": {"mask_documents": True},
        "megatron": {"order": "megatron", "num_samples": ROUNDS * samples},
    }
    opened = {kind: TrainingData([(folder / "random", 1.0)], SEQ_LENGTH, 0, **more) for kind, more in kinds.items()}
    rates: dict[str, dict[str, list[float]]] = {kind: {"batch()": [], "prefetched": []} for kind in kinds}
    for first in range(0, ROUNDS * samples, samples):
        for kind, data in opened.items():
            firsts = iter(range(first, first + samples, MICRO_BATCH))
            take = partial(take_batch, data, firsts)
            rates[kind]["batch()"].append(rate(arguments.loader_batches, take))
            # Steps of one micro-batch: what they wait for is nothing but the loader.
            with StepBatches(data, BatchLayout(MICRO_BATCH, 1), ranks, first, arguments.loader_batches) as batches:
                rates[kind]["prefetched"].append(rate(arguments.loader_batches, batches.next))
    figures = []
    for kind, by_way in rates.items():
        for way, values in by_way.items():
            median = statistics.median(values)
            asked = f">= {LOADER_TOKENS_PER_S / 1e6:.0f} M tokens/s" if kind == "windows" else ""
            spread = f"{min(values) / 1e6:,.0f} to {max(values) / 1e6:,.0f}"
            met = median >= LOADER_TOKENS_PER_S if asked else None
            figures.append(figure(f"{kind}, {way}", asked, f"{median / 1e6:,.0f} M tokens/s ({spread})", met))
    return {
        "gigabytes": arguments.loader_gigabytes,
        "seq_length": SEQ_LENGTH,
        "micro_batch_size": MICRO_BATCH,
        "device": str(ranks.device),
        "threads": torch.get_num_threads(),
        "tokens_per_s": rates,
        "figures": figures,
    }


# --- coverage ---------------------------------------------------------------------------------------------------------


def run_coverage(arguments: argparse.Namespace, folder: Path) -> dict:
    """An epoch under 1 to 8 data-parallel ranks, every step of it by a process that has just resumed there."""
    from megaslm.config import BatchLayout
    from megaslm.training import first_samples

    seq_length, micro, accumulation = 16, 5, 2
    layout = BatchLayout(micro, accumulation)
    with TokenFileWriter(folder / "places", 2**31) as writer:
        lengths = np.random.default_rng(0).integers(1, 200, 150)
        writer.extend_flat(np.arange(lengths.sum()), lengths)  # a token is its place
        writer.finish()

    def open_data() -> TrainingData:
        return TrainingData([(folder / "places", 1.0)], seq_length, seed=1)

    windows = open_data().samples_per_epoch
    figures = []
    for ranks in range(1, 9):
        state, places, steps = json.dumps(open_data().state()), [], 0
        for consumed in range(0, windows, micro * accumulation * ranks):
            data = open_data()
            data.load_state(json.loads(state), consumed)
            for rank in range(ranks):
                one = SimpleNamespace(data_parallel_rank=rank, data_parallel_size=ranks)
                for first in first_samples(consumed, layout, one):
                    tokens = data.batch(first, micro).tokens[: max(0, windows - first)]
                    assert (np.diff(tokens) == 1).all(), "a window is not one stretch of tokens"
                    places += tokens[:, 0].tolist()
            state, steps = json.dumps(data.state()), steps + 1
        once = len(places) == len(set(places)) == windows and set(np.diff(np.sort(places))) == {seq_length}
        measured = f"{len(set(places)):,} of {windows:,} in {len(places):,}, resumed at {steps:,} steps"
        figures.append(figure(f"windows of an epoch, {ranks} ranks", "each once", measured, once))
    return {"windows": windows, "figures": figures}
