#!/usr/bin/env python3
"""The figures of the data path: what is asked for, what is measured, and whether that is enough.

    python tools/benchmark_data.py                       # all sections
    python tools/benchmark_data.py --sections loader index --json figures.json

Sections: preprocess (jsonl to token files against the encoder alone, and peak memory), index (start-up on a simulated
index of a trillion tokens), loader (tokens/s from the page cache), coverage (every window of an epoch once). What is
compared is measured in one run, in turn. Files go to a temporary folder in --directory and are removed.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import benchmark_loader
import benchmark_preprocess

from megaslm.commands import run_command
from megaslm.errors import UserError

SECTIONS = {
    "preprocess": benchmark_preprocess.run,
    "index": benchmark_loader.run_index,
    "loader": benchmark_loader.run_loader,
    "coverage": benchmark_loader.run_coverage,
}
PACKAGES = ("numpy", "torch", "gigatoken", "tokenizers", "pyarrow", "zstandard")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(SECTIONS)
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME", help=f"of {names} (all)"
    )
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()), help="where the files go")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything measured there")
    benchmark_preprocess.add_arguments(parser)
    benchmark_loader.add_arguments(parser)
    return parser.parse_args()


def machine() -> dict:
    """Whatever may change a figure."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "command": sys.argv,
        "device": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "platform": platform.platform(),
        "versions": versions,
    }


def verdict(met: bool | None) -> str:
    return {None: "", True: "met", False: "MISSED"}[met]


def main() -> int:
    arguments = parse_arguments()
    report = machine() | {"sections": {}}
    print(f"{report['device']}, {report['cores']} cores, {report['memory_bytes'] / 2**30:.0f} GiB")
    try:
        folder = tempfile.TemporaryDirectory(dir=arguments.directory)
    except OSError as error:
        raise UserError(f"--directory {arguments.directory}: {error.strerror}") from error
    with folder as path:
        for section in arguments.sections:
            print(f"{section}:", flush=True)
            report["sections"][section] = SECTIONS[section](arguments, Path(path))
            for row in report["sections"][section]["figures"]:
                print(f"  {row['figure']:<58} {row['asked']:<20} {row['measured']:<44} {verdict(row['met'])}")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    missed = [row for section in report["sections"].values() for row in section["figures"] if row["met"] is False]
    print(f"{len(missed)} figures missed" if missed else "every figure is met")
    return int(bool(missed))


if __name__ == "__main__":
    run_command(main)
