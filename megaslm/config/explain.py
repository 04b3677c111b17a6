"""Turns what pydantic finds wrong into sentences for users: the dotted key, the value given, what is allowed.

Serves the run config (pydantic models) and the engine config (typed dictionaries) alike.
"""

import difflib
import json
import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Required, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from typing_extensions import is_typeddict

# How a type reads in a sentence that begins "must be".
_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def subfields(kind: Any) -> dict[str, Any] | None:
    """Name -> annotation of a section's fields, or None when `kind` is a plain value."""
    kind = strip(kind)
    if is_typeddict(kind):
        return {name: _strip_required(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {
            name: Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
            for name, field in kind.model_fields.items()
        }
    return None


def kind_at(root: Any, location: Iterable[str | int]) -> Any:
    """The annotation at a location such as ("data", "train", 0, "weight"); None where there is no such field."""
    kind = root
    for part in location:
        if isinstance(part, int):
            items = get_args(strip(kind))
            kind = items[min(part, len(items) - 1)] if items else None
        else:
            kind = (subfields(kind) or {}).get(part)
        if kind is None:
            return None
    return kind


def describe(kind: Any) -> str:
    """What a value of this type must be, in words: `a whole number >= 1, or null`."""
    args = get_args(kind)
    if get_origin(kind) is Annotated:
        limits = [_limit(constraint) for constraint in args[1:]]
        text, null, rest = describe(args[0]).partition(", or null")
        return text + " and".join(limit for limit in limits if limit) + null + rest
    if get_origin(kind) in (Union, types.UnionType):
        text = " or ".join(describe(arg) for arg in args if arg is not type(None))
        return text + ", or null" if type(None) in args else text
    if get_origin(kind) is Literal:
        choices = [choice if isinstance(choice, str) else json.dumps(choice) for choice in args]
        return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
    if get_origin(kind) is tuple:
        return f"a list of {len(args)}, each {describe(args[0])}"
    if get_origin(kind) is list:
        return f"a list, each item {describe(args[0])}"
    if get_origin(kind) is dict:
        return f"an object, each value {describe(args[1])}"
    if fields := subfields(kind):
        return f"an object with {', '.join(fields)}"
    return _PLAIN[kind]


def dotted(location: Iterable[str | int]) -> str:
    """("data", "train", 0, "weight") -> data.train[0].weight"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def all_keys(root: Any, prefix: str = "") -> list[str]:
    """Every dotted key under a section, sections included."""
    keys = []
    for name, kind in (subfields(root) or {}).items():
        keys.append(prefix + name)
        keys += all_keys(kind, f"{prefix}{name}.")
    return keys


def nearest_key(root: Any, location: tuple[str | int, ...]) -> str:
    """A hint for an unknown key: the nearest name in its section, else anywhere, else the names there are."""
    *parents, wrong = location
    wrong = str(wrong).strip().lstrip("-")
    siblings = list(subfields(kind_at(root, parents)) or {})
    if close := difflib.get_close_matches(wrong, siblings, n=1):
        return f"did you mean {dotted([*parents, close[0]])}?"
    # The right name in the wrong section (max_steps for train.max_steps).
    by_last_name = {key.rsplit(".", 1)[-1]: key for key in reversed(all_keys(root))}
    if close := difflib.get_close_matches(wrong, by_last_name, n=1, cutoff=0.8):
        return f"did you mean {by_last_name[close[0]]}?"
    where = f" of {dotted(parents)}" if parents else ""
    return f"the keys{where} are {', '.join(siblings)}"


def explain(error: ValidationError, root: Any, origin: Callable[[tuple[str | int, ...]], str]) -> list[str]:
    """One sentence per mistake; `origin` says in which file or override a location was set (or "" if obvious)."""
    sentences = []
    for detail in error.errors(include_url=False):
        location = detail["loc"]
        key, where = dotted(location), origin(location)
        where = f" ({where})" if where else ""
        if detail["type"] == "extra_forbidden":
            sentences.append(f"{key}{where}: unknown key; {nearest_key(root, location)}")
        elif detail["type"] == "missing":
            sentences.append(f"{key}{where}: missing, must be {describe(kind_at(root, location))}")
        elif detail["type"] == "value_error":
            message = detail["msg"].removeprefix("Value error, ")
            is_field = location and not subfields(kind_at(root, location))
            given = f"{key} = {_shown(detail['input'])}{where}" if is_field else key
            sentences.append(f"{given}: {message}" if given else message)
        elif detail["type"] == "string_pattern_mismatch":
            sentences.append(f"{key} = {_shown(detail['input'])}{where}: must match {detail['ctx']['pattern']}")
        else:
            # Of a field that takes one of several types each is tried, and stands at the end of the location.
            while kind_at(root, location) is None:
                location = location[:-1]
            given = f"{dotted(location)} = {_shown(detail['input'])}{where}"
            sentences.append(f"{given}: must be {describe(kind_at(root, location))}")
    return list(dict.fromkeys(sentences))


def listing(title: str, sentences: list[str]) -> str:
    """The message for one or several mistakes: in one line, or one a line under a title."""
    if len(sentences) == 1:
        return f"{title}: {sentences[0]}"
    return f"{title}: {len(sentences)} mistakes\n" + "\n".join(f"  {sentence}" for sentence in sentences)


def strip(kind: Any) -> Any:
    """The type without Annotated, and without `| None`."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        rest = [arg for arg in get_args(kind) if arg is not type(None)]
        return strip(rest[0]) if len(rest) == 1 else kind
    return kind


def _strip_required(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Required else hint


def _limit(constraint: Any) -> str:
    for kind, sign in ((Ge, ">="), (Gt, ">"), (Le, "<="), (Lt, "<")):
        if isinstance(constraint, kind):
            return f" {sign} {getattr(constraint, kind.__name__.lower())}"
    return ""


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
