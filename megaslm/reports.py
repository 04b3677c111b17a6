"""What reports on the terminal and in files share."""

import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaslm.errors import UserError


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Lines of columns two spaces apart; align: "<" or ">" for each."""
    columns = list(zip(header, *rows, strict=True))
    formats = [f"{side}{max(map(len, column))}" for side, column in zip(align, columns, strict=True)]
    return ["  ".join(map(format, row, formats)).rstrip() for row in [header, *rows]]


def strict_json(value: Any) -> str:
    """`value` as JSON to the letter: numbers that are not finite are the strings "NaN", "Infinity", "-Infinity"."""
    return json.dumps(_strict(value), indent=1, allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value


def check_folder_of(path: str | os.PathLike, option: str) -> None:
    """UserError if a file can't be written at `path` now: before hours of work, not after. `option` named it."""
    folder = Path(path).absolute().parent
    if not os.fspath(path) or Path(path).is_dir() or not folder.is_dir():
        raise UserError(f"{option} {path}: give the name of a file in a folder that is there")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{option} {path}: {folder} cannot be written ({error.strerror}); give another one") from None


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `strict_json(value)`: whole, or not at all. UserError for a disk that is full or not writable."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(strict_json(value) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
