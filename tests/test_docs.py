"""The documentation says what is so: links lead somewhere, commands and fields exist, messages are printed."""

import argparse
import ast
import copy
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from megaslm.config import RunConfig, load_engine_config, load_run_config
from megaslm.config.explain import all_keys
from megaslm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PRESENT = [path for path in PAGES if path.name != "journal.md"]  # which says what was so at its time
PRETRAIN = "launch/pretrain.py"
TRAINERS = (PRETRAIN, "tools/plan.py", "tools/benchmark_throughput.py")  # take a preset, an engine config and overrides
LAUNCHERS = {"deepspeed": ("deepspeed", "launcher/runner.py"), "torchrun": ("torch", "distributed/run.py")}
FENCE = re.compile(r"^```.*?$(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r"\b(?:(python|torchrun|deepspeed|bash|sbatch)\s(.*?))?\b((?:tools|launch)/\w+\.(?:py|sh|sbatch))\b"
)
SECTIONS = "|".join(name for name in RunConfig.model_fields if name not in ("name", "description"))
FIELD = re.compile(rf"(?<![\w./-])((?:{SECTIONS})\.[a-z]\w*)(?![\w/]|\.\w)")
OVERRIDE = re.compile(rf"(?:{SECTIONS})\.[a-z]\w*=\S+")
STANDS_FOR_ANOTHER = re.compile(r"<?[A-Z][A-Z_]*>?")  # PREFIX, FILE, NAME
VARIABLE = re.compile(
    r"\b(?:CUDA|DEEPSPEED|DS(?!_CONFIG)|G?OMP|MASTER|MEGASLM|NCCL|PYTORCH|TORCH\w*?|TRITON|WORLD)_[A-Z_]+\b"
)
OF_CUDA = {"CUDA_LAUNCH_BLOCKING"}  # which nothing of ours reads or sets
OF_DOCKER = {"--ipc"}
WARNED = "SaveFailed"  # an exception of which a run says `warning: `
NO_FIELDS = (".json", ".md", ".py", ".bin", ".idx", ".safetensors", ".key")  # files, and section.key itself
LEAST_LETTERS = 16  # of a message that are the code's own: fewer would be found anywhere


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def writer():
    """tools/write_tool_pages.py as a module."""
    spec = importlib.util.spec_from_file_location("write_tool_pages", ROOT / "tools" / "write_tool_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text_of(path)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_of(path: Path) -> list[str]:
    """Lines of code blocks, those that go on joined, and what stands between backticks."""
    text = text_of(path)
    rest = FENCE.sub("", text)
    blocks = FENCE.findall(text) + re.findall(r"(?:^ {4}.*\n)+", rest, re.MULTILINE)
    lines = [line.strip() for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return lines + [" ".join(span.replace("\\|", "|").split()) for span in re.findall(r"`([^`]+)`", rest)]


def commands_of(path: Path) -> list[tuple[str, str, str, str]]:
    """(launcher, its arguments, file, arguments) of what starts a file of tools/ or launch/ in a page.

    What follows three spaces, a # or a pipe is no argument.
    """
    found = []
    for line in code_of(path):
        for part in re.split(r"\s#\s|\s{3,}| \| | && ", line):
            if (match := COMMAND.search(part)) and (match[1] or part.startswith(match[3])):
                found.append((match[1] or "", match[2] or "", match[3], part[match.end() :]))
    return found


def words_of(arguments: str) -> list[str]:
    """What is given to a command, without what only says that more may be given."""
    try:
        words = shlex.split(arguments)
    except ValueError:  # a quote that is open where the page breaks off
        words = arguments.split()
    end = next((at for at, word in enumerate(words) if word.startswith("[")), len(words))
    return [word for word in words[:end] if word != "..." and word not in ">|<"]


@cache
def lenient(file: str) -> argparse.ArgumentParser:
    """The parser of a command, which also takes a command that is not given whole, and FILE for a file."""
    parser = copy.deepcopy(writer().parser_of(ROOT / file)) or argparse.ArgumentParser()

    def fail(message: str) -> None:
        raise UserError(f"{file}: {message}")

    parser.error = fail
    for action in parser._actions:
        action.required = False
        if not action.option_strings:
            action.nargs = "*"
        if action.nargs != 0:
            help_text = f"{action.help} {action.metavar}"
            action.type, action.choices = reader(action.type, action.choices, help_text), None
    return parser


def reader(kind, choices, help_text: str):
    """Reads a value of an option; words between commas are named in its help."""

    def read(text: str):
        if STANDS_FOR_ANOTHER.fullmatch(text):
            return None
        if choices is not None and text not in choices:
            raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(choices)}")
        if re.fullmatch(r"[a-z]+(,[a-z]+)+", text) and set(text.split(",")) - set(re.findall(r"\w+", help_text)):
            raise argparse.ArgumentTypeError(f"{text} is not what the help says: {help_text}")
        return kind(text) if kind else text

    return read


def check_command(file: str, words: list[str]) -> None:
    """Raise UserError for an option or a value that a command does not take. What a launch script does not know goes on
    to launch/pretrain.py."""
    given, rest = lenient(file).parse_known_args(words)
    if file.startswith("launch/") and file != PRETRAIN:
        return check_command(PRETRAIN, rest)
    overrides = [word for word in rest if OVERRIDE.fullmatch(word)]  # an option between some of them parts them
    if unknown := [word for word in rest if word not in overrides]:
        raise UserError(f"{file} does not take {unknown}")
    if file in TRAINERS:
        presets = given.preset if isinstance(given.preset, list) else [given.preset]
        overrides += [word for word in (*given.overrides, *presets) if word and OVERRIDE.fullmatch(word)]
        for preset in [name for name in presets if name and name not in overrides] or ["quickstart"]:
            load_run_config(preset, overrides)
        if given.ds_config:
            load_engine_config(ROOT / given.ds_config)


@cache
def options_of_launcher(name: str) -> set[str]:
    """As they stand in the launcher's source, which takes seconds to import."""
    package, file = LAUNCHERS[name]
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    return set(re.findall(r"\"(--?[\w-]+)\"", text_of(Path(folder) / file).replace("'", '"')))


def test_every_page_of_a_command_is_up_to_date():
    names = [name_of(path) for path in writer().stale(writer().pages())]
    assert names == [], "run python tools/write_tool_pages.py"


def test_the_pages_are_made_of_what_parsers_hold():
    """No matter how a version of Python prints them."""
    page = writer().command_page(ROOT / "tools" / "generate.py")
    assert "| `--prompt TEXT [TEXT ...]` | one or more prompts (default: one, from stdin) |" in page
    assert "| `--model PATH` | required; a checkpoint" in page
    assert "```\npython tools/generate.py --model runs/x --prompt" in page
    assert "At most one of `--quick`, `--full`." in writer().command_page(ROOT / "tools" / "benchmark_kernels.py")


def test_every_command_has_a_page():
    """Of the files that can be started; sections of benchmark_data.py are no commands, for all that it starts one."""
    files = [path for folder in ("launch", "tools") for path in sources(folder, "*.py")]
    started = {path for path in files if "__main__" in text_of(path) and "argparse" in text_of(path)}
    others = {*writer().PARTS, ROOT / "tools" / "benchmark_preprocess.py"}
    assert others < started
    assert {path for path in writer().commands() if path.suffix == ".py"} == started - others


def test_pages_of_scripts():
    page = writer().command_page(ROOT / "launch" / "node.sh")
    assert "| `--check_only` |" in page and "[launch/pretrain.py](pretrain.md)" in page
    assert "## Arguments" not in writer().command_page(ROOT / "launch" / "install.sh")
    environment = ROOT / "launch" / "env_h200.sh"
    reasons = text_of(environment).partition("decide()")[2].strip()
    assert reasons and reasons in writer().command_page(environment)
    index = writer().index_page([ROOT / "tools" / "inspect_checkpoint.py"])
    assert "whether it is sound, and how two differ. |" in index  # its first sentence alone


def test_a_stale_page_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(writer(), "FOLDER", tmp_path)
    for name in ("same.md", "other.md", "gone.md"):
        (tmp_path / name).write_text("text")
    made = {tmp_path / "same.md": "text", tmp_path / "other.md": "another", tmp_path / "missing.md": "text"}
    assert {path.stem for path in writer().stale(made)} == {"other", "missing", "gone"}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(path))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        to = path.parent / name if name else path
        if not to.exists() or anchor and anchor not in anchors(to):
            wrong.append(target)
    assert wrong == []


def test_the_readme_leads_to_every_page():
    """In as many steps as it takes."""
    found, new = set(), {ROOT / "README.md"}
    while new:
        found |= new
        links = {
            (page.parent / name).resolve() for page in new for name in re.findall(r"\]\(([\w./]+\.md)", text_of(page))
        }
        new = links - found
    assert [name_of(path) for path in PAGES if path not in found] == []


def test_commands_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text, `python tools/a.py --x 1` and tools/b.py.\n\n    deepspeed --num_gpus 2 launch/c.py \\\n"
        "        --y 'a b'    what it does\n    zcat z.gz | python tools/d.py -   # --no\n\n"
        "```\nbash launch/e.sh --z\n```\n"
    )
    assert sorted(commands_of(page)) == [
        ("bash", "", "launch/e.sh", " --z"),
        ("deepspeed", "--num_gpus 2 ", "launch/c.py", " --y 'a b'"),
        ("python", "", "tools/a.py", " --x 1"),
        ("python", "", "tools/d.py", " -"),
    ]


@pytest.mark.parametrize("path", PRESENT, ids=name_of)
def test_commands_are_there_and_take_what_is_given(path):
    wrong = []
    for launcher, before, file, arguments in commands_of(path):
        if not (ROOT / file).exists():
            wrong.append(f"there is no {file}")
            continue
        try:
            check_command(file, words_of(arguments))
        except UserError as error:
            wrong.append(f"{arguments}: {error}")
        if launcher in LAUNCHERS:
            given = {one for one in words_of(before) if one.startswith("--")}
            if unknown := given - options_of_launcher(launcher):
                wrong.append(f"{launcher} has no {unknown}")
    assert wrong == []


def test_a_wrong_value_in_a_command_is_seen():
    for file, arguments in (
        (PRETRAIN, "--preset slm_smalll"),
        (PRETRAIN, "--preset slm_small --ds_config ds_configs/zero9.json"),
        (PRETRAIN, "--preset slm_small train.compile=maybe --run_dir x"),
        (PRETRAIN, "--resume sometimes"),
        ("launch/node.sh", "--preset slm_smalll"),
        ("launch/node.sh", "--gpus two"),
        ("launch/slurm.sbatch", "--hostfile hosts"),
        ("tools/plan.py", "--preset slm_small --gpus 8 --nodes few"),
        ("tools/benchmark_throughput.py", "--preset slm_tiny --compare hf,fsdp"),
        ("tools/benchmark_throughput.py", "--preset slm_tiny train.sped=1"),
    ):
        with pytest.raises(UserError):
            check_command(file, words_of(arguments))
    check_command("launch/cluster.sh", words_of("--hostfile FILE --preset slm_small data.train=PREFIX [more of them]"))


@pytest.mark.parametrize("path", PRESENT, ids=name_of)
def test_fields_of_a_run_exist(path):
    known = set(all_keys(RunConfig))
    given = {field for line in code_of(path) for field in FIELD.findall(line) if not field.endswith(NO_FIELDS)}
    assert given - known == set()


@pytest.mark.parametrize("path", PRESENT, ids=name_of)
def test_values_of_fields_are_taken(path):
    wrong = []
    for line in filter(OVERRIDE.fullmatch, code_of(path)):
        override = shlex.split(line)[0]
        value = override.partition("=")[2]
        if STANDS_FOR_ANOTHER.fullmatch(value) or value == "...":
            continue
        try:
            load_run_config("quickstart", [override])
        except UserError as error:
            if "no effect" not in str(error):  # without another field, which is named beside it
                wrong.append(str(error))
    assert wrong == []


def test_options_that_are_named_alone_exist():
    options = set().union(*map(options_of_launcher, LAUNCHERS), {"--help"})
    for path in writer().commands():
        options |= {name for action in lenient(name_of(path))._actions for name in action.option_strings}
    given = {line.split()[0].partition("=")[0] for path in PRESENT for line in code_of(path) if line.startswith("--")}
    assert {one for one in given if re.fullmatch(r"--[a-z]\w*", one)} - options - OF_DOCKER == set()


def test_variables_of_the_environment_are_in_the_code():
    ours = [path for path in sources("", "*.py", "*.sh", "*.sbatch", "Dockerfile") if path != Path(__file__)]
    known = {name for path in ours for name in VARIABLE.findall(text_of(path))} | OF_CUDA
    given = {name for path in PRESENT for line in code_of(path) for name in VARIABLE.findall(line)}
    assert "DEEPSPEED_TIMEOUT" in given
    assert given - known == set()


def sources(folder: str, *patterns: str) -> list[Path]:
    folders = [ROOT / folder] if folder else [ROOT / one for one in ("megaslm", "kernels", "launch", "tools", "tests")]
    return [path for one in folders for pattern in patterns for path in one.rglob(pattern)]


@cache
def messages(warned: bool = False) -> list[list[str | None]]:
    """Every text in our code that a user may read, in pieces; None stands for a value. warned: of WARNED alone."""
    found = []
    for folder in ("megaslm", "kernels", "launch", "tools"):
        for path in sources(folder, "*.py"):
            tree = ast.parse(text_of(path))
            calls = [one for one in ast.walk(tree) if isinstance(one, ast.Call) and ast.unparse(one.func) == WARNED]
            inner = {id(node) for call in calls for node in ast.walk(call)}
            for node in ast.walk(tree):
                if (id(node) in inner) != warned:
                    continue
                if isinstance(node, ast.JoinedStr):
                    found.append([part.value if isinstance(part, ast.Constant) else None for part in node.values])
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append([node.value])
    return [pieces for pieces in found if sum(map(len, filter(None, pieces))) >= LEAST_LETTERS]


def is_said(kind: str, text: str) -> bool:
    """Whether a message of ours reads like that; one that ends with ... is cut there. `error: ` is put before that of a
    UserError, `warning: ` stands in the text."""
    if kind == "error":
        return is_among(messages(), text) or is_among(messages(), f"error: {text}")
    return is_among(messages(), f"warning: {text}") or is_among(messages(warned=True), text)


def is_among(texts: list[list[str | None]], text: str) -> bool:
    cut, text = text.endswith("..."), text.removesuffix("...").rstrip()
    heads = [{piece[:LEAST_LETTERS].rstrip() for piece in pieces if piece} for pieces in texts]
    candidates = (pieces for pieces, begin in zip(texts, heads, strict=True) if any(head in text for head in begin))
    return any(reads_like(pieces, text, cut) for pieces in candidates)


def reads_like(pieces: list[str | None], text: str, cut: bool) -> bool:
    pattern = letters = ""
    for piece in pieces:
        if piece is None:
            pattern += ".+"
            continue
        if cut and len(letters) + len(piece) >= LEAST_LETTERS:
            # The text may end within this piece.
            for length in range(len(piece), max(0, LEAST_LETTERS - len(letters)) - 1, -1):
                head = piece[:length].rstrip()
                if text.endswith(head) and re.fullmatch(pattern + re.escape(head), text):
                    return True
        pattern += re.escape(piece)
        letters += piece
        if not re.match(pattern, text):
            return False
    return len(letters) >= LEAST_LETTERS and re.fullmatch(pattern, text) is not None


def test_messages_that_are_quoted_are_printed():
    blocks = "".join(FENCE.findall(text_of(ROOT / "docs" / "troubleshooting.md")))
    quoted = re.findall(r"^(error|warning): (.*)$", blocks, re.MULTILINE)
    assert len(quoted) > 50
    assert [f"{kind}: {text}" for kind, text in quoted if not is_said(kind, text)] == []


def test_every_check_of_the_nodes_is_explained():
    code = "".join(map(text_of, sorted((ROOT / "megaslm" / "cluster").glob("*.py"))))
    names = set(re.findall(r"(?:Finding\([A-Z]+, |_alike\()\s*\"([^\"]+)\"", code))
    rows = re.findall(r"^\| ([\w -]+) \|", text_of(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    assert "all-reduce" in names
    assert names == set(rows) - {"line"}


def test_words_of_the_output_that_are_quoted_are_in_the_code():
    """Quoted without a block: two words or more, none of which is a name, a command or a field."""
    page = FENCE.sub("", text_of(ROOT / "docs" / "troubleshooting.md"))
    plain = re.sub(r"\*\*.*?\*\*", "", page, flags=re.DOTALL)  # bold are messages of others
    quoted = {" ".join(span.split()) for span in re.findall(r"`([a-z]+(?:\s[a-z]+)+)`", plain)}
    assert "fell back to eager" in quoted
    texts = {piece for pieces in messages() for piece in pieces if piece}
    assert {one for one in quoted if not any(one in text for text in texts)} == set()
