"""Is a model fit for use? Checks a checkpoint, a run or an export, and prints a table of what was found.

    python tools/validate_model.py runs/x
    python tools/validate_model.py EXPORT --text held_out.jsonl --max_perplexity 20 --json report.json

Checked: the files are as they were written; parameters and size are what the configuration says, within 10 %; it opens;
it computes what it did when it was saved; it generates; its perplexity on text is under a bound; for a Hugging Face
folder, transformers opens it and computes the same logits (--quick leaves that out). Measured: speed and memory.

The bound is --max_perplexity, else the size of the vocabulary: a model that does worse on a text than a uniform guess
has not learned its language, or is broken. Without --text or --data the text is a file of Python's standard library;
of a model with a character tokenizer, which may know nothing like it, the perplexity there need only be finite.

Exit codes: 0 all checks passed; 1 one did not; 2 a mistake in the command.
"""

import argparse
import textwrap

from megaslm.commands import interrupt_on_termination, run_command
from megaslm.evaluation import ValidationOptions, ValidationReport, validate_model
from megaslm.model import DTYPES
from megaslm.reports import check_folder_of, table, write_json

DEFAULTS = ValidationOptions()
WIDTH = 72  # of what was found, in the table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", metavar="PATH", help="a checkpoint, a run folder, an export or a hub name")
    add("--text", nargs="+", default=(), metavar="INPUT", help="text: files, folders, globs")
    add("--data", nargs="+", default=(), metavar="PREFIX", help="token files")
    add("--max_perplexity", type=float, metavar="X", help="the highest perplexity that passes")
    add(
        "--max_tokens",
        type=int,
        default=DEFAULTS.max_tokens,
        metavar="N",
        help="of each text and token file, read the windows of the model's context that N tokens fill, one at least "
        f"(default: {DEFAULTS.max_tokens})",
    )
    add("--tokenizer", metavar="DIR", help="tokenizer folder or hub name (default: the model's)")
    add("--quick", action="store_true", help="do not compare with transformers")
    add("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--dtype", choices=DTYPES, default=DEFAULTS.dtype, help=f"arithmetic (default: {DEFAULTS.dtype})")
    add("--json", metavar="FILE", help="write the report to FILE too")
    arguments = parser.parse_args()
    if arguments.json is not None:
        check_folder_of(arguments.json, "--json")
    return arguments


def main() -> int:
    arguments = vars(parse_arguments())
    path, json_path = arguments.pop("path"), arguments.pop("json")
    interrupt_on_termination()
    report = validate_model(path, ValidationOptions(**arguments))
    print("\n".join(report_lines(report)))
    if json_path:
        write_json(json_path, report.to_json())
    return 0 if report.passed else 1


def report_lines(report: ValidationReport) -> list[str]:
    rows = []
    for check in report.checks:
        verdict = {True: "pass", False: "FAIL", None: "-"}[check.passed]
        first, *more = textwrap.wrap(check.value, WIDTH) or [""]
        rows.append([check.name, verdict, first, check.expected])
        rows += [["", "", line, ""] for line in more]
    lines = [f"{report.path} ({report.kind}), {report.arithmetic}", ""]
    lines += table(["check", "", "found", "expected"], rows, "<<<<")
    failed = sum(check.passed is False for check in report.checks)
    return [*lines, "", "passed" if report.passed else f"FAILED: {failed} of {len(report.checks)} checks"]


if __name__ == "__main__":
    run_command(main)
