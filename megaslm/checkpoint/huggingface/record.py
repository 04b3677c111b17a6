"""megaslm_export.json: what an export of ours is, and whether its files are still those that were written."""

import json
from pathlib import Path
from typing import Any

from megaslm.checkpoint.format import find_damages
from megaslm.errors import UserError

EXPORT_RECORD = "megaslm_export.json"
RECORD_FORMAT = "megaslm-export"
RECORD_VERSION = 1
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def verify_export(path: str | Path) -> list[str]:
    """What is wrong with the files of an export of ours, by its record; nothing if they are what was written.

    Raises:
        UserError: there is no record, or none that can be read.
    """
    folder = Path(path)
    record = read_record(folder)
    files = record["files"]
    damages = list(find_damages(folder, record, sorted(files), read=True).values())
    # transformers opens model.safetensors before an index, whatever it is.
    others = sorted(one.name for pattern in WEIGHT_FILES for one in folder.glob(pattern) if one.name not in files)
    return damages + [f"{name} is no file of this export" for name in others]


def read_record(folder: Path) -> dict[str, Any]:
    """The record of an export of ours.

    Raises:
        UserError: it is missing, damaged, or of a newer version.
    """
    path = folder / EXPORT_RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not an export of megaslm: it has no {EXPORT_RECORD}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}): export the model again, to another folder") from None
    if not isinstance(record, dict) or record.get("format") != RECORD_FORMAT:
        raise UserError(f"{path} is not the record of an export: export the model again, to another folder")
    if record.get("version") != RECORD_VERSION:
        raise UserError(
            f"{path} has version {record.get('version')}, this megaslm reads {RECORD_VERSION}: use the megaslm that "
            "wrote it"
        )
    files = record.get("files")
    if not isinstance(files, dict) or not any(str(name).endswith(".safetensors") for name in files):
        raise UserError(f"{path} is damaged: it lists no weights; export the model again, to another folder")
    for name, entry in files.items():
        sound = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
        if not sound or name in ("", ".", "..") or Path(name).name != name or "\0" in name:
            raise UserError(f"{path} is damaged: its entry {name!r} is none of a file; export the model again")
    return record
