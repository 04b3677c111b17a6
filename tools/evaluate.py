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
import sys
from typing import Any

from megaslm.checkpoint import ModelSource, open_model
from megaslm.commands import interrupt_on_termination, run_command
from megaslm.errors import UserError
from megaslm.evaluation import (
    EvaluationSet,
    HarnessTasks,
    LossSums,
    Windows,
    choose_placement,
    open_sets,
    own_validation,
    task_rows,
)
from megaslm.model import DTYPES, LanguageModel, count_parameters
from megaslm.reports import check_folder_of, table, write_json

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
        given = getattr(arguments, option) not in (None, False)
        if given and all(getattr(arguments, name) is None for name in needed):
            whose = " or ".join(f"--{name}" for name in needed)
            raise UserError(f"--{option} is of {whose}: give that too, or leave --{option} out")
    if arguments.max_sequences is not None and arguments.tasks and not (arguments.data or arguments.text):
        raise UserError("--max_sequences is not of --tasks, whose documents --limit counts: leave it out")
    least = {"seq_length": 1, "stride": 1, "max_sequences": 1, "batch_size": 1, "limit": 1, "num_fewshot": 0}
    for option, low in least.items():
        value = getattr(arguments, option)
        if value is not None and value < low:
            raise UserError(f"--{option} {value}: give {low} or more")
    if arguments.json is not None:
        check_folder_of(arguments.json, "--json")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    interrupt_on_termination()
    placement = choose_placement(arguments.device, arguments.dtype)
    source = open_model(arguments.model, arguments.tokenizer)
    # What is asked is opened before the work: mistakes are told at once.
    sets, tasks = open_evaluation(arguments, source)
    model = source.build(placement.device, placement.dtype, placement.ops)
    results = {
        "model": {"path": str(source.path), "kind": source.kind, "parameters": count_parameters(source.config)},
        "arithmetic": str(placement),
        "options": {name: value for name, value in vars(arguments).items() if name not in ("model", "json")},
    }
    print(f"{source.path}: {results['model']['parameters']:,} parameters, {placement}", flush=True)
    if sets:
        evaluate_sets(arguments, model, source, sets, results)
    if tasks:
        results["tasks"] = tasks.run(
            model, source.tokenizer, eod_ids=source.eod_ids, limit=arguments.limit, batch_size=arguments.batch_size
        )
        header = ["task", "metric", "filter", "examples", "value", "standard error"]
        print("\n".join(table(header, task_rows(results["tasks"]), "<<<>>>")))
        keep(arguments, results)


def open_evaluation(arguments: argparse.Namespace, source: ModelSource) -> tuple[list[EvaluationSet], Any]:
    """The sets and the tasks that are asked for."""
    data, text, names = arguments.data or [], arguments.text or [], arguments.tasks
    if names is not None and source.tokenizer is None:
        raise UserError(f"{arguments.model} has no tokenizer, which tasks need: --tokenizer DIR")
    tasks = None
    if names is not None:
        names = [name.strip() for name in names.split(",")]
        tasks = HarnessTasks(names, include_path=arguments.include_path, num_fewshot=arguments.num_fewshot)
    elif not (data or text):
        return own_validation(source, arguments.max_sequences), None
    windows = Windows(
        arguments.seq_length or source.config.context_length,
        stride=arguments.stride,
        split=arguments.split,
        mask_documents=arguments.mask_documents,
        text_key=arguments.text_key or "text",
        max_sequences=arguments.max_sequences,
    )
    return open_sets(source, data, text, windows), tasks


def evaluate_sets(
    arguments: argparse.Namespace,
    model: LanguageModel,
    source: ModelSource,
    sets: list[EvaluationSet],
    results: dict[str, Any],
) -> None:
    """One after the other: what is finished is on the terminal and in the file."""
    from tqdm import tqdm

    width = max(len(name) for name in ["data", "together", *(one.name for one in sets)])
    layout = f"{{:<{width}}}  {{:>8}}  {{:>12}}  {{:>9}}  {{:>15}}  {{:>15}}  {{:>9}}"
    found: dict[str, LossSums] = {}

    def say(*cells: str) -> None:
        tqdm.write(layout.format(*cells).rstrip())
        sys.stdout.flush()

    with tqdm(unit=" windows", disable=None, leave=False) as bar:  # None: on a terminal alone
        say("data", "loss", "perplexity", "bits/byte", "targets", "bytes", "tokens/s")
        for one in sets:
            found[one.name] = one.evaluate(model, source.tokenizer, arguments.batch_size, bar.update)
            overall = functools.reduce(operator.add, found.values())
            results["sets"] = {name: sums.record() for name, sums in found.items()}
            results["overall"] = overall.record()
            keep(arguments, results)
            say(*loss_row(one.name, found[one.name]))
        if len(found) > 1:
            say(*loss_row("together", overall))


def keep(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    if arguments.json:
        write_json(arguments.json, results)


def loss_row(name: str, sums: LossSums) -> list[str]:
    mean, num_bytes = sums.mean, f"{sums.num_bytes:,}" if sums.num_bytes else "-"
    bits = "-" if mean.bits_per_byte is None else f"{mean.bits_per_byte:.4f}"
    rate = f"{sums.tokens / sums.seconds:,.0f}"
    return [name, f"{mean.loss:.4f}", f"{mean.perplexity:,.2f}", bits, f"{mean.targets:,}", num_bytes, rate]


if __name__ == "__main__":
    run_command(main)
