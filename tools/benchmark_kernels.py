#!/usr/bin/env python3
"""What the fused kernels cost, next to PyTorch, torch.compile, Liger and apex, and to a copy of the same bytes.

    python tools/benchmark_kernels.py --output benchmarks/kernels_h200

Per op, shape, direction and implementation: device time of one call (median of several, and the distance of their
quartiles), bytes per second, of the fewest bytes that the op can move, as a percentage of a copy of as many; for
linear_cross_entropy FLOP/s, as a percentage of its bare matrix products; host time of a call, host and device time
of a call when several follow one another, and the peak of device memory over inputs and upstream gradients. Every
implementation is first compared with the reference, and not timed where it is wrong.

forward is the one of training, with what it saves (of the losses the one of evaluation); both is forward and backward.
On a machine without a GPU the same runs on the CPU at small shapes. Writes FOLDER/kernels.json, after every shape, and
FOLDER/roofline.png. Exit code 1: one of our own ops is wrong or failed, or the device did, which ends the run.

What takes longest, torch.compile and linear_cross_entropy, is measured at fewer shapes than the rest: left_out, in the
JSON and at the end of the table, says what is missing; --full measures that too, in several times the time.
"""

import argparse
import platform
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# No more of megaslm than this, so that it runs where only torch and triton are installed.
from megaslm.commands import run_command
from megaslm.errors import UserError
from megaslm.reports import write_json

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

# Every shape, and the fewer ones of a run without --full, where the command names none.
FULL = {
    "cpu": {"widths": [512], "tokens": [256], "head_sizes": [64], "vocab_sizes": [1000]},
    "cuda": {
        "widths": [512, 768, 1024, 1536, 2048, 3072, 4096], "tokens": [16384, 32768, 4096], "head_sizes": [64, 128],
        "vocab_sizes": [50304, 32000],
    },
}  # fmt: skip
DEFAULTS = {
    "cpu": {},
    "cuda": {
        "linear_widths": [768, 1024, 2048], "compile_widths": [768, 1024, 2048, 4096], "compile_tokens": [16384],
    },
}  # fmt: skip
QUICK = {
    "cpu": {"widths": [128], "tokens": [64]},
    "cuda": {
        "widths": [1024, 4096], "linear_widths": [1024], "tokens": [16384], "head_sizes": [64], "vocab_sizes": [50304],
        "compile_widths": [1024],
    },
}  # fmt: skip
# Sizes of some only, and the option that holds those of all.
PARTS = {"linear_widths": "widths", "compile_widths": "widths", "compile_tokens": "tokens"}
# Who reads an option that not all do: an option that nobody reads is a mistake of the user's.
READERS = {
    "head_sizes": ("ops", ("rotary", "qk_norm_rotary")),
    "vocab_sizes": ("ops", ("cross_entropy", "linear_cross_entropy")),
    "linear_widths": ("ops", ("linear_cross_entropy",)),
    "compile_widths": ("backends", ("compile",)),
    "compile_tokens": ("backends", ("compile",)),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", metavar="OP", help="all by default")
    parser.add_argument("--widths", nargs="+", type=int, help="of the model; the vocabulary of cross_entropy is below")
    parser.add_argument("--tokens", nargs="+", type=int, help="rows of a call")
    parser.add_argument("--head_sizes", nargs="+", type=int, help="of rotary and qk_norm_rotary")
    parser.add_argument("--vocab_sizes", nargs="+", type=int, help="of the losses")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="all by default")
    parser.add_argument(
        "--compile_widths", nargs="+", type=int, help="of torch.compile (--widths, or fewer by default)"
    )
    parser.add_argument("--compile_tokens", nargs="+", type=int, help="likewise")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="fewer shapes where they are not given")
    extent.add_argument(
        "--full",
        action="store_true",
        help=f"""every shape where they are not given; without it, on a
        GPU, linear_cross_entropy is measured at widths {listed(DEFAULTS["cuda"]["linear_widths"])} and torch.compile
        at widths {listed(DEFAULTS["cuda"]["compile_widths"])} of {listed(DEFAULTS["cuda"]["compile_tokens"])} tokens
        only, the rest at widths {listed(FULL["cuda"]["widths"])} of {listed(FULL["cuda"]["tokens"])} tokens""",
    )
    parser.add_argument("--limit_seconds", type=float, default=float("inf"), help="start no further shape after that")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/benchmark_kernels"),
        metavar="FOLDER",
        help="where the JSON and the picture go (runs/benchmark_kernels)",
    )
    return parser.parse_args()


def complete(arguments: argparse.Namespace, device_type: str, ops: list[str], backends: list[str]) -> None:
    """Fill in what the command does not name, and left_out. Raises UserError for what cannot be measured or would be
    ignored."""
    for option, known in (("ops", ops), ("backends", backends)):
        given = getattr(arguments, option) or known
        unknown = [name for name in given if name not in known]
        if unknown:
            raise UserError(f"--{option}: {', '.join(unknown)} is not one of {', '.join(known)}")
        setattr(arguments, option, given)
    arguments.linear_widths = None
    unread = [o for o, (where, readers) in READERS.items() if not set(readers) & set(getattr(arguments, where))]
    for option in unread:
        if getattr(arguments, option):
            where, readers = READERS[option]
            raise UserError(f"--{option} is for {' and '.join(readers)}: add one to --{where} or leave it out")
    choose_sizes(arguments, device_type, unread)
    arguments.dtype = arguments.dtype or ("bf16" if device_type == "cuda" else "fp32")
    if {"rotary", "qk_norm_rotary"} & set(arguments.ops):
        for size in arguments.head_sizes:
            odd = [width for width in arguments.widths if size % 2 or width % size]
            if odd:
                raise UserError(f"--head_sizes: {size} is odd or does not divide the width {odd[0]}")


def choose_sizes(arguments: argparse.Namespace, device_type: str, unread: list[str]) -> None:
    """Those that the command does not name; what a run with --full would add to them goes to left_out.

    unread: options that nobody reads in this run.
    """
    asked = {option: getattr(arguments, option) for option in (*FULL[device_type], *PARTS)}
    every = {option: asked[option] or sizes for option, sizes in FULL[device_type].items()}
    every |= {part: asked[part] or every[option] for part, option in PARTS.items()}
    few = {} if arguments.full else QUICK[device_type] if arguments.quick else DEFAULTS[device_type]
    for option in FULL[device_type]:
        setattr(arguments, option, asked[option] or few.get(option, every[option]))
    for part, option in PARTS.items():
        whole = getattr(arguments, option)
        if extra := set(asked[part] or ()) - set(whole):
            raise UserError(f"--{part}: {min(extra)} is not among the --{option}")
        # What is asked for of all is measured by all.
        setattr(arguments, part, asked[part] or (whole if asked[option] else few.get(part, whole)))
    arguments.left_out = {}
    for option, sizes in every.items():
        if min(sizes) < 1:
            raise UserError(f"--{option}: {min(sizes)} is below 1")
        missing = sorted(set(sizes) - set(getattr(arguments, option)))
        if missing and option not in unread:
            arguments.left_out[option] = missing


def listed(values: list[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def select_cases(arguments: argparse.Namespace) -> list:
    """Those of the first number of tokens come first: a run that is stopped has them complete."""
    import torch
    from kernel_cases import CASES

    dtype = getattr(torch, DTYPES[arguments.dtype])
    cases = []
    for tokens in arguments.tokens:
        for op in arguments.ops:
            if op == "cross_entropy":
                shapes = [(vocab,) for vocab in arguments.vocab_sizes]
                fields = ("width",)
            elif op == "linear_cross_entropy":
                shapes = [(width, vocab) for width in arguments.linear_widths for vocab in arguments.vocab_sizes]
                fields = ("width", "vocab")
            elif "rotary" in op:
                shapes = [(width, size) for width in arguments.widths for size in arguments.head_sizes]
                fields = ("width", "head_size")
            else:
                shapes, fields = [(width,) for width in arguments.widths], ("width",)
            cases += [
                CASES[op](tokens=tokens, dtype=dtype, **dict(zip(fields, shape, strict=True))) for shape in shapes
            ]
    return cases


def compiles(arguments: argparse.Namespace, case) -> bool:
    return case.tokens in arguments.compile_tokens and (
        case.op == "cross_entropy" or case.width in arguments.compile_widths
    )


def device_facts(device) -> dict:
    """Device, driver and versions: whatever may change a figure."""
    import torch

    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "liger-kernel", "apex"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    if device.type == "cuda":
        driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        facts = {"device": torch.cuda.get_device_name(device), "driver": driver and driver.splitlines()[0]}
    else:
        facts = {"device": f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)", "driver": None}
    return facts | {
        "versions": versions,
        "platform": platform.platform(),
        "commit": output_of(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]),
        "command": sys.argv,
    }


def output_of(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> int:
    arguments = parse_arguments()
    started = time.monotonic()
    import torch
    from kernel_cases import CASES, IMPLEMENTATIONS
    from kernel_report import HEADER, draw_roofline, line, summary
    from kernel_timing import Benchmark, CudaTimer, HostTimer

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    complete(arguments, device.type, list(CASES), list(IMPLEMENTATIONS))
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {arguments.output}: {error.strerror}") from error
    cases = select_cases(arguments)
    timer = (CudaTimer if device.type == "cuda" else HostTimer)(device)
    benchmark = Benchmark(arguments.backends, partial(compiles, arguments), timer, started + arguments.limit_seconds)
    facts = device_facts(device) | {"dtype": arguments.dtype} | benchmark.roofs(getattr(torch, DTYPES[arguments.dtype]))
    report = facts | {"left_out": arguments.left_out, "cases_left": len(cases), "fault": None}
    report |= {"absent": benchmark.absent, "rows": []}
    print(f"{facts['device']}: copy {facts['copy_gb_per_s']:,.0f} GB/s, "
          f"matrix product {facts['products_tflop_per_s']:,.1f} TFLOP/s, {arguments.dtype}\n{HEADER}")  # fmt: skip
    for done, case in enumerate(cases, start=1):
        if benchmark.fault or benchmark.out_of_time():
            break
        rows = benchmark.rows_of(case)
        report["rows"] += rows
        report |= {"cases_left": len(cases) - done, "fault": benchmark.fault}
        write_json(arguments.output / "kernels.json", report)
        for row in rows:
            print(line(row), flush=True)
    write_json(arguments.output / "kernels.json", report)
    draw_roofline(report, arguments.output / "roofline.png")
    print("\n".join(["", *summary(report["rows"])]))
    for name, reasons in benchmark.absent.items():
        print(f"absent: {name}: " + "; ".join(f"{reason} ({', '.join(ops)})" for reason, ops in reasons.items()))
    for option, sizes in arguments.left_out.items():
        print(f"left out without --full: {option} {listed(sizes)}")
    left = f"{report['cases_left']} of {len(cases)} cases are not measured"
    if benchmark.fault:
        print(f"stopped, the device is lost to this process: {benchmark.fault}; {left}", file=sys.stderr)
        return 1
    if report["cases_left"]:
        print(f"stopped at --limit_seconds: {left}")
    return int(any(row["implementation"] == "triton" and row["status"] != "ok" for row in report["rows"]))


if __name__ == "__main__":
    run_command(main)
