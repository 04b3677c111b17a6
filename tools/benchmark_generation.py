#!/usr/bin/env python3
"""Tokens per second of generation, against transformers' generate on the same weights, in one run.

    python tools/benchmark_generation.py                                    slm_small, batches of 1 and of 8, fp32
    python tools/benchmark_generation.py model.num_layers=4 --batch_sizes 1 32
    python tools/benchmark_generation.py --model runs/x --batch_sizes 4 --new_tokens 256

Greedy, from prompts of random tokens, the computation of the prompt included. The weights are those of --model, or
random ones of the preset, spread so widely (model.init_std=0.1) that the texts do not repeat one token. For each batch
size both generate once, unmeasured: in fp32 the tokens must be equal (in other types the share that is equal is
printed: roundings decide between tokens that are nearly as probable). Then both are timed in turn, --rounds times.
Medians and their ratio are printed; --json FILE keeps them.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

from megaslm.commands import run_command
from megaslm.config import load_run_config, with_expected_vocabulary
from megaslm.errors import UserError
from megaslm.reports import check_folder_of, table, write_json

PRESET = "slm_small"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", help=f"of a model with random weights (default: {PRESET})")
    add("--model", metavar="PATH", help="a checkpoint, a run folder, an export or a hub name, in place of the preset")
    add("--batch_sizes", nargs="+", type=int, default=[1, 8], metavar="N", help="prompts at once (default: 1 8)")
    add("--prompt_tokens", type=int, default=48, metavar="N", help="tokens of a prompt (default: 48)")
    add("--new_tokens", type=int, default=128, metavar="N", help="tokens to generate for each (default: 128)")
    add("--rounds", type=int, default=5, metavar="N", help="times that each is timed (default: 5)")
    add("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="arithmetic (default: fp32)")
    add("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--threads", type=int, metavar="N", help="threads of the CPU (default: torch's)")
    add("--json", metavar="FILE", help="also write the figures there")
    add("overrides", nargs="*", metavar="model.key=value", help="of the preset")
    arguments = parser.parse_intermixed_args()
    sizes = {"rounds": arguments.rounds, "prompt_tokens": arguments.prompt_tokens, "new_tokens": arguments.new_tokens}
    for name, value in [
        *sizes.items(),
        ("threads", arguments.threads),
        *(("batch_sizes", n) for n in arguments.batch_sizes),
    ]:
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give 1 or more")
    of_preset = [f"--preset {arguments.preset}"] if arguments.preset else arguments.overrides
    if arguments.model and of_preset:
        raise UserError(f"{of_preset[0]} is of a preset, and --model is a model as it is; leave one out")
    if arguments.json:
        check_folder_of(arguments.json, "--json")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    import torch

    from megaslm.checkpoint import as_transformers
    from megaslm.evaluation import choose_placement
    from megaslm.generation import GenerationOptions, Generator

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    placement = choose_placement(arguments.device, arguments.dtype)
    ours, name = load_model(arguments, placement.ops)
    if arguments.prompt_tokens + arguments.new_tokens > ours.config.context_length:
        raise UserError(
            f"--prompt_tokens {arguments.prompt_tokens} and --new_tokens {arguments.new_tokens} are more than the "
            f"model's context of {ours.config.context_length}"
        )
    theirs = as_transformers(ours).to(placement.device, placement.dtype)
    ours = ours.to(placement.device, placement.dtype)
    generator, options = Generator(ours, None), GenerationOptions(max_new_tokens=arguments.new_tokens)

    def by_transformers(prompts: list[list[int]]) -> list[list[int]]:
        tokens = torch.tensor(prompts, device=placement.device)
        found = theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=arguments.new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return found[:, arguments.prompt_tokens :].tolist()

    def by_megaslm(prompts: list[list[int]]) -> list[list[int]]:
        return [list(one.tokens) for one in generator.generate(prompts, options)]

    print(f"{name}, {placement}, {torch.get_num_threads()} threads: {arguments.prompt_tokens} tokens of prompt, "
          f"{arguments.new_tokens} new ones, median of {arguments.rounds}", flush=True)  # fmt: skip
    draws = torch.Generator().manual_seed(0)
    results = []
    for batch_size in arguments.batch_sizes:
        shape = (batch_size, arguments.prompt_tokens)
        prompts = torch.randint(ours.config.vocab_size, shape, generator=draws).tolist()
        found, expected = by_megaslm(prompts), by_transformers(prompts)
        equal = equal_share(found, expected)
        if equal < 1 and arguments.dtype == "fp32":
            raise UserError(
                f"only {equal:.1%} of the tokens of a batch of {batch_size} are those of transformers; "
                f"{first_difference(theirs, prompts, found, expected)}"
            )
        seconds = measure({"megaslm": by_megaslm, "transformers": by_transformers}, prompts, arguments.rounds)
        results.append(figures_of(batch_size, arguments.new_tokens, seconds) | {"equal_tokens": equal})
    print("\n".join(lines(results)))
    if arguments.json:
        figures = {
            "environment": environment(placement.device),
            "model": name,
            "arithmetic": str(placement),
            "options": {key: value for key, value in vars(arguments).items() if key not in ("json", "model")},
            "results": results,
        }
        write_json(arguments.json, figures)


def load_model(arguments: argparse.Namespace, ops) -> tuple[Any, str]:
    """The network in fp32 on the CPU, in eval mode, and what to call it."""
    from megaslm.checkpoint import open_model
    from megaslm.model import build_model

    if arguments.model:
        source = open_model(arguments.model)
        return source.build(ops=ops), source.path.name
    run = load_run_config(arguments.preset or PRESET, ["model.init_std=0.1", *arguments.overrides])
    return build_model(with_expected_vocabulary(run).model, seed=0, ops=ops).eval(), run.name


def equal_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    pairs = [pair for rows in zip(ours, theirs, strict=True) for pair in zip(*rows, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def first_difference(theirs, prompts: list[list[int]], ours: list[list[int]], expected: list[list[int]]) -> str:
    """Where a text first differs, and by how much transformers' own logits tell the two tokens apart."""
    import torch

    row = next(row for row, pair in enumerate(zip(ours, expected, strict=True)) if pair[0] != pair[1])
    step = next(step for step, pair in enumerate(zip(ours[row], expected[row], strict=True)) if pair[0] != pair[1])
    tokens = torch.tensor([prompts[row] + expected[row][:step]], device=theirs.device)
    with torch.inference_mode():
        logits = theirs(tokens).logits[0, -1]
    gap = float(logits[expected[row][step]] - logits[ours[row][step]])
    return (
        f"in row {row + 1} the first other one is token {step + 1}, {ours[row][step]} for {expected[row][step]}, "
        f"whose logits are {gap:.2g} apart (of {float(logits.abs().max()):.2g}): below 1e-3 it is a tie that roundings "
        "decide, take other weights or fewer --new_tokens; above, one of the two computes another model"
    )


def measure(parts: dict[str, Callable], prompts: list[list[int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each part, by round, one after the other."""
    seconds = {name: [] for name in parts}
    for _ in range(rounds):
        for name, generate in parts.items():
            started = time.perf_counter()
            generate(prompts)  # gives the tokens to the host: all that was asked of a GPU is done
            seconds[name].append(time.perf_counter() - started)
    return seconds


def figures_of(batch_size: int, new_tokens: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "batch_size": batch_size,
        "tokens_per_s": {name: batch_size * new_tokens / median for name, median in medians.items()},
        "ms_per_step": {name: 1000 * median / new_tokens for name, median in medians.items()},
        "ratio": medians["transformers"] / medians["megaslm"],
        "seconds": seconds,
    }


def lines(results: list[dict[str, Any]]) -> list[str]:
    header = ["batch", "tokens/s", "transformers'", "ratio", "ms/step", "transformers'", "equal tokens"]
    rows = [
        [
            str(one["batch_size"]),
            *(f"{value:,.1f}" for value in one["tokens_per_s"].values()),
            f"{one['ratio']:.2f}",
            *(f"{value:.2f}" for value in one["ms_per_step"].values()),
            f"{one['equal_tokens']:.1%}",
        ]
        for one in results
    ]
    return table(header, rows, ">" * len(header))


def environment(device) -> dict[str, Any]:
    import torch

    from megaslm.checkpoint import load_transformers

    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": load_transformers().__version__,
    }


if __name__ == "__main__":
    run_command(main)
