"""The text of a record: one field, or several that a format string puts together."""

from collections.abc import Callable
from operator import itemgetter
from string import Formatter

from megaslm.errors import UserError

LARGEST_EXACT = 2.0**53  # below it every integer is a float


class RecordFault(ValueError):
    """A record that does not give a text; says why, without the place."""


class RecordText:
    """A function of a record (a dict) that gives its text: the field `text_key`, or `template` filled with its fields.

    In a template "{name}" stands for the field `name`, text or a number, and "{{" and "}}" for braces. Numbers stand as
    Python writes them once they are read: 1.50 as 1.5, 1e2 as 100.0, -0 as 0, and a 32-bit 0.1 as 0.10000000149011612.
    Refused are NaN, infinity, and from 2^53 on what has been read as a float, as integers beyond 64 bits are.

    Attributes:
        names: the fields that are read.
        extract: gives the same for a good record and is faster; for a bad one it gives no text, or raises any of
            ValueError, LookupError and TypeError.

    UserError where the template is no format string of plain fields, or has none. Calls raise RecordFault.
    """

    def __init__(self, text_key: str, template: str | None = None):
        self.text_key = text_key
        self.template = template
        if template is None:
            self.names: tuple[str, ...] = (text_key,)
            self.extract: Callable[[object], object] = itemgetter(text_key)
        else:
            self._parts = _parse(template)
            self.names = tuple(dict.fromkeys(name for _, name in self._parts if name is not None))
            self.extract = self

    def __call__(self, record: object) -> str:
        if not isinstance(record, dict):
            raise RecordFault(f"the record is a JSON {type(record).__name__}, not an object")
        if self.template is None:
            text = _field(record, self.text_key, "text_key")
            if not isinstance(text, str):
                raise RecordFault(f"field {self.text_key!r} is {_kind(text)}, not text")
            return text
        return "".join(
            literal + ("" if name is None else self._filled_in(record, name)) for literal, name in self._parts
        )

    def _filled_in(self, record: dict, name: str) -> str:
        value = _field(record, name, "the template")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise RecordFault(f"field {name!r} is {_kind(value)}; a template takes text and numbers")
        if isinstance(value, float) and not abs(value) < LARGEST_EXACT:
            raise RecordFault(f"field {name!r} is the number {value}, whose digits are lost; make it text")
        return str(value)


def _field(record: dict, name: str, option: str) -> object:
    if name not in record:
        names = ", ".join(list(record)[:10]) or "none"
        raise RecordFault(f"the record has no field {name!r} (its fields: {names}); see {option}")
    return record[name]


def _kind(value: object) -> str:
    if isinstance(value, bytes):
        return "bytes that are not valid UTF-8"
    return "null" if value is None else f"a {type(value).__name__}"


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Literal text and the field behind it, in turn."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}; write a brace that is text twice") from None
    if all(name is None for _, name, _, _ in parts):
        raise UserError(f"template {template!r} has no field; name at least one, as in 'Q: {{question}}'")
    plain = [(literal, name) for literal, name, _, _ in parts]
    bad_names = [name for _, name in plain if name is not None and (not name or name.isdigit() or "[" in name)]
    if bad_names or _written(plain) != template:
        raise UserError(
            f"template {template!r}: every field needs a name and nothing else, as in {{question}}; write a brace that "
            "is text twice"
        )
    return plain


def _written(parts: list[tuple[str, str | None]]) -> str:
    """The template of these parts."""
    return "".join(
        literal.replace("{", "{{").replace("}", "}}") + ("" if name is None else f"{{{name}}}")
        for literal, name in parts
    )
