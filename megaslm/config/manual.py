"""The manual of the run configuration, generated from the docstrings of its fields (`--help_config`)."""

import inspect
import json
import textwrap
from typing import Annotated

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megaslm.config.explain import describe
from megaslm.config.schema import DatasetConfig, RunConfig

_WIDTH = 110


def describe_fields() -> str:
    """Every key of the run configuration with what it takes, its default and its meaning, section by section."""
    parts = [
        'Override any key with KEY=VALUE, as in train.max_steps=100 model.rope_theta=1e6 data.train=\'["a", "b"]\'.'
    ]
    sections = {name: field for name, field in RunConfig.model_fields.items() if _section(field)}
    plain = {name: field for name, field in RunConfig.model_fields.items() if name not in sections}
    parts += [_entry(name, field) for name, field in plain.items()]
    for section, field in sections.items():
        kind = _section(field)
        parts.append(f"[{section}] {inspect.getdoc(kind)}")
        parts += [_entry(f"{section}.{name}", inner) for name, inner in kind.model_fields.items()]
    parts.append(f"[items of data.train] {inspect.getdoc(DatasetConfig)}")
    parts += [_entry(name, field) for name, field in DatasetConfig.model_fields.items()]
    return "\n\n".join(parts) + "\n"


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _entry(key: str, field: FieldInfo) -> str:
    kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    default = "required" if field.is_required() else f"default {json.dumps(field.default)}"
    meaning = textwrap.fill(" ".join((field.description or "").split()), _WIDTH)
    return f"{key}: {describe(kind)} ({default})\n{textwrap.indent(meaning, '    ')}"
