#!/usr/bin/env python3
"""Pretrain a language model: `deepspeed launch/pretrain.py --preset NAME --ds_config FILE [section.key=value ...]`.

The preset says what to train, the engine config how. Under `deepspeed` or `torchrun` it uses every rank it is given;
`python launch/pretrain.py` runs as one. The same command continues an interrupted run.
"""

import argparse
import os
from pathlib import Path

from megaslm.commands import run_command
from megaslm.config import (
    default_engine_config,
    describe_fields,
    list_presets,
    load_engine_config,
    load_run_config,
    to_json,
)
from megaslm.errors import UserError


def parse_arguments(arguments: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """Of the command line; `arguments`: of another command's, whose name is `prog`, as launch/start.py has them."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="quickstart", help="name of a preset or path of a run config (quickstart)")
    parser.add_argument("--ds_config", type=Path, help="engine config (as ds_configs/zero1.json: ZeRO-1, bf16)")
    parser.add_argument("--run_dir", type=Path, help="folder of the run (runs/NAME)")
    parser.add_argument(
        "--resume",
        choices=("auto", "never", "weights"),
        default="auto",
        help="auto: continue what --run_dir holds; never: refuse a folder that holds a run; "
        "weights: start a new run from the weights of --from",
    )
    parser.add_argument(
        "--from", dest="weights_from", type=Path, metavar="PATH", help="checkpoint or run folder for --resume weights"
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--help_config", action="store_true", help="print the manual of all config fields and stop")
    parser.add_argument("--list_presets", action="store_true", help="print the presets and stop")
    parser.add_argument("--dry_run", action="store_true", help="build everything, run one step, report and stop")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the preset")
    parsed = parser.parse_intermixed_args(arguments)
    if (parsed.resume == "weights") != (parsed.weights_from is not None):
        raise UserError(
            "--resume weights and --from CHECKPOINT_OR_RUN_FOLDER belong together: a new run, in a --run_dir of its "
            "own, from the weights of another one"
        )
    return parsed


def print_presets() -> None:
    """A line each: name, true parameter count (where the vocabulary is known before the data), description."""
    from megaslm.model import count_parameters
    from megaslm.training import format_count

    for name, description in list_presets().items():
        run = load_run_config(name)
        vocab_size = run.expected_vocab_size
        size = "-"
        if vocab_size is not None:
            size = format_count(count_parameters(run.model.model_copy(update={"vocab_size": vocab_size})))
        print(f"{name:<18} {size:>6}  {description}")


def main() -> None:
    arguments = parse_arguments()
    is_first = os.environ.get("RANK", "0") == "0"
    if arguments.help_config or arguments.list_presets:
        if is_first:
            print(describe_fields()) if arguments.help_config else print_presets()
        return
    run = load_run_config(arguments.preset, arguments.overrides)
    engine_config = load_engine_config(arguments.ds_config) if arguments.ds_config else default_engine_config()
    if arguments.print_config:
        if is_first:
            print(to_json(run))
        return
    # Read when torch is imported. By default torch's OpenMP threads spin for long while they wait, so that beside any
    # other work a step takes several times as long; this is a compromise (docs/journal.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "6000")
    from megaslm.training import Options, train

    run_dir = arguments.run_dir or Path("runs") / run.name
    train(run, engine_config, Options(run_dir, arguments.resume, arguments.weights_from, arguments.dry_run))


if __name__ == "__main__":
    run_command(main)
