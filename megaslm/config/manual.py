"""The manual of the run configuration, from the docstrings of its fields (`--help_config`, docs/config.md)."""

import inspect
import json
import textwrap
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megaslm.config.explain import describe
from megaslm.config.schema import DatasetConfig, RunConfig

_WIDTH = 110


@dataclass(frozen=True)
class ManualField:
    """A key of the run configuration; `default` is JSON, None where a value is required."""

    key: str
    takes: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class ManualSection:
    """Keys that belong together; `name` and `meaning` are empty for those that stand outside of all sections."""

    name: str
    meaning: str
    fields: tuple[ManualField, ...]


def manual_sections() -> list[ManualSection]:
    """Every key of the run configuration, section by section, in the order of the schema."""
    kinds = {name: _section(field) for name, field in RunConfig.model_fields.items()}
    plain = tuple(_field(name, RunConfig.model_fields[name]) for name, kind in kinds.items() if kind is None)
    parts = [ManualSection("", "", plain)]
    for name, kind in kinds.items():
        if kind is not None:
            parts.append(ManualSection(name, inspect.getdoc(kind), _fields(kind, f"{name}.")))
    parts.append(ManualSection("items of data.train", inspect.getdoc(DatasetConfig), _fields(DatasetConfig)))
    return parts


def describe_fields() -> str:
    """Every key of the run configuration with what it takes, its default and its meaning, section by section."""
    parts = [
        'Override any key with KEY=VALUE, as in train.max_steps=100 model.rope_theta=1e6 data.train=\'["a", "b"]\'.'
    ]
    for section in manual_sections():
        parts += [f"[{section.name}] {section.meaning}"] if section.name else []
        parts += map(_entry, section.fields)
    return "\n\n".join(parts) + "\n"


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _fields(kind: type[BaseModel], prefix: str = "") -> tuple[ManualField, ...]:
    return tuple(_field(prefix + name, field) for name, field in kind.model_fields.items())


def _field(key: str, field: FieldInfo) -> ManualField:
    kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    default = None if field.is_required() else json.dumps(field.default)
    return ManualField(key, describe(kind), default, " ".join((field.description or "").split()))


def _entry(field: ManualField) -> str:
    default = "required" if field.default is None else f"default {field.default}"
    return f"{field.key}: {field.takes} ({default})\n{textwrap.indent(textwrap.fill(field.meaning, _WIDTH), '    ')}"
