#!/usr/bin/env python3
"""What the engine and the loop cost: tokens/s of launch/pretrain.py against a bare PyTorch loop.

The bare loop has the same model, initial weights, batches, clipping and fused AdamW in fp32, and nothing else. Both run
as processes of their own, in turn; the ratio of the medians counts, since machines drift. The program's tokens/s is its
own (all of its time but evaluation and checkpoints), read from metrics.jsonl; the first interval is left out of both.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megaslm.commands import run_command
from megaslm.config import RunConfig, load_run_config
from megaslm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
# About 10M parameters, whose step takes a fraction of a second on two cores.
SHAPE = ["data.input=python-stdlib", "data.seq_length=256", "train.micro_batch_size=4", "train.global_batch_size=4"]
QUIET = ["eval.interval=0", "eval.max_sequences=4", "eval.sample_tokens=0", "checkpoint.interval=0"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="slm_tiny", help="of the model and the batch (slm_tiny)")
    parser.add_argument(
        "--ds_config",
        nargs="+",
        default=[str(ROOT / f"ds_configs/zero{n}.json") for n in (0, 2)],
        help="engine configs (zero0 and zero2 of ds_configs)",
    )
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (40)")
    parser.add_argument("--interval", type=int, default=5, help="steps of one measurement")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument("--bare", action="store_true", help="run the bare loop alone and print its tokens/s")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the preset")
    return parser.parse_intermixed_args()


def bare_loop(run: RunConfig, interval: int) -> list[float]:
    """tokens/s of each interval of the plainest loop that makes the same updates."""
    import torch

    from megaslm.model import build_model
    from megaslm.training import build_optimizer, prepare_data

    run, data = prepare_data(run, say=lambda line: None)
    model = build_model(run.model, run.train.seed)
    optimizer = build_optimizer(model, run.optimizer, offload=False)
    rates, started = [], time.perf_counter()
    for step in range(run.train.max_steps):
        batch = data.training.batch(step * run.train.global_batch_size, run.train.global_batch_size)
        window = torch.from_numpy(batch.tokens.astype("int64"))
        positions = None if batch.positions is None else torch.from_numpy(batch.positions)
        objective, _ = model(window[:, :-1], window[:, 1:], positions)
        (objective / run.tokens_per_step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % interval == 0:
            now = time.perf_counter()
            rates.append(interval * run.tokens_per_step / (now - started))
            started = now
    return rates


def run_process(command: list[str]) -> str:
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{result.stderr.strip()}")
    return result.stdout


def program_rates(arguments: argparse.Namespace, ds_config: str, overrides: list[str]) -> list[float]:
    """tokens/s of each interval of the program."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(ROOT / "launch/pretrain.py"), "--preset", arguments.preset, "--ds_config", ds_config]
        run_process([*command, "--run_dir", f"{folder}/run", *overrides, *QUIET])
        records = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
    return [record["tokens_per_s"] for record in records if record["kind"] == "train"]


def main() -> None:
    arguments = parse_arguments()
    overrides = [*SHAPE, "train.precision=fp32", *arguments.overrides]
    overrides += [f"train.max_steps={arguments.steps}", f"logging.interval={arguments.interval}"]
    if arguments.bare:
        print(json.dumps(bare_loop(load_run_config(arguments.preset, overrides), arguments.interval)))
        return
    bare_command = [__file__, "--bare", "--preset", arguments.preset, "--steps", str(arguments.steps)]
    bare_command += ["--interval", str(arguments.interval), *arguments.overrides]
    rates = {"bare loop": [], **{Path(path).stem: [] for path in arguments.ds_config}}
    for _ in range(arguments.repeats):
        rates["bare loop"] += json.loads(run_process(bare_command).splitlines()[-1])[1:]
        for path in arguments.ds_config:
            rates[Path(path).stem] += program_rates(arguments, path, overrides)[1:]
    bare = statistics.median(rates["bare loop"])
    print(f"{arguments.preset}, fp32, {arguments.repeats} x {arguments.steps} steps, median tokens/s")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"  {name:<10} {median:>10,.0f}  {median / bare:6.1%} of the bare loop")


if __name__ == "__main__":
    run_command(main)
