"""Every package that is imported is declared in setup.py, and every declared one is pinned in constraints.txt."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("megaslm", "kernels", "tools", "launch", "tests")
# Packages, and files that stand beside the command or test that imports them.
OURS = {
    "megaslm",
    "megaslm_kernels",
    "zygote",
    *(path.stem for name in ("tools", "launch") for path in ROOT.glob(f"{name}/*.py")),
}
OURS |= {
    path.stem
    for folder in ("checkpoint", "data", "generation", "kernels", "parallel", "planning", "throughput", "training")
    for path in ROOT.glob(f"tests/{folder}/**/*.py")
}
# Not installed by any extra: probed where they are used, and named in the error when they are missing.
PROBED = {"apex", "flash-attn"}
# Modules around a class of an extra's package, themselves imported where a user asks for it alone.
ON_DEMAND = {"megaslm/evaluation/harness_model.py"}
UNPINNED = {"triton"}  # constraints.txt says why


def distribution(name: str) -> str:
    """The distributions we use are called as their packages, up to the dash."""
    return re.match(r"[\w.-]+", name)[0].replace("_", "-").lower()


def declared() -> tuple[set[str], dict[str, set[str]]]:
    """install_requires and extras_require of setup.py, by name."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    (setup,) = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "setup")
    arguments = {argument.arg: argument.value for argument in setup.keywords}
    extras = ast.literal_eval(arguments["extras_require"])
    return (
        set(map(distribution, ast.literal_eval(arguments["install_requires"]))),
        {extra: set(map(distribution, names)) for extra, names in extras.items()},
    )


def imports(tree: ast.AST, at_import: bool = True) -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether it is imported with the file) of every absolute import, pytest.importorskip included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, node.lineno, at_import
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("importorskip", "import_module")):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value, node.lineno, at_import
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from imports(node, at_import and not inside)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_are_declared(folder):
    always, extras = declared()
    undeclared = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for module, line, at_import in imports(ast.parse(path.read_text(encoding="utf-8"))):
            package = module.partition(".")[0]
            if package in sys.stdlib_module_names or package in OURS:
                continue
            allowed = always | extras["dev"] if folder == "tests" else always
            # Only what a user asks for may need an extra.
            if not at_import or path.relative_to(ROOT).as_posix() in ON_DEMAND:
                allowed = allowed.union(PROBED, *extras.values())
            if distribution(package) not in allowed:
                undeclared.append(f"{path.relative_to(ROOT)}:{line} imports {package}")
    assert not undeclared, "setup.py does not declare: " + "; ".join(undeclared)


def test_declared_packages_are_pinned():
    always, extras = declared()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {distribution(line) for line in lines if line and not line.startswith("#")}
    assert always.union(*extras.values()) - UNPINNED <= pinned
