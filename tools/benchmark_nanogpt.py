#!/usr/bin/env python3
"""Time per step of the shakespeare_char preset against nanoGPT's own training script on the same text, on a CPU.

    git clone https://github.com/karpathy/nanoGPT && python nanoGPT/data/shakespeare_char/prepare.py
    python tools/benchmark_nanogpt.py --nanogpt nanoGPT

Both run as processes of their own, in turn, with nanoGPT's CPU recipe; the first 20 steps are left out, evaluation and
checkpoints do not count. Ratios are of one round: machines drift.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from megaslm.commands import run_command
from megaslm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = 20
RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=1 --eval_interval=1000000 "
    "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --lr_decay_iters=2000 "
    "--dropout=0.0"
).split()


def run_process(command: list, folder: Path | None = None) -> str:
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=folder)
    if result.returncode:
        raise UserError(f"{command[0]} failed:\n{result.stderr.strip()}")
    return result.stdout


def nanogpt_ms(checkout: Path, steps: int, folder: str) -> float:
    """Median ms per step of nanoGPT's train.py."""
    out = run_process(["train.py", *RECIPE, f"--max_iters={steps}", f"--out_dir={folder}/nanogpt"], checkout)
    return statistics.median([float(ms) for ms in re.findall(r"time ([\d.]+)ms", out)][LEFT_OUT:])


def megaslm_ms(text: Path, ds_config: str, steps: int, folder: str) -> float:
    """Median ms per step of launch/pretrain.py, over intervals of LEFT_OUT steps."""
    run_process(
        [ROOT / "launch/pretrain.py", "--preset", "shakespeare_char", "--ds_config", ds_config]
        + ["--run_dir", f"{folder}/{Path(ds_config).stem}", f"data.input={text}", f"data.build_dir={folder}/data"]
        + [f"train.max_steps={steps}", "schedule.horizon_steps=2000", f"logging.interval={LEFT_OUT}"]
        + ["eval.interval=0", "eval.max_sequences=12", "eval.sample_tokens=0", "checkpoint.interval=0"]
    )
    lines = Path(f"{folder}/{Path(ds_config).stem}/metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return statistics.median(record["ms_per_step"] for record in records[1:])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT with its data prepared")
    parser.add_argument(
        "--ds_config",
        nargs="+",
        default=[str(ROOT / f"ds_configs/zero{n}.json") for n in (0, 2)],
        help="engine configs (default: zero0 and zero2 of ds_configs)",
    )
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run (default: 200)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    text = (arguments.nanogpt / "data/shakespeare_char/input.txt").resolve()
    if not text.exists():
        raise UserError(f"no {text}: run data/shakespeare_char/prepare.py of the checkout first")
    ratios: dict[str, list[float]] = {Path(path).stem: [] for path in arguments.ds_config}
    for round_number in range(1, arguments.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            base = nanogpt_ms(arguments.nanogpt, arguments.steps, folder)
            line = f"round {round_number}: nanoGPT {base:.1f} ms"
            for path in arguments.ds_config:
                ours = megaslm_ms(text, path, arguments.steps, folder)
                ratios[Path(path).stem].append(ours / base)
                line += f", {Path(path).stem} {ours:.1f} ms ({ours / base:.3f})"
            print(line, flush=True)
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.3f} of nanoGPT's time per step (median of the rounds)")


if __name__ == "__main__":
    run_command(main)
