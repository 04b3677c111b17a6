"""Is a model fit for use? Everything that a user of it relies on, checked and measured.

Every check is made, also after one that failed, as far as it can be: each says what was found and what was expected.
"""

import json
import math
import operator
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from megaslm.checkpoint import (
    EXPORT_RECORD,
    WEIGHTS,
    Checkpoint,
    DamagedCheckpoint,
    ModelSource,
    check_fingerprint,
    compare_logits,
    inspect_path,
    newest_checkpoint,
    open_model,
    verify_export,
)
from megaslm.data import STANDARD_FILE, standard_text
from megaslm.errors import UserError, first_line
from megaslm.evaluation.placement import Placement, choose_placement
from megaslm.evaluation.sets import Windows, open_sets
from megaslm.generation import GenerationOptions, Generator
from megaslm.model import LanguageModel, count_parameters
from megaslm.parallel import memory_used

SIZE_TOLERANCE = 0.1
MAX_TOKENS = 8192
PROMPTS = 4
PROMPT_TOKENS = 16
NEW_TOKENS = 32
PREFILL_TOKENS = 512
DECODED_TOKENS = 64
SPEED_RUNS = 3  # of which the median counts
Outcome = tuple[str, bool | None]  # what was found, and whether it passes


@dataclass(frozen=True)
class ValidationOptions:
    """What a model is tried on.

    Attributes:
        text, data: inputs or token files (PREFIX) whose perplexity is measured. Neither: a file of Python's standard
            library.
        max_tokens: of each of them, read as many windows of the model's context as these fill, and one at least.
        max_perplexity: the highest that passes, finite. None: that of a uniform guess, the size of the vocabulary; of a
            character tokenizer on the standard library any that is finite.
        tokenizer: folder or hub name that stands in for the model's own.
        quick: leave out the comparison of an export with transformers' own computation.
        device, dtype: see `choose_placement`.
    """

    text: Sequence[str] = ()
    data: Sequence[str] = ()
    max_perplexity: float | None = None
    max_tokens: int = MAX_TOKENS
    tokenizer: str | None = None
    quick: bool = False
    device: str | None = None
    dtype: str = "fp32"
    batch_size: int = 4

    def __post_init__(self):
        if self.max_perplexity is not None and not 1 <= self.max_perplexity < math.inf:
            raise UserError(f"max_perplexity {self.max_perplexity}: give a finite number, 1 or more")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens {self.max_tokens}: give 1 or more")


@dataclass(frozen=True)
class Check:
    """passed: None where nothing was to be judged: a measurement, or a check that could not be made."""

    name: str
    value: str
    expected: str
    passed: bool | None


@dataclass
class ValidationReport:
    """The checks in the order in which they were made, and the numbers behind them by name (SI units: bytes, s)."""

    path: str
    kind: str
    arithmetic: str
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def check(self, name: str, expected: str, make: Callable[[], Outcome]) -> None:
        """Add a check. One that ends in an error has failed: the others are made all the same."""
        try:
            found, passed = make()
        except UserError as error:
            found, passed = str(error), False
        except Exception as error:  # of what is wrong with a model, or of a machine that is too small for it
            found = f"{type(error).__name__}: {first_line(error)}"
            passed = False
        self.checks.append(Check(name, found, expected, passed))

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def validate_model(path: str | Path, options: ValidationOptions = ValidationOptions()) -> ValidationReport:
    """Check the checkpoint, run folder (its newest checkpoint), export or hub name at `path`.

    UserError where there is no model to be checked, or the options do not fit it. What is wrong with the model itself
    is a check that failed.
    """
    placement = choose_placement(options.device, options.dtype)
    path = newest_checkpoint(path)
    try:
        source = open_model(path, options.tokenizer, verify=False)
    except UserError as error:
        if not _holds_weights(path, error) or options.tokenizer and _opens(path):
            raise
        report = ValidationReport(str(path), "unknown", str(placement))
        report.check("files", "as they were written", lambda: _judge_files(path))
        report.checks.append(Check("opens", str(error), "yes", False))
        return report
    return _Validation(source, options, placement).run()


def _holds_weights(path: Path, error: UserError) -> bool:
    """Whether what does not open is a model all the same."""
    return isinstance(error, DamagedCheckpoint) or any(path.glob("*.safetensors")) and (path / "config.json").is_file()


def _opens(path: Path) -> bool:
    """With the tokenizer of its own: then it was the one given that does not fit."""
    try:
        open_model(path, verify=False)
    except UserError:
        return False
    return True


def find_faults(path: Path) -> list[str] | None:
    """What is wrong with the files of a checkpoint or an export of ours; None: nothing says how they should be."""
    if (path / EXPORT_RECORD).is_file():
        return verify_export(path)
    if (path / "config.json").is_file():
        return None
    return inspect_path(path).damage


def _judge_files(path: Path) -> Outcome:
    faults = find_faults(path)
    if faults is None:
        return "not known: no record of ours lies with them", None
    return "; ".join(faults) or "sound", not faults


class _Validation:
    """The checks of one model."""

    def __init__(self, source: ModelSource, options: ValidationOptions, placement: Placement):
        self.source, self.options, self.placement = source, options, placement
        self.config = source.config
        self.report = ValidationReport(str(source.path), source.kind, str(placement))
        self.figures = self.report.figures
        self.model: LanguageModel | None = None
        if source.tokenizer is None and options.max_perplexity and not options.data and not options.text:
            raise UserError(f"{source.path} has no tokenizer: a perplexity needs --tokenizer DIR, or --data PREFIX")
        length = self.config.context_length
        self.windows = Windows(length, max_sequences=max(1, options.max_tokens // length))
        # Mistakes in what is to be read are told at once, those of ids too, and are no verdict on the model.
        self.sets = open_sets(source, options.data, options.text, self.windows)
        for one in self.sets:
            one.data.batch(0, min(self.windows.max_sequences, one.data.num_windows))

    def run(self) -> ValidationReport:
        check = self.report.check
        check("files", "as they were written", lambda: _judge_files(self.source.path))
        expected = self._parameters_expected()
        check("parameters", f"{expected:,}, within 10 %", lambda: self._parameters(expected))
        num_bytes = self._bytes_expected(expected)
        check("weights on disk", f"{num_bytes / 1e6:,.2f} MB, within 10 %", lambda: self._size(num_bytes))
        check("opens", "yes", self._open)
        if self.model is None:
            return self.report
        check("fingerprint", "as when it was saved", self._fingerprint)
        check("generates", "text of several tokens", self._generate)
        bound, expected = self._bound()
        check("perplexity", expected, lambda: self._perplexity(bound))
        check("speed", "measured", self._speed)
        check("peak memory", "measured", self._memory)
        if self.source.kind == "huggingface" and not self.options.quick:
            check("transformers", "opens it, and computes the same logits", self._transformers)
        return self.report

    def _parameters_expected(self) -> int:
        """By the configuration: those of a checkpoint have the vocabulary padded."""
        if self.source.kind == "huggingface":
            return count_parameters(self.config)
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in LanguageModel(self.config).parameters())

    def _stored(self) -> list[tuple[int, int]]:
        """Elements, and bytes of each, of every tensor of weights in the files."""
        weights = self.source.weights
        if isinstance(weights, Checkpoint):
            return [(math.prod(shape), 4) for shape in weights.shapes.values()]
        return [(math.prod(shape), dtype.itemsize) for _, shape, dtype in weights.stored.values()]

    def _parameters(self, expected: int) -> Outcome:
        found = self.figures["parameters"] = sum(count for count, _ in self._stored())
        return f"{found:,}", _near(found, expected)

    def _bytes_expected(self, parameters: int) -> float:
        """Of parameters that are stored in the types that the files have, which may be several."""
        stored = self._stored()
        return parameters * sum(count * size for count, size in stored) / sum(count for count, _ in stored)

    def _size(self, expected: float) -> Outcome:
        weights = self.source.weights
        names: dict[Path, set[str]] = {}
        if isinstance(weights, Checkpoint):
            for name, entry in weights.manifest["tensors"][WEIGHTS].items():
                for piece in entry["pieces"]:
                    names.setdefault(weights.path / piece["file"], set()).add(piece.get("tensor", name))
        else:
            for name, (path, _, _) in weights.stored.items():
                names.setdefault(path, set()).add(name)
        found = self.figures["bytes_of_weights"] = sum(tensor_bytes(path, of_it) for path, of_it in names.items())
        return f"{found / 1e6:,.2f} MB", _near(found, expected)

    def _open(self) -> Outcome:
        started = time.perf_counter()
        placement = self.placement
        self.model = self.source.build(placement.device, placement.dtype, placement.ops)
        seconds = self.figures["open_seconds"] = time.perf_counter() - started
        return f"{len(self.source.weights.shapes):,} tensors in {seconds:.1f} s", True

    def _fingerprint(self) -> Outcome:
        stored = getattr(self.source.weights, "fingerprint", None)
        if stored is None:
            return "none was saved", None
        check = check_fingerprint(self.model, stored, self.placement.device)
        return check.text if check.equal is not None else f"not compared: {check.text}", check.equal

    def _generate(self) -> Outcome:
        """From several prompts, sampled: a sound model may well say one thing again and again when it is not."""
        tokenizer = self.source.tokenizer
        prompts = self._prompts()
        with torch.inference_mode():
            logits = self.model(torch.tensor(prompts, device=self.placement.device))
        if not logits.isfinite().all():
            return "logits that are not finite", False
        options = GenerationOptions(max_new_tokens=NEW_TOKENS, temperature=1.0)
        completions = Generator(self.model, tokenizer, self.source.eod_ids).generate(prompts, options)
        tokens = [token for completion in completions for token in completion.tokens]
        self.figures["samples"] = [
            {"prompt": tokenizer.decode(prompt) if tokenizer else prompt, "text": completion.text}
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return f"{len(tokens):,} tokens, {len(set(tokens)):,} different ones", len(set(tokens)) > 1

    def _prompts(self) -> list[list[int]]:
        """[PROMPTS] of one length: of text if the tokenizer knows enough of it, else ids at random."""
        length = max(1, min(PROMPT_TOKENS, self.config.context_length // 2))
        ids = self._standard_ids()
        if len(ids) < PROMPTS * length:
            return _random_ids(PROMPTS, length, self.config.vocab_size).tolist()
        return [ids[number * length : (number + 1) * length] for number in range(PROMPTS)]

    def _standard_ids(self) -> list[int]:
        """None of a text that, to the tokenizer, is spaces and line ends."""
        tokenizer = self.source.tokenizer
        text = "" if tokenizer is None else standard_text(tokenizer)
        return tokenizer.encode(text).tolist() if text.strip() else []

    def _bound(self) -> tuple[float, str]:
        """The highest perplexity that passes, and how the table says it."""
        if bound := self.options.max_perplexity:
            return bound, f"at most {bound:,.2f}"
        tokenizer = self.source.tokenizer
        if tokenizer is not None and tokenizer.is_character and not self.sets:
            # Source code in its few characters is not what it was trained on.
            return sys.float_info.max, "finite; a bound needs text of its language (--text, --data)"
        return float(self.config.vocab_size), f"at most {self.config.vocab_size:,}, a uniform guess"

    def _perplexity(self, bound: float) -> Outcome:
        source, sets = self.source, self.sets
        where = ", ".join(one.name for one in sets)
        if not sets:
            if source.tokenizer is None:
                return "not measured: there is no tokenizer; give --tokenizer DIR, or --data PREFIX", None
            if len(self._standard_ids()) < PROMPTS * PROMPT_TOKENS:
                return (
                    f"not measured: the tokenizer knows too little of {STANDARD_FILE.name}; give --text of its "
                    "language, or --data PREFIX"
                ), None
            where = f"{STANDARD_FILE.name} of Python's standard library"
            with tempfile.TemporaryDirectory(prefix="megaslm_") as folder:
                file = Path(folder) / STANDARD_FILE.name
                file.write_text(standard_text(source.tokenizer), encoding="utf-8")
                sets = open_sets(source, (), [str(file)], self.windows)
        sums = [one.evaluate(self.model, source.tokenizer, self.options.batch_size) for one in sets]
        overall = reduce(operator.add, sums)
        self.figures |= overall.record()
        mean = overall.mean
        return f"{mean.perplexity:,.2f} over {mean.targets:,} tokens of {where}", mean.loss <= math.log(bound)

    def _speed(self) -> Outcome:
        """Of one sequence: its prompt, then token by token."""
        context = self.config.context_length
        self.figures |= {"prefill_tokens_per_s": None, "decode_tokens_per_s": None}
        if context < 2:
            return f"not measurable in a context of {context} token", None
        decoded = min(DECODED_TOKENS, context // 2)
        length = min(PREFILL_TOKENS, context - decoded)
        prompt = _random_ids(1, length, self.config.vocab_size).tolist()
        generator = Generator(self.model, None)  # without a tokenizer there is no token that ends a text early

        def seconds(count: int) -> float:
            started = time.perf_counter()
            generator.generate(prompt, GenerationOptions(max_new_tokens=count))
            return time.perf_counter() - started

        seconds(1 + decoded)  # warms up
        first = statistics.median(seconds(1) for _ in range(SPEED_RUNS))
        rest = statistics.median(seconds(1 + decoded) for _ in range(SPEED_RUNS)) - first
        if rest <= 0:
            return f"not measurable: {decoded} new tokens took no longer than one", None
        prefill, decode = length / first, decoded / rest
        self.figures |= {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}
        return f"{prefill:,.0f} tokens/s of a prompt of {length:,}, then {decode:,.1f} new tokens/s", None

    def _memory(self) -> Outcome:
        used = memory_used(self.placement.device)
        self.figures |= {f"peak_{name}": value for name, value in used.items()}
        reserved = used.get("memory_reserved_bytes")
        more = "" if reserved is None else f", {reserved / 1e9:,.2f} GB reserved"
        return f"{used['memory_bytes'] / 1e9:,.2f} GB on {self.placement.device.type}{more}", None

    def _transformers(self) -> Outcome:
        # A tokenizer that stands in for the folder's own is not the one that transformers would find there.
        source = replace(self.source, tokenizer=None) if self.options.tokenizer else self.source
        found = compare_logits(source.path, source, dtype=source.weights.dtype)
        self.figures["logits_check"] = found.to_json()
        ids = "" if found.tokenizer_equal is not False else ", and its tokenizer gives other ids"
        return f"{found.max_difference:.1e} apart, {found.bound:.0e} is allowed{ids}", found.passed


def tensor_bytes(path: Path, names: Iterable[str]) -> int:
    """Bytes that a safetensors file has of these tensors: fewer than its header says if it was cut short."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        there = path.stat().st_size - 8 - length
    ends = [header[name]["data_offsets"] for name in names]
    return sum(max(0, min(end, there) - start) for start, end in ends)


def _random_ids(rows: int, length: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def _near(found: float, expected: float) -> bool:
    return abs(found - expected) <= SIZE_TOLERANCE * expected
