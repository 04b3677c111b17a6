"""What reports share: JSON to the letter, files that are whole or not there."""

import json
import math

import pytest

from megaslm.errors import UserError
from megaslm.reports import check_folder_of, strict_json, table, write_json


def refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")


def test_numbers_that_are_not_finite_are_strings():
    value = {"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf, "d": None, "e": True}}
    found = json.loads(strict_json(value), parse_constant=refuse)
    assert found == {"a": [1.5, "NaN", ["Infinity"]], "b": {"c": "-Infinity", "d": None, "e": True}}


def test_columns_are_as_wide_as_what_they_hold():
    rows = [["a", "1"], ["longer", "20,000"]]
    assert table(["name", "n"], rows, "<>") == ["name         n", "a            1", "longer  20,000"]


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}

    def full_disk(self, text, **_):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", full_disk)
    with pytest.raises(UserError, match="report.json: No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_where_a_file_cannot_come_to_lie(tmp_path):
    check_folder_of(tmp_path / "report.json", "--json")
    for path in (tmp_path, tmp_path / "none" / "report.json"):
        with pytest.raises(UserError, match="--json .*: give the name of a file"):
            check_folder_of(path, "--json")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"--json .*: .* cannot be written \(Read-only file system\)"):
        check_folder_of(tmp_path / "report.json", "--json")
