#!/usr/bin/env python3
"""Plan a run before the GPUs are rented: does it fit, in which layout, how fast, how long, and what does it cost?

    python tools/plan.py --preset megaslm_1.2b --gpus 8 --gpu h200 --tokens 100B --price 2.5
    python tools/plan.py --preset megaslm_3b --gpus 8 --nodes 4 --gpu h100 data.seq_length=2048
    python tools/plan.py --preset slm_small --gpu cpu --gpus 1 --tokens 1M

Everything is by formula: nothing is built, no GPU is needed. Memory: the peak of a step, by part, for each ZeRO stage
and tensor-parallel size (megaslm/planning/memory.py has the formula, tools/benchmark_memory.py compares it with real
processes). Speed: measured where benchmarks/ has a result of this model on this GPU, else estimated from those of other
models, else assumed; the plan says which. Recommended is the smallest tensor-parallel size, then the lowest ZeRO stage,
then no recomputation, then the largest micro-batch that fits with a margin.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from megaslm.commands import run_command
from megaslm.config import RunConfig, load_engine_config, load_run_config, with_expected_vocabulary
from megaslm.errors import UserError
from megaslm.reports import check_folder_of, write_json

ROOT = Path(__file__).resolve().parents[1]
MOST_TOKENS = 10**18
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", required=True, help="name of a preset or path of a run config")
    add("--gpus", type=int, default=8, metavar="N", help="GPUs of a node, 1 to 8 (default: 8)")
    add("--nodes", type=int, default=1, metavar="N", help="equal nodes (default: 1)")
    add("--gpu", default="h200", metavar="NAME", help="h200, h100, ... (default: h200), or cpu: this machine")
    add("--tokens", metavar="N", help="length of the run, such as 100B or 500M (default: that of the preset)")
    add("--price", type=float, metavar="X", help="of a GPU and hour, for the cost of the run")
    add("--ds_config", type=Path, metavar="FILE", help="plan for this engine config (default: ZeRO-1, 2 and 3)")
    add("--json", metavar="FILE", help="also write the plan there")
    add("overrides", nargs="*", metavar="section.key=value", help="changes to the preset")
    arguments = parser.parse_intermixed_args()
    if not 1 <= arguments.gpus <= 8:
        raise UserError(f"--gpus {arguments.gpus}: give the GPUs of one node, 1 to 8; for more of them see --nodes")
    if arguments.nodes < 1:
        raise UserError(f"--nodes {arguments.nodes}: give 1 or more")
    if arguments.price is not None and not 0 <= arguments.price < float("inf"):
        raise UserError(f"--price {arguments.price}: give a price of 0 or more")
    if arguments.json:
        check_folder_of(arguments.json, "--json")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    run = with_expected_vocabulary(load_run_config(arguments.preset, arguments.overrides))
    tokens = parse_tokens(arguments.tokens) if arguments.tokens else tokens_of(run)
    from megaslm import planning

    is_here = arguments.gpu.lower() == planning.THIS_MACHINE
    if is_here and arguments.nodes > 1:
        raise UserError(f"--gpu {arguments.gpu} is this machine: --nodes {arguments.nodes} goes with GPUs alone")
    gpu = planning.this_machine(arguments.gpus) if is_here else planning.find_gpu(arguments.gpu)
    cluster = planning.Cluster(arguments.nodes, gpu, arguments.gpus)
    names = [arguments.ds_config] if arguments.ds_config else [ROOT / "ds_configs" / n for n in planning.ENGINE_FILES]
    engines: dict[str, dict[str, Any]] = {
        path.name if path.parent == ROOT / "ds_configs" else str(path): load_engine_config(path) for path in names
    }
    asked = any(one.startswith("train.activation_checkpointing=") for one in arguments.overrides)
    recompute = (run.train.activation_checkpointing,) if asked else (False, True)
    offload = None if arguments.ds_config else load_engine_config(ROOT / "ds_configs" / planning.OFFLOAD_FILE)
    request = planning.Request(run, cluster, engines, recompute)
    plan = planning.make_plan(request, tokens, offload, ROOT / "benchmarks")
    command = None
    if plan.best is not None:
        path = str(arguments.ds_config) if arguments.ds_config else f"ds_configs/{plan.best.engine}"
        command = planning.run_command_of(plan, arguments.preset, arguments.overrides, path)
    print("\n".join(planning.plan_lines(plan, arguments.price, command)))
    if arguments.json:
        write_json(arguments.json, planning.plan_json(plan, arguments.price, command))


def parse_tokens(text: str) -> int:
    """100B, 1.5T, 500M, 20K or a plain number, such as 2000000 or 2e6."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:E\+?\d{1,2})?)([KMBT]?)", text.upper())
    count = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if not 1 <= count <= MOST_TOKENS:
        raise UserError(f"--tokens {text}: give a number of tokens such as 100B, 1.5T, 500M or 2000000")
    return count


def tokens_of(run: RunConfig) -> int:
    """The length of the run by its config. UserError where its data alone would tell it."""
    if run.token_limit is None:
        raise UserError(f"the preset {run.name} counts in epochs of its data: give --tokens, such as --tokens 100B")
    return run.token_limit


if __name__ == "__main__":
    run_command(main)
