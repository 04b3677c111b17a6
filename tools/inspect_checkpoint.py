"""What is in a checkpoint, whether it is sound, and how two differ. Needs no GPU, and changes nothing.

    python tools/inspect_checkpoint.py runs/x/checkpoints/step_00001000    one checkpoint; a link such as lm_current too
    python tools/inspect_checkpoint.py runs/x                              a table of all checkpoints of a run
    python tools/inspect_checkpoint.py A B                                 how checkpoint B differs from checkpoint A

Two checkpoints are equal if everything is but the time of writing, the versions that wrote them, the seconds of
training (progress.seconds) and how the tensors are cut into files. Tensors are compared bit for bit, fingerprints
within their tolerance; these and tokenizers only where both have one.

With --json, numbers that are not finite are the strings "NaN", "Infinity" and "-Infinity".

Exit codes: 0 sound, or equal; 1 damaged, or different (as of diff); 2 a mistake in the command.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from megaslm.checkpoint import (
    CheckpointReport,
    Comparison,
    Contents,
    FolderReport,
    KindComparison,
    TensorStatistics,
    compare_checkpoints,
    inspect_path,
    report_json,
)
from megaslm.commands import run_command
from megaslm.errors import UserError
from megaslm.reports import table

SHOW = 10
VALUE_WIDTH = 60  # characters of a value of a config; --json prints all of it


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a checkpoint, a run folder, or two checkpoints")
    parser.add_argument("--tensors", action="store_true", help="statistics of every tensor (one checkpoint)")
    parser.add_argument("--quick", action="store_true", help="compare sizes of files only, not their hashes")
    parser.add_argument(
        "--show", type=int, metavar="N", help=f"list the N tensors of each kind that differ most (default: {SHOW})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if len(arguments.paths) > 2:
        raise UserError(f"{len(arguments.paths)} paths given; name one to look at, or two to compare")
    if len(arguments.paths) == 2 and arguments.tensors:
        raise UserError("--tensors is of one checkpoint; leave it out, or name one path")
    if len(arguments.paths) == 1 and arguments.show is not None:
        raise UserError("--show is of a comparison; leave it out, or name two checkpoints")
    if arguments.show is not None and arguments.show < 0:
        raise UserError(f"--show {arguments.show}: give 0 or more")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if len(arguments.paths) == 2:
        show = SHOW if arguments.show is None else arguments.show
        report = compare_checkpoints(*arguments.paths, quick=arguments.quick, show=show)
    else:
        report = inspect_path(arguments.paths[0], quick=arguments.quick, tensors=arguments.tensors)
    if arguments.json:
        print(report_json(report))
    else:
        lines = {CheckpointReport: checkpoint_lines, FolderReport: folder_lines, Comparison: comparison_lines}
        print("\n".join(lines[type(report)](report)))
    return 0 if report.passed else 1


def checkpoint_lines(report: CheckpointReport) -> list[str]:
    facts = [("checkpoint", report.path), ("step", count(report.step))]
    size_line = f"{size(report.bytes)} ({report.bytes:,} bytes)"
    if report.contents:
        facts += contents_facts(report.contents)
        size_line += f" in {len(report.files)} files of {plural(report.contents.ranks, 'rank')}"
    lines = [f"{name:<13}{value}" for name, value in [*facts, ("size", size_line)]]
    if report.tensors is not None:
        lines += ["", *tensor_lines(report.tensors)]
    if report.files:
        good = "right size" if report.quick else "sound"
        rows = [[f"{file.bytes:,}", file.name, "DAMAGED" if file.damage else good] for file in report.files]
        lines += ["", *table(["bytes", "file", "state"], rows, "><<")]
    if report.other_files:
        lines.append(f"not of the checkpoint: {', '.join(report.other_files)}")
    return [*lines, "", *verdict(report)]


def verdict(report: CheckpointReport) -> list[str]:
    """A word, and a line for every fault."""
    if report.damage:
        return ["DAMAGED", *(f"  {line}" for line in report.damage)]
    return ["sound as far as sizes tell (hashes not compared)" if report.quick else "sound"]


def contents_facts(contents: Contents) -> list[tuple[str, str]]:
    marks = [] if contents.validation_loss is None else [f"validation loss {contents.validation_loss:.4f} nats"]
    marks += [] if contents.epoch is None else [f"end of epoch {contents.epoch}"]
    facts = [
        ("written", f"{date(contents.written)} UTC"),
        ("format", f"version {contents.format_version}"),
        ("code", ", ".join(f"{package} {version}" for package, version in contents.code.items())),
        ("run", contents.run_name or "-"),
        ("consumed", f"{count(contents.samples)} samples, {count(contents.tokens)} tokens"),
        ("trained", "-" if contents.seconds is None else f"{contents.seconds:,.1f} s"),
        ("skipped", "-" if contents.skipped_steps is None else plural(contents.skipped_steps, "step")),
        ("marks", ", ".join(marks) or "-"),
        ("fingerprint", fingerprint_line(contents.fingerprint)),
        ("tokenizer", tokenizer_line(contents.tokenizer)),
        ("parameters", f"{contents.parameters:,} in {plural(contents.parameter_tensors, 'tensor')}"),
        ("holds", ", ".join(contents.kinds) if contents.optimizer else "weights alone, without the optimizer"),
    ]
    if contents.optimizer:
        scaler = contents.optimizer["loss_scaler"] or {}
        steps = [f"{one['count']:,} ({plural(one['tensors'], 'tensor')})" for one in contents.optimizer["steps"]]
        decay = [
            f"{one['rate']:g} ({plural(one['tensors'], 'tensor')}, {plural(one['elements'], 'element')})"
            for one in contents.optimizer["weight_decay"]
        ]
        facts += [
            ("optimizer", contents.optimizer["type"]),
            ("steps", ", ".join(steps)),
            ("weight decay", ", ".join(decay) or "-"),
            ("loss scaler", ", ".join(f"{name} {short(value)}" for name, value in scaler.items()) or "none"),
        ]
    return facts


def fingerprint_line(one: dict[str, Any] | None) -> str:
    if one is None or "fault" in one:
        return "-" if one is None else one["fault"]
    rounded = f" (and rounded to {', '.join(one['rounded'])})" if one["rounded"] else ""
    return f"loss {one['loss']:.6f} nats over {one['tokens']} tokens, weights in {one['precision']}{rounded}"


def tokenizer_line(one: dict[str, Any] | None) -> str:
    if one is None or "fault" in one:
        return "-" if one is None else one["fault"]
    return f"{one['type']}, {plural(one['tokens'], 'token')}, fingerprint {one['fingerprint']}"


def tensor_lines(tensors: list[TensorStatistics]) -> list[str]:
    rows = []
    for one in tensors:
        numbers = ["-" if value is None else f"{value:.4e}" for value in (one.mean, one.std, one.min, one.max)]
        shape = "x".join(map(str, one.shape)) or "scalar"
        rows.append([one.kind, one.name, shape, str(one.pieces), *numbers, f"{one.nonfinite:,}"])
    header = ["kind", "tensor", "shape", "pieces", "mean", "std", "min", "max", "non-finite"]
    return table(header, rows, "<<<>>>>>>")


def folder_lines(report: FolderReport) -> list[str]:
    rows = []
    for one in report.checkpoints:
        contents, name = one.contents, Path(one.path).name
        loss = contents.validation_loss if contents else None
        rows.append(
            [
                count(one.step),
                date(contents.written) if contents else "-",
                size(one.bytes),
                "-" if loss is None else f"{loss:.4f}",
                ", ".join(link for link, target in report.links.items() if target == name) or "-",
                "DAMAGED: " + "; ".join(one.damage) if one.damage else "right sizes" if one.quick else "sound",
            ]
        )
    total = sum(one.bytes for one in report.checkpoints)
    lines = [f"{report.path}: {plural(len(rows), 'checkpoint')}, {size(total)}", ""]
    lines += table(["step", "written (UTC)", "size", "validation loss", "links", "state"], rows, "><>><<")
    there = {Path(one.path).name for one in report.checkpoints}
    lines += [
        f"{link} points to {target}, which is gone" for link, target in report.links.items() if target not in there
    ]
    lines += [f"{name} is {leftover(name)}" for name in report.leftovers]
    return lines


def leftover(name: str) -> str:
    if name.endswith(".old"):
        return "a complete checkpoint whose step was being saved again; the next start gives it its name back"
    return "of a save or a deletion that is going on or was cut off"


def comparison_lines(report: Comparison) -> list[str]:
    lines = []
    for letter, one in (("A", report.a), ("B", report.b)):
        state, *faults = verdict(one)
        written = f", written {date(one.contents.written)} UTC" if one.contents else ""
        lines += [f"{letter}  {one.path}: step {count(one.step)}{written}, {state}", *faults]
    if not (report.a.contents and report.b.contents):
        return [*lines, "", "nothing to compare: a manifest can't be read"]
    lines.append("")
    for section, found in report.values.items():
        lines += value_lines(section, found)
    lines += [f"{section}: not comparable ({reason})" for section, reason in report.not_comparable.items()]
    parameters = [
        f"  {name}: only in {side}"
        for side, names in (("A", report.only_in_a), ("B", report.only_in_b))
        for name in names
    ]
    parameters += [f"  {one['name']}: {one['a']} -> {one['b']}" for one in report.shapes]
    same = "the same, in the same shapes"
    lines += [f"parameters: {plural(len(parameters), 'difference') if parameters else same}", *parameters]
    for part in report.tensors:
        lines += kind_lines(part, report.show)
    return [*lines, "", "equal" if report.equal else "A and B differ"]


def value_lines(section: str, found: list[dict[str, Any]]) -> list[str]:
    """One section of a comparison; values of many parameters in one line for each pair of values."""
    title = section.replace("_", " ").replace(".", " ")
    if not found:
        return [f"{title}: equal"]
    pairs: dict[str, list[str]] = {}
    for one in found:
        sides = [short(one[side]) if side in one else "not set" for side in ("a", "b")]
        pairs.setdefault(" -> ".join(sides), []).append(one["name"])
    lines = [f"{title}: {plural(len(found), 'difference')}"]
    for pair, names in pairs.items():
        if section.startswith("optimizer.") and len(names) > 1:
            lines.append(f"  {pair} for {len(names):,} tensors, such as {names[0]}")
        else:
            lines += [f"  {name}: {pair}" for name in names]
    return lines


def kind_lines(part: KindComparison, show: int) -> list[str]:
    lines = ["", f"{part.kind}: {part.identical:,} of {plural(part.compared, 'tensor')} identical bit for bit"]
    if part.largest and part.relative:
        lines.append(f"  largest max |A-B|    {part.largest['value']:.3e}  {part.largest['name']}")
        lines.append(f"  largest |A-B| / |A|  {part.relative['value']:.3e}  {part.relative['name']}  (2-norms)")
    lines += [f"  can't be read: {name}" for name in part.unreadable]
    lines += [
        f"  non-finite values: {one['a']:,} in A, {one['b']:,} in B  {one['name']}" for one in part.nonfinite[:show]
    ]
    if len(part.nonfinite) > show:
        lines.append(f"  non-finite values in {len(part.nonfinite) - show:,} tensors more")
    rows = [
        [
            f"{one.relative:.3e}",
            f"{one.largest:.3e}",
            f"{one.differing:,} of {one.elements:,}",
            one.name + (f"  ({one.differing_nonfinite:,} of them not finite)" if one.differing_nonfinite else ""),
        ]
        for one in part.differing
    ]
    header = ["|A-B| / |A|", "max |A-B|", "elements that differ", "tensor"]
    return lines + ([f"  {line}" for line in table(header, rows, ">>><")] if rows else [])


def plural(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def date(written: str) -> str:
    """Without the fractions of a second and the time zone, which is always UTC."""
    return written[:19].replace("T", " ")


def size(number: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} B"


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= VALUE_WIDTH else f"{text[: VALUE_WIDTH - 3]}..."


if __name__ == "__main__":
    run_command(main)
