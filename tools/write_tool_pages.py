"""Write docs/tools (a page for each command, from its own parser and docstring) and docs/config.md.

    python tools/write_tool_pages.py             write the pages that have changed, and delete those without a command
    python tools/write_tool_pages.py --check     write nothing; exit code 2 if a page is not what its command says

A command is a shell script of launch/, or a Python file of tools/ or launch/ that makes an argparse.ArgumentParser, in
its function parse_arguments; launch/start.py and check.py are parts of the scripts. Options are read from the parser
and not from what --help prints, which differs between versions of Python.
"""

import argparse
import ast
import importlib.util
import re
import sys
import textwrap
from functools import cache
from pathlib import Path
from unittest import mock

from megaslm.commands import run_command
from megaslm.config import manual_sections
from megaslm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "tools"
CONFIG_PAGE = ROOT / "docs" / "config.md"
THIS = "`python tools/write_tool_pages.py`"
SCRIPT_ENDINGS = (".sh", ".sbatch")
START = ROOT / "launch" / "start.py"  # its subcommands are the launch scripts
PARTS = (START, ROOT / "launch" / "check.py")


class Parsing(Exception):
    """Raised in place of parsing; carries the parser."""

    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say which pages are stale")
    return parser.parse_args()


def commands() -> list[Path]:
    """Every command, those of launch/ first. Other files of tools/ and launch/ are parts of one, without a page."""
    scripts = [path for path in sorted((ROOT / "launch").iterdir()) if path.suffix in SCRIPT_ENDINGS]
    python = [*sorted(ROOT.glob("launch/*.py")), *sorted(ROOT.glob("tools/*.py"))]
    return scripts + [path for path in python if path not in PARTS and makes_parser(path)]


def makes_parser(path: Path) -> bool:
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return any(ast.unparse(call.func) == "argparse.ArgumentParser" for call in calls)


@cache
def parser_of(path: Path) -> argparse.ArgumentParser | None:
    """The parser of a Python command; of a script, that of the subcommand of launch/start.py which it calls, if any."""
    if path.suffix == ".py":
        return parser_built_by(path)
    called = re.search(rf"launch/{START.name} (\w+)", path.read_text(encoding="utf-8"))
    if called is None:
        return None
    (subcommands,) = (one for one in parser_of(START)._actions if isinstance(one, argparse._SubParsersAction))
    return subcommands.choices[called[1]]


def parser_built_by(path: Path) -> argparse.ArgumentParser:
    """The parser that a Python command builds. Imports the command, which may import torch."""

    def stop(parser: argparse.ArgumentParser, *_) -> None:
        raise Parsing(parser)

    # Not by the name of its file: a package may have that (evaluate).
    spec = importlib.util.spec_from_file_location(f"command_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    parses = dict.fromkeys(("parse_known_args", "parse_known_intermixed_args"), stop)
    with (
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        mock.patch.multiple(argparse.ArgumentParser, **parses),
    ):
        spec.loader.exec_module(module)
        try:
            module.parse_arguments()
        except Parsing as parsing:
            return parsing.parser
    raise AssertionError(f"parse_arguments of {path} does not parse")


def description_of(path: Path) -> str:
    """The docstring of a Python command; of a script, the comment that it begins with."""
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    lines = head_and_rest(path)[0]
    ours = (line for line in lines if not line.startswith(("#!", "#SBATCH", "# shellcheck")))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in ours)


def head_and_rest(script: Path) -> tuple[list[str], str]:
    """The lines of comment that a script begins with, and what follows them."""
    head, rest = re.fullmatch(r"((?:#[^\n]*\n)*)(.*)", script.read_text(encoding="utf-8"), re.DOTALL).groups()
    return head.splitlines(), rest.strip()


def escaped(text: str) -> str:
    """Plain text for Markdown: what stands between backticks stays."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part[:1] == "`" else re.sub(r"([*<\\])", r"\\\1", part) for part in parts)


def markdown(text: str) -> str:
    """Plain text for Markdown: runs of lines indented by two or more, with the empty lines between them, are code."""
    parts = re.split(r"(?m)(^ {2,}\S.*(?:\n+ {2,}\S.*)*)", text)
    parts[::2] = [escaped(part.strip("\n")) for part in parts[::2]]
    parts[1::2] = [f"```\n{textwrap.dedent(part)}\n```" for part in parts[1::2]]
    return "\n\n".join(filter(None, parts))


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def spelled(action: argparse.Action) -> str:
    """An argument as one writes it: `--stop TEXT [TEXT ...]`."""
    values = argparse.HelpFormatter("")._format_args(action, action.dest.upper())
    return f"{', '.join(action.option_strings)} {values}".strip()


def options_of(parser: argparse.ArgumentParser) -> str:
    """The arguments of a command as a table, and which of them exclude each other."""
    actions = [one for one in parser._actions if one.help != argparse.SUPPRESS and one.dest != "help"]
    rows = []
    for action in actions:
        assert action.help, f"{parser.prog}: {spelled(action)} does not say what it does"
        meaning = escaped(" ".join((action.help % {**vars(action), "prog": parser.prog}).split()))
        needed = "required" if action.option_strings and action.required else ""
        rows.append((f"`{spelled(action)}`", "; ".join(filter(None, (needed, meaning)))))
    parts = [table(("argument", ""), rows)]
    for group in parser._mutually_exclusive_groups:
        names = ", ".join(f"`{action.option_strings[0]}`" for action in group._group_actions)
        parts.append(f"{'Exactly one' if group.required else 'At most one'} of {names}.")
    return "\n\n".join(parts)


def command_page(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    parts = [f"# {name}", markdown(description_of(path))]
    if parser := parser_of(path):
        parts += ["## Arguments", options_of(parser), linked(parser.epilog or "")]
    elif not path.read_text(encoding="utf-8").startswith("#!"):  # to be sourced: what it sets is what it has to say
        parts.append(f"```bash\n{head_and_rest(path)[1]}\n```")
    parts.append(f"([the file](../../{name}), [all commands](README.md); made by {THIS})")
    return "\n\n".join(filter(None, parts)) + "\n"


def linked(text: str) -> str:
    """`text` with a link to the page of each command that it names."""
    names = [path.relative_to(ROOT).as_posix() for path in commands()]
    return re.sub("|".join(map(re.escape, names)), lambda name: f"[{name[0]}]({Path(name[0]).stem}.md)", text)


def index_page(paths: list[Path]) -> str:
    """A line for each command: the first sentence of its description."""
    groups: dict[str, list[tuple[str, str]]] = {"Training and launching": [], "Tools": [], "Benchmarks": []}
    for path in paths:
        tool = "Benchmarks" if path.stem.startswith("benchmark_") else "Tools"
        paragraph = " ".join(re.split(r"\n\n|\n {2,}", description_of(path))[0].split())
        sentence = re.match(r".*?[.?!](?=\s|$)|.*", paragraph)[0]
        name = path.relative_to(ROOT).as_posix()
        row = f"[{name}]({path.stem}.md)", escaped(sentence)
        groups["Training and launching" if name.startswith("launch/") else tool].append(row)
    parts = ["# Commands", "Each says the same with `--help`. Every field of a run: [config.md](../config.md)."]
    for title, rows in groups.items():
        parts += [f"## {title}", table(("command", ""), rows)]
    return "\n\n".join([*parts, f"(Made by {THIS}.)"]) + "\n"


def config_page() -> str:
    parts = [
        "# Fields of a run",
        "`section.key=value` behind `launch/pretrain.py` changes a field, as in `train.max_steps=100` or "
        """`data.train='["a", "b"]'`; a preset is a JSON file with the sections as objects. """
        "`python launch/pretrain.py --help_config` prints the same.",
    ]
    for section in manual_sections():
        parts += [f"## {section.name}", escaped(section.meaning)] if section.name else []
        rows = [
            (f"`{field.key}`", escaped(field.takes), f"`{field.default}`" if field.default else "required", meaning)
            for field in section.fields
            for meaning in [escaped(field.meaning)]
        ]
        parts.append(table(("field", "takes", "default", ""), rows))
    return "\n\n".join([*parts, f"(Made by {THIS}.)"]) + "\n"


def pages() -> dict[Path, str]:
    """Path -> text of every page."""
    paths = commands()
    made = {FOLDER / f"{path.stem}.md": command_page(path) for path in paths}
    assert len(made) == len(paths), "two commands have the same name"
    return {FOLDER / "README.md": index_page(paths), **made, CONFIG_PAGE: config_page()}


def stale(made: dict[Path, str]) -> list[Path]:
    """Pages that are missing, other than `made` says, or of a command that is gone."""
    gone = [path for path in sorted(FOLDER.glob("*.md")) if path not in made]
    wrong = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    return wrong + gone


def main() -> None:
    check = parse_arguments().check
    made = pages()
    wrong = stale(made)
    names = [path.relative_to(ROOT).as_posix() for path in wrong]
    if check and wrong:
        raise UserError(f"{len(wrong)} of {len(made)} pages are stale: {', '.join(names)}; run {THIS.strip('`')}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in wrong:
        if path in made:
            path.write_text(made[path], encoding="utf-8")
        else:
            path.unlink()
    print(f"{len(made)} pages, {len(wrong)} written or deleted" + "".join(f"\n  {name}" for name in names))


if __name__ == "__main__":
    run_command(main)
