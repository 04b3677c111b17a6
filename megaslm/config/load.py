"""From a preset or a file and dotted overrides to a validated RunConfig, and back to JSON."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megaslm.config.explain import explain, kind_at, listing, nearest_key, strip, subfields
from megaslm.config.schema import RunConfig
from megaslm.errors import UserError

# A key that is overridden drops what the preset says for the keys it takes the place of.
TAKES_PLACE_OF = {
    "train.max_steps": ("train.max_tokens", "train.max_epochs"),
    "train.max_tokens": ("train.max_steps", "train.max_epochs"),
    "train.max_epochs": ("train.max_steps", "train.max_tokens"),
    "data.input": ("data.train", "data.validation"),
    "data.train": ("data.input",),
    "tokenizer.path": ("tokenizer.vocab_size",),
}

# When an override acts; where it would not, it is an error: (keys, acts, why not).
_Acts = Callable[[RunConfig], object]
ACTS_WHEN: tuple[tuple[tuple[str, ...], _Acts, str], ...] = (
    (("model.rope_theta", "model.rope_fraction"), lambda c: c.model.position == "rope", "model.position is learned"),
    (("schedule.decay_fraction",), lambda c: c.schedule.type == "wsd", "schedule.type is not wsd"),
    (
        ("schedule.min_lr_ratio", "schedule.horizon_steps"),
        lambda c: c.schedule.type != "constant",
        "schedule.type is constant",
    ),
    (
        ("tokenizer.type", "tokenizer.vocab_size"),
        lambda c: not c.tokenizer.path,
        "tokenizer.path names an existing tokenizer",
    ),
    (
        ("tokenizer.type", "tokenizer.vocab_size", "data.text_key", "data.build_dir"),
        lambda c: not c.data.train,
        "data.train is tokenized already",
    ),
    (
        ("data.validation_fraction", "data.validation_unit"),
        lambda c: not c.data.train,
        "data.train is divided by data.split",
    ),
    (("tokenizer.unknown",), lambda c: c.tokenizer.path or c.tokenizer.type != "bpe", "a BPE knows every character"),
    (("data.split",), lambda c: c.data.train, "only data.train is divided by it"),
    (("data.split",), lambda c: not c.data.validation, "data.validation is given"),
    (
        ("eval.sample_prompt", "eval.sample_temperature", "eval.sample_top_k"),
        lambda c: c.eval.sample_tokens,
        "eval.sample_tokens is 0",
    ),
    (
        ("parallel.sequence_parallel",),
        lambda c: c.parallel.tensor_parallel_size > 1,
        "parallel.tensor_parallel_size is 1",
    ),
    (
        ("train.attention",),
        lambda c: not c.data.mask_documents,
        "with data.mask_documents the lengths of the documents decide: flash attention over each, or a mask",
    ),
    (("logging.wandb_project",), lambda c: c.logging.wandb != "off", "logging.wandb is off"),
)


@dataclass(frozen=True)
class BatchLayout:
    """How the global batch is cut: global = micro_batch_size x accumulation_steps x data-parallel ranks."""

    micro_batch_size: int
    """Sequences of one forward pass on one rank."""
    accumulation_steps: int
    """Forward and backward passes per optimizer step."""


def load_run_config(preset_or_file: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a preset (by name) or a JSON file, apply overrides to it, and validate the result.

    An override is `KEY=VALUE` with a dotted key (`train.max_steps=100`). The value is JSON where it is JSON (numbers,
    true, null, lists, objects) and text otherwise. Overrides apply from left to right, before validation; one of a
    list or of a section replaces it whole. Some keys stand in for each other: overriding one of train.max_steps,
    train.max_tokens and train.max_epochs drops what the preset says for the other two (unless they are overridden
    too); data.train does so to data.input and the reverse, and tokenizer.path to tokenizer.vocab_size.

    Raises UserError that lists every mistake: an unknown preset or key (with the nearest right one), a missing key,
    a value of the wrong type or out of range, values that contradict each other, an override without effect.
    """
    raw, source = _read_raw(preset_or_file)
    mistakes: list[str] = []
    overridden: dict[str, str] = {}
    for text in overrides:
        key, _, value_text = text.partition("=")
        if mistake := _check_override(key, text):
            mistakes.append(mistake)
            continue
        _set(raw, key, _parse_value(value_text, kind_at(RunConfig, key.split("."))))
        overridden[key] = text
    _drop_replaced(raw, overridden)

    def origin(location: tuple[str | int, ...]) -> str:
        names = [str(part) for part in location]
        for key, text in reversed(overridden.items()):
            if names[: key.count(".") + 1] == key.split("."):
                return f"override {text}"
        return ""

    config = None
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        mistakes += explain(error, RunConfig, origin)
    if config:
        mistakes += _without_effect(config, overridden)
    if mistakes:
        raise UserError(listing(f"Run configuration {source}", mistakes))
    assert config is not None
    return config


def recorded_run_config(values: dict[str, Any], source: str) -> RunConfig:
    """The run config that a run left behind, in its folder or a checkpoint; `source` names that in an error.

    Raises UserError that lists what this version does not understand of it.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        mistakes = explain(error, RunConfig, lambda location: "")
        raise UserError(listing(f"Run configuration of {source}", mistakes)) from error


def with_expected_vocabulary(run: RunConfig) -> RunConfig:
    """The run with the vocabulary that its configuration tells (`RunConfig.expected_vocab_size`).

    Raises UserError where only its data would tell it.
    """
    vocab_size = run.expected_vocab_size
    if vocab_size is None:
        raise UserError(f"the preset {run.name} takes its vocabulary from its data: give model.vocab_size=N")
    return run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": vocab_size})})


def list_presets() -> dict[str, str]:
    """Name -> one-line description of every preset, in the order of the names."""
    return {name: _parse_json(text, name)["description"] for name, text in sorted(_presets().items())}


def to_json(config: RunConfig) -> str:
    """The whole configuration, defaults included: a file with this text loads as an equal configuration."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"


def save_run_config(config: RunConfig, path: str | Path) -> None:
    """Write `to_json` to a file."""
    Path(path).write_text(to_json(config), encoding="utf-8")


def resolve_batch(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> BatchLayout:
    """The largest micro-batch up to `micro_batch_size` with global = micro x accumulation x data-parallel ranks.

    Raises UserError when the global batch is not a multiple of the number of ranks.
    """
    assert min(global_batch_size, micro_batch_size, data_parallel_size) >= 1
    per_rank, rest = divmod(global_batch_size, data_parallel_size)
    if rest:
        works = [n * data_parallel_size for n in (per_rank, per_rank + 1) if n]
        raise UserError(
            f"train.global_batch_size {global_batch_size} does not divide among {data_parallel_size} data-parallel "
            f"ranks; the nearest that do: {' and '.join(map(str, works))}"
        )
    micro = max(size for size in range(1, min(micro_batch_size, per_rank) + 1) if per_rank % size == 0)
    return BatchLayout(micro, per_rank // micro)


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON file that holds an object. Numbers that are whole become integers (5e8, 1e6).

    Raises UserError for a missing file, broken JSON (with line and column) and keys given twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{what} {path} cannot be read: {reason}") from None
    return _parse_json(text, f"{what} {path}")


def _presets() -> dict[str, str]:
    folder = files("megaslm.config") / "presets"
    return {
        entry.name.removesuffix(".json"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    }


def _read_raw(preset_or_file: str) -> tuple[dict[str, Any], str]:
    presets = _presets()
    if preset_or_file in presets:
        return _parse_json(presets[preset_or_file], preset_or_file), preset_or_file
    path = Path(preset_or_file)
    if path.suffix == ".json" or path.is_file():
        return read_json_object(path, "run configuration"), preset_or_file
    close = get_close_matches(preset_or_file, presets, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the presets are {', '.join(sorted(presets))}"
    raise UserError(f"--preset {preset_or_file}: no such preset, and no such JSON file; {hint}")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return result


def _number(text: str) -> int | float:
    # JSON has one kind of number; people write 1e6 and 5e8 for counts.
    value = float(text)
    return int(value) if value.is_integer() else value


def _parse_json(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_float=_number, object_pairs_hook=_refuse_twice)
    except json.JSONDecodeError as error:
        raise UserError(f"{what} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except ValueError as error:
        raise UserError(f"{what}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what} must hold a JSON object, {{...}}, not {type(value).__name__}")
    return value


def _parse_value(text: str, kind: Any) -> Any:
    """JSON where it is JSON, else text; a field of text takes numbers as text too (data.split, name=2024)."""
    try:
        value = json.loads(text, parse_float=_number, object_pairs_hook=_refuse_twice)
    except ValueError:
        return text
    return value if isinstance(value, str) or value is None or strip(kind) is not str else text


def _check_override(key: str, text: str) -> str:
    """What is wrong with the form of an override KEY=VALUE or with its key, or ""."""
    _, equals, value = text.partition("=")
    if not equals:
        return f"override {text!r} is not KEY=VALUE"
    if value[:1] in ("[", "{"):
        try:
            json.loads(value, object_pairs_hook=_refuse_twice)
        except ValueError as error:
            return f"override {text}: the value is not JSON ({error}); mind that the shell takes quotes away"
    parts = key.split(".")
    for depth in range(1, len(parts) + 1):
        head = tuple(parts[:depth])
        kind = kind_at(RunConfig, head)
        if kind is None:
            return f"override {text}: unknown key {'.'.join(head)}; {nearest_key(RunConfig, _as_location(head, parts))}"
        if depth < len(parts) and not subfields(kind):
            return f"override {text}: {'.'.join(head)} is one value; override it whole, {'.'.join(head)}=..."
    return ""


def _as_location(head: tuple[str, ...], parts: list[str]) -> tuple[str, ...]:
    """Where to look for the nearest key: optim.lr may mean optimizer.lr, so a wrong section keeps its last name."""
    if len(head) == len(parts):
        return head
    close = get_close_matches(head[-1].lstrip("-"), subfields(RunConfig) or {}, n=1)
    return (close[0], *parts[1:]) if close and kind_at(RunConfig, (close[0], *parts[1:-1])) is not None else head


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    section = raw
    for name in parents:
        if not isinstance(section.get(name), dict):
            section[name] = {}
        section = section[name]
    section[last] = value


def _get(raw: dict[str, Any], key: str) -> Any:
    value: Any = raw
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _drop_replaced(raw: dict[str, Any], overridden: Iterable[str]) -> None:
    replaced = {
        other for key in overridden if _get(raw, key) not in (None, [], "") for other in TAKES_PLACE_OF.get(key, ())
    }
    if "tokenizer.type" in overridden and _get(raw, "tokenizer.type") != "bpe":
        replaced.add("tokenizer.vocab_size")
    for key in replaced - set(overridden):
        section, name = key.split(".")
        if isinstance(raw.get(section), dict):
            raw[section].pop(name, None)


def _without_effect(config: RunConfig, overridden: dict[str, str]) -> list[str]:
    mistakes = []
    dumped = config.model_dump()
    for keys, acts, reason in ACTS_WHEN:
        for key in keys:
            if key in overridden and _get(dumped, key) is not None and not acts(config):
                mistakes.append(f"override {overridden[key]} has no effect: {reason}")
    return mistakes
