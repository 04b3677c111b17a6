"""Loss, perplexity and bits per byte of a model on token files and text, and tasks of lm-evaluation-harness.

    python tools/evaluate.py --model runs/x                          on the run's own validation data, as the run does
    python tools/evaluate.py --model EXPORT --data data/wiki data/code --stride 256
    python tools/evaluate.py --model runs/x --text notes/ corpus.jsonl
    python tools/evaluate.py --model EXPORT --tasks my_task --include_path tasks/

The model is a checkpoint, a run folder, a link such as lm_current, a Hugging Face folder or a name on its hub.

The loss is the mean over the target tokens, in nats. Token files are read in windows of --seq_length tokens, one after
the other: the first tokens of a window have little context. With --stride N below that, windows overlap and each target
is scored once, with seq_length - N tokens or more before it (but at the start of a file): slower, and nearer to what
the model can do. Bits per byte compare models with different tokenizers: all of the loss, in bits, over the UTF-8 bytes
of the text.
"""

import argparse
import functools
import operator
from collections.abc import Callable
from typing import Any

from megaslm.checkpoint import ModelSource, open_model
from megaslm.commands import run_command
from megaslm.config import recorded_run_config
from megaslm.data import ValidationData
from megaslm.errors import UserError
from megaslm.evaluation import DTYPES, LossSums, choose_placement, evaluate_text, evaluate_tokens, run_harness
from megaslm.model import LanguageModel, count_parameters
from megaslm.reports import check_folder_of, table, write_json
from megaslm.training import prepare_data

BATCH_SIZE = 8
# An option and what it is of: without that it would do nothing.
BELONGS_TO = {
    "split": ("data",),
    "text_key": ("text",),
    "seq_length": ("data", "text"),
    "stride": ("data", "text"),
    "mask_documents": ("data", "text"),
    "include_path": ("tasks",),
    "num_fewshot": ("tasks",),
    "limit": ("tasks",),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="a checkpoint, a run folder, an export or a hub name")
    add("--tokenizer", metavar="DIR", help="tokenizer folder or hub name (default: the model's)")
    add("--data", nargs="+", metavar="PREFIX", help="token files")
    add("--split", metavar="SHARES", help="read the second part of each token file alone, as a run does: 98,2")
    add("--text", nargs="+", metavar="INPUT", help="text: files, folders, globs, as of tools/preprocess_data.py")
    add("--text_key", metavar="KEY", help="field of a record (default: text)")
    add("--seq_length", type=int, metavar="N", help="tokens of a window (default: the model's context)")
    add("--stride", type=int, metavar="N", help="tokens from window to window (default: seq_length)")
    add("--mask_documents", action="store_true", help="no document sees the one before it")
    add("--max_sequences", type=int, metavar="N", help="the first N windows of each set alone")
    add("--tasks", metavar="NAMES", help="tasks of lm-evaluation-harness, with commas between them")
    add("--include_path", metavar="DIR", help="folder with YAML files of tasks of your own")
    add("--num_fewshot", type=int, metavar="N", help="examples before each question (default: what the task says)")
    add("--limit", type=int, metavar="N", help="the first N documents of each task alone")
    add("--batch_size", type=int, default=BATCH_SIZE, metavar="N", help=f"windows at a time (default: {BATCH_SIZE})")
    add("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--dtype", choices=DTYPES, default="fp32", help="arithmetic of the model (default: fp32)")
    add("--json", metavar="FILE", help="write the results to FILE too")
    arguments = parser.parse_args()
    for option, needed in BELONGS_TO.items():
        if getattr(arguments, option) not in (None, False) and not any(getattr(arguments, name) for name in needed):
            whose = " or ".join(f"--{name}" for name in needed)
            raise UserError(f"--{option} is of {whose}: give that too, or leave --{option} out")
    if arguments.max_sequences and arguments.tasks and not (arguments.data or arguments.text):
        raise UserError("--max_sequences is not of --tasks, whose documents --limit counts: leave it out")
    least = {"seq_length": 1, "stride": 1, "max_sequences": 1, "batch_size": 1, "limit": 1, "num_fewshot": 0}
    for option, low in least.items():
        value = getattr(arguments, option)
        if value is not None and value < low:
            raise UserError(f"--{option} {value}: give {low} or more")
    if arguments.json:
        check_folder_of(arguments.json, "--json")
    return arguments


def main() -> None:
    from tqdm import tqdm

    arguments = parse_arguments()
    placement = choose_placement(arguments.device, arguments.dtype)
    source = open_model(arguments.model, arguments.tokenizer)
    if (arguments.text or arguments.tasks) and source.tokenizer is None:
        raise UserError(f"{arguments.model} has no tokenizer, which text and tasks need: --tokenizer DIR")
    if not (arguments.data or arguments.text or arguments.tasks):
        data, arguments.max_sequences = own_validation(source, arguments.max_sequences)
    else:
        data = token_files(arguments, source)
    model = source.build(placement.device, placement.dtype, placement.ops)
    results = {
        "model": {"path": str(source.path), "kind": source.kind, "parameters": count_parameters(source.config)},
        "arithmetic": str(placement),
        "options": {name: value for name, value in vars(arguments).items() if name not in ("model", "json")},
    }
    print(f"{source.path}: {results['model']['parameters']:,} parameters, {placement}", flush=True)
    if data or arguments.text:
        with tqdm(unit=" windows", disable=None, leave=False) as bar:  # None: on a terminal alone
            sets = evaluate_sets(arguments, model, source, data, bar.update)
        overall = functools.reduce(operator.add, sets.values())
        results["sets"] = {name: sums.record() for name, sums in sets.items()}
        results["overall"] = overall.record()
        print("\n".join(loss_lines({**sets, "together": overall} if len(sets) > 1 else sets)), flush=True)
        if arguments.json:
            write_json(arguments.json, results)
    if arguments.tasks:
        results["tasks"] = evaluate_tasks(arguments, model, source)
        print("\n".join(task_lines(results["tasks"])))
        if arguments.json:
            write_json(arguments.json, results)


def token_files(arguments: argparse.Namespace, source: ModelSource) -> dict[str, ValidationData]:
    """Those of --data by their names."""
    return {
        prefix: ValidationData(
            [prefix],
            arguments.seq_length or source.config.context_length,
            split=arguments.split,
            vocab_size=source.config.vocab_size,
            tokenizer_fingerprint=source.tokenizer.fingerprint if source.tokenizer else None,
            mask_documents=arguments.mask_documents,
            stride=arguments.stride,
        )
        for prefix in arguments.data or []
    }


def own_validation(source: ModelSource, max_sequences: int | None) -> tuple[dict[str, ValidationData], int | None]:
    """What the run of a checkpoint evaluates itself on, and how many windows of each set."""
    if source.kind != "checkpoint" or "data" not in source.weights.run_config:
        raise UserError(f"{source.path} says nothing of data: give --data, --text or --tasks")
    run = recorded_run_config(source.weights.run_config, f"checkpoint {source.path}")
    _, data = prepare_data(run, print)
    return data.validation, max_sequences or run.eval.max_sequences


def evaluate_sets(
    arguments: argparse.Namespace,
    model: LanguageModel,
    source: ModelSource,
    data: dict[str, ValidationData],
    progress: Callable[[int], None],
) -> dict[str, LossSums]:
    """The token files in `data` and the text of --text."""
    common = {"max_sequences": arguments.max_sequences, "progress": progress}
    found = {
        name: evaluate_tokens(model, one, source.tokenizer, arguments.batch_size, **common)
        for name, one in data.items()
    }
    seq_length = arguments.seq_length or source.config.context_length
    for name in arguments.text or []:
        found[name] = evaluate_text(
            model,
            [name],
            source.tokenizer,
            arguments.batch_size,
            seq_length,
            stride=arguments.stride,
            mask_documents=arguments.mask_documents,
            text_key=arguments.text_key or "text",
            **common,
        )
    return found


def evaluate_tasks(arguments: argparse.Namespace, model: LanguageModel, source: ModelSource) -> dict[str, Any]:
    found = run_harness(
        model,
        source.tokenizer,
        [name.strip() for name in arguments.tasks.split(",")],
        include_path=arguments.include_path,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
    )
    return {key: found[key] for key in ("results", "groups", "n-shot", "n-samples", "versions") if key in found}


def loss_lines(sets: dict[str, LossSums]) -> list[str]:
    rows = []
    for name, sums in sets.items():
        mean, num_bytes = sums.mean, f"{sums.num_bytes:,}" if sums.num_bytes else "-"
        bits = "-" if mean.bits_per_byte is None else f"{mean.bits_per_byte:.4f}"
        rate = f"{sums.tokens / sums.seconds:,.0f}"
        rows.append([name, f"{mean.loss:.4f}", f"{mean.perplexity:,.2f}", bits, f"{mean.targets:,}", num_bytes, rate])
    return table(["data", "loss", "perplexity", "bits/byte", "targets", "bytes", "tokens/s"], rows, "<>>>>>>")


def task_lines(tasks: dict[str, Any]) -> list[str]:
    """Each metric of each task; lm-evaluation-harness names them METRIC,FILTER and METRIC_stderr,FILTER."""
    rows = []
    for task, metrics in tasks["results"].items():
        shots = str(tasks["n-shot"].get(task, "-"))
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            error = f"{error:.4f}" if isinstance(error, float) else "-"
            rows.append([task, metric, filtered, shots, f"{value:.4f}", error])
    return table(["task", "metric", "filter", "examples", "value", "standard error"], rows, "<<<>>>")


if __name__ == "__main__":
    run_command(main)
