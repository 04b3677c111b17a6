"""The house rules that a program can check: who imports whom, how long a file may be, what no file may mention."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 600
MAX_LINES_OF_AN_OP = 300
SOURCES = ("megaslm", "kernels", "launch", "tools", "tests", "setup.py")
PYTHON = sorted(path for name in SOURCES for path in [ROOT / name, *(ROOT / name).rglob("*")] if path.suffix == ".py")
TEXT_ENDINGS = (".py", ".md", ".json", ".toml", ".txt", ".sh", ".sbatch")

# Whom each part may import; itself and the plain modules of the package always.
MAY_IMPORT = {
    "config": set(),
    "data": set(),
    "model": {"kernels", "config"},
    "parallel": {"model", "kernels", "config"},
    "checkpoint": {"parallel", "model", "kernels", "config", "data"},
    "planning": {"checkpoint", "parallel", "model", "kernels", "config", "data"},
    "generation": {"parallel", "model", "kernels", "config", "data"},
    "evaluation": {"checkpoint", "generation", "parallel", "model", "kernels", "config", "data"},
    "training": {"evaluation", "checkpoint", "generation", "parallel", "model", "kernels", "config", "data"},
    "throughput": {"planning", "training", "checkpoint", "parallel", "model", "kernels", "config", "data"},
    "cluster": {"planning", "checkpoint", "parallel", "model", "kernels", "config", "data"},
    "kernels": set(),
}
PARTS = set(MAY_IMPORT)


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether at import time) of every import in a file; names count as modules: `from a import b` is a.b."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node not in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from ((f"{node.module}.{alias.name}", node not in inside) for alias in node.names)


def part_of(module: str) -> str | None:
    """The part of the house that a module belongs to, None for the rest of the world and the plain modules."""
    names = module.split(".")
    if names[0] == "megaslm_kernels":
        return "kernels"
    return names[1] if names[0] == "megaslm" and len(names) > 1 and names[1] in PARTS else None


def files_of(part: str) -> list[Path]:
    folder = ROOT / "kernels" / "megaslm_kernels" if part == "kernels" else ROOT / "megaslm" / part
    return sorted(folder.rglob("*.py"))


def test_every_folder_of_the_library_has_a_rule():
    folders = {path.parent.name for path in (ROOT / "megaslm").glob("*/__init__.py")}
    assert folders | {"kernels"} == PARTS
    assert all(files_of(part) for part in PARTS)


@pytest.mark.parametrize("part", sorted(PARTS))
def test_imports_only_go_down(part):
    wrong = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files_of(part)
        for module, _ in imported(path)
        if part_of(module) not in MAY_IMPORT[part] | {part, None}
    }
    assert wrong == set()


def test_nothing_imports_the_commands():
    commands = {path.stem for folder in ("launch", "tools") for path in (ROOT / folder).glob("*.py")}
    library = [path for part in PARTS for path in files_of(part)]
    wrong = {path for path in library for module, _ in imported(path) if module.split(".")[0] in commands | {"tests"}}
    assert wrong == set()


def test_commands_and_other_parts_use_what_a_part_offers():
    """Through its __init__.py, not past it; tests may look inside."""
    outside = [path for path in PYTHON if ROOT / "tests" not in path.parents]
    wrong = set()
    for path in outside:
        for module, _ in imported(path):
            part, names = part_of(module), module.split(".")
            if part in (None, "kernels") or path in files_of(part) or len(names) < 3:
                continue
            if (ROOT / "megaslm" / part / f"{names[2]}.py").exists() and len(names) > 3:
                wrong.add(f"{path.relative_to(ROOT)} imports {module}")
    assert wrong == set()


def test_there_is_one_door_to_transformers():
    """Which quiets what comes with it."""
    door = ROOT / "megaslm" / "checkpoint" / "huggingface" / "library.py"
    outside = [path for path in PYTHON if ROOT / "tests" not in path.parents and path != door]
    wrong = {path for path in outside for module, _ in imported(path) if module.split(".")[0] == "transformers"}
    assert wrong == set()


def test_the_kernels_know_nothing_of_megaslm():
    modules = {module.split(".")[0] for path in files_of("kernels") for module, _ in imported(path)}
    assert modules <= {"torch", "triton", "megaslm_kernels"} | set(sys.stdlib_module_names)


def test_the_model_knows_nothing_of_ranks():
    modules = {module for path in files_of("model") for module, _ in imported(path)}
    assert [module for module in sorted(modules) if module.startswith(("torch.distributed", "deepspeed"))] == []
    names = re.compile(r"deepspeed|torch\.distributed|\bdist\.|world_size|\.cuda\(|\"cuda\"")
    for path in files_of("model"):
        code = re.sub(r'""".*?"""|#.*', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not names.search(code), path


@pytest.mark.parametrize("part", ["data", "config"])
def test_reading_data_and_configs_imports_nothing_heavy(part):
    code = f"import sys, megaslm.{part}; print([m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_no_optional_package_is_imported_at_import_time():
    optional = {"apex", "wandb", "flash_attn", "bitsandbytes", "transformers", "matplotlib", "tensorboard"}
    library = [path for part in PARTS for path in files_of(part)]
    wrong = {
        f"{path.relative_to(ROOT)} imports {module}"
        for path in library
        for module, at_import in imported(path)
        if at_import and module.split(".")[0] in optional
    }
    assert wrong == set()


@pytest.mark.parametrize("module", ["megaslm.training", "megaslm.checkpoint", "megaslm.parallel", "megaslm.generation"])
def test_importing_the_library_touches_no_device(module):
    code = f"import torch, {module}; print(torch.cuda.is_initialized(), torch.distributed.is_initialized())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_a_person_reads(path):
    limit = MAX_LINES_OF_AN_OP if path in files_of("kernels") else MAX_LINES
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def test_no_file_mentions_a_machine():
    """Paths of somebody's home, addresses of hosts that only one network knows."""
    result = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if result.returncode == 0:
        paths = [ROOT / name for name in result.stdout.splitlines()]
    else:  # a source archive
        paths = [path for name in SOURCES for path in (ROOT / name).rglob("*")]
    home = re.compile(
        r"(?<![\w.])/(?:home|Users|root|work)/\w|\bC:\\Users|--(?:extra-)?index-url|\b(?:10|192\.168)\.\d+\.\d+\.\d"
    )
    wrong = []
    for path in paths:
        if path.suffix in TEXT_ENDINGS and path.is_file() and path != Path(__file__).resolve():
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if home.search(line):
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert wrong == []
