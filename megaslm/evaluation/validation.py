"""Is a model fit for use? Everything that a user of it relies on, checked and measured.

Every check is made, also after one that failed, as far as it can be: each says what was found and what was expected.
"""

import argparse
import functools
import math
import operator
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megaslm.checkpoint import (
    EXPORT_RECORD,
    WEIGHTS,
    Checkpoint,
    ModelSource,
    compare_fingerprints,
    compare_logits,
    inspect_path,
    open_model,
    take_fingerprint,
    verify_export,
)
from megaslm.data import TextSource, Tokenizer, ValidationData
from megaslm.errors import UserError
from megaslm.evaluation.loss import evaluate_text, evaluate_tokens
from megaslm.evaluation.placement import Placement, choose_placement
from megaslm.generation import GenerationOptions, Generator
from megaslm.model import LanguageModel, count_parameters

SIZE_TOLERANCE = 0.1
# Real text that every machine has.
DEFAULT_TEXT = Path(argparse.__file__)
MAX_TOKENS = 8192
PROMPTS = 4
PROMPT_TOKENS = 16
NEW_TOKENS = 32
PREFILL_TOKENS = 512
DECODED_TOKENS = 64


@dataclass(frozen=True)
class ValidationOptions:
    """What a model is tried on.

    Attributes:
        text, data: inputs or token files (PREFIX) whose perplexity is measured, up to `max_tokens` of each. Neither:
            a file of Python's standard library.
        max_perplexity: the highest that passes. None: that of a uniform guess, the size of the vocabulary; of a
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

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def validate_model(path: str | Path, options: ValidationOptions = ValidationOptions()) -> ValidationReport:
    """Check the checkpoint, run folder, export or hub name at `path`, as `open_model` takes it.

    UserError where there is no model to be checked, or the options do not fit it. What is wrong with the model itself
    is a check that failed.
    """
    placement = choose_placement(options.device, options.dtype)
    try:
        source = open_model(path, options.tokenizer, verify=False)
    except UserError as error:
        faults = find_faults(Path(path)) if Path(path).is_dir() else None
        if not faults:
            raise
        report = ValidationReport(str(path), "unknown", str(placement))
        report.checks += [
            Check("files", "; ".join(faults), "as they were written", False),
            Check("opens", str(error), "yes", False),
        ]
        return report
    return _Validation(source, options, placement).run()


def find_faults(path: Path) -> list[str] | None:
    """What is wrong with the files of a checkpoint or an export of ours; None: nothing says how they should be."""
    if (path / EXPORT_RECORD).is_file():
        return verify_export(path)
    if (path / "config.json").is_file():
        return None
    return getattr(inspect_path(path), "damage", None)


class _Validation:
    """The checks of one model."""

    def __init__(self, source: ModelSource, options: ValidationOptions, placement: Placement):
        self.source, self.options, self.placement = source, options, placement
        self.config = source.config
        self.report = ValidationReport(str(source.path), source.kind, str(placement))
        self.figures = self.report.figures
        self.model: LanguageModel | None = None
        if source.tokenizer is None and options.text:
            raise UserError(f"{source.path} has no tokenizer, which text needs: --tokenizer DIR")
        if source.tokenizer is None and options.max_perplexity and not options.data:
            raise UserError(f"{source.path} has no tokenizer: a perplexity needs --tokenizer DIR, or --data PREFIX")
        # Mistakes in what is to be read are told at once.
        self.data = [self._token_file(prefix) for prefix in options.data]
        if options.text:
            TextSource(options.text)

    def _token_file(self, prefix: str) -> ValidationData:
        tokenizer = self.source.tokenizer
        return ValidationData(
            [prefix],
            self.config.context_length,
            vocab_size=self.config.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint if tokenizer else None,
        )

    def run(self) -> ValidationReport:
        with torch.device("meta"):
            network = LanguageModel(self.config)
        expected = sum(parameter.numel() for parameter in network.parameters())
        self._try("files", "as they were written", self._files)
        self._check("parameters", f"{expected:,}, within 10 %", lambda: self._parameters(expected))
        num_bytes = self._bytes_expected(expected)
        self._check("weights on disk", f"{num_bytes / 1e6:,.2f} MB, within 10 %", lambda: self._size(num_bytes))
        self._try("opens", "yes", self._open)
        if self.model is None:
            return self.report
        self._check("fingerprint", "as when it was saved", self._fingerprint)
        self._check("generates", "text of several tokens", self._generate)
        bound, expected = self._bound()
        self._check("perplexity", expected, lambda: self._perplexity(bound))
        self._check("speed", "measured", self._speed)
        self._check("peak memory", "measured", self._memory)
        if self.source.kind == "huggingface" and not self.options.quick:
            self._try("transformers", "opens it, and computes the same logits", self._transformers)
        return self.report

    def _check(self, name: str, expected: str, make: Callable[[], tuple[str, bool | None]]) -> None:
        value, passed = make()
        self.report.checks.append(Check(name, value, expected, passed))

    def _try(self, name: str, expected: str, make: Callable[[], tuple[str, bool | None]]) -> None:
        """A check of which a UserError is the outcome, and no mistake in the command."""
        try:
            self._check(name, expected, make)
        except UserError as error:
            self.report.checks.append(Check(name, str(error), expected, False))

    def _files(self) -> tuple[str, bool | None]:
        faults = find_faults(self.source.path)
        if faults is None:
            return "not known: no record of ours lies with them", None
        return "; ".join(faults) or "sound", not faults

    def _parameters(self, expected: int) -> tuple[str, bool]:
        found = self.figures["parameters"] = sum(math.prod(shape) for shape in self.source.weights.shapes.values())
        return f"{found:,}", _near(found, expected)

    def _bytes_expected(self, parameters: int) -> int:
        """Those of a checkpoint are fp32 and have the vocabulary padded."""
        weights = self.source.weights
        if isinstance(weights, Checkpoint):
            return 4 * parameters
        return count_parameters(self.config) * weights.dtype.itemsize

    def _size(self, expected: int) -> tuple[str, bool]:
        weights = self.source.weights
        if isinstance(weights, Checkpoint):
            entries = weights.manifest["tensors"][WEIGHTS].values()
            files = {weights.path / piece["file"] for entry in entries for piece in entry["pieces"]}
        else:
            files = weights.files
        found = self.figures["bytes_of_weights"] = sum(map(tensor_bytes, files))
        return f"{found / 1e6:,.2f} MB", _near(found, expected)

    def _open(self) -> tuple[str, bool]:
        started = time.perf_counter()
        placement = self.placement
        self.model = self.source.build(placement.device, placement.dtype, placement.ops)
        seconds = self.figures["open_seconds"] = time.perf_counter() - started
        return f"{len(self.source.weights.shapes):,} tensors in {seconds:.1f} s", True

    def _fingerprint(self) -> tuple[str, bool | None]:
        stored = getattr(self.source.weights, "fingerprint", None)
        if stored is None:
            return "none was saved", None
        now = take_fingerprint(self.model, stored.tokens, self.options.dtype, self.placement.device)
        difference = compare_fingerprints(stored, now)
        return difference or f"a loss of {now.loss:.4f} nats, was {stored.loss:.4f}", difference is None

    def _generate(self) -> tuple[str, bool | None]:
        """From several prompts, sampled: a sound model may well say one thing again and again when it is not."""
        tokenizer = self.source.tokenizer
        length = max(1, min(PROMPT_TOKENS, self.config.context_length // 2))
        if tokenizer is None:
            prompts = _random_ids(PROMPTS, length, self.config.vocab_size).tolist()
        else:
            ids = tokenizer.encode(default_text(tokenizer)).tolist()
            prompts = [ids[number * length : (number + 1) * length] for number in range(PROMPTS)]
        with torch.inference_mode():
            logits = self.model(torch.tensor(prompts, device=self.placement.device))
        if not logits.isfinite().all():
            return "logits that are not finite", False
        options = GenerationOptions(max_new_tokens=NEW_TOKENS, temperature=1.0)
        completions = Generator(self.model, tokenizer).generate(prompts, options)
        tokens = [token for completion in completions for token in completion.tokens]
        self.figures["samples"] = [completion.text for completion in completions]
        return f"{len(tokens):,} tokens, {len(set(tokens)):,} different ones", len(set(tokens)) > 1

    def _bound(self) -> tuple[float, str]:
        """The highest perplexity that passes, and how the table says it."""
        if bound := self.options.max_perplexity:
            return bound, f"at most {bound:,.2f}"
        tokenizer = self.source.tokenizer
        if tokenizer is not None and tokenizer.is_character and not (self.options.text or self.options.data):
            # Source code in its few characters is not what it was trained on.
            return sys.float_info.max, "finite; a bound needs text of its language (--text, --data)"
        return float(self.config.vocab_size), f"at most {self.config.vocab_size:,}, a uniform guess"

    def _perplexity(self, bound: float) -> tuple[str, bool | None]:
        source, options, length = self.source, self.options, self.config.context_length
        limits = {"batch_size": options.batch_size, "max_sequences": max(1, options.max_tokens // length)}
        sets = [evaluate_tokens(self.model, data, source.tokenizer, **limits) for data in self.data]
        for text in options.text:
            sets.append(evaluate_text(self.model, [text], source.tokenizer, seq_length=length, **limits))
        where = [*options.data, *map(str, options.text)]
        if not sets and source.tokenizer is None:
            return "not measured: there is no tokenizer; give --tokenizer DIR, or --data PREFIX", None
        if not sets:
            with tempfile.TemporaryDirectory(prefix="megaslm_") as folder:
                file = Path(folder) / DEFAULT_TEXT.name
                file.write_text(default_text(source.tokenizer), encoding="utf-8")
                sets.append(evaluate_text(self.model, [file], source.tokenizer, seq_length=length, **limits))
            where = [f"{DEFAULT_TEXT.name} of Python's standard library"]
        overall = functools.reduce(operator.add, sets)
        self.figures |= overall.record()
        mean = overall.mean
        found = f"{mean.perplexity:,.2f} over {mean.targets:,} tokens of {', '.join(where)}"
        return found, mean.loss <= math.log(bound)  # a NaN is not

    def _speed(self) -> tuple[str, None]:
        """Of one sequence: its prompt, then token by token."""
        decoded = max(1, min(DECODED_TOKENS, self.config.context_length // 2))
        length = max(1, min(PREFILL_TOKENS, self.config.context_length - decoded))
        prompt = _random_ids(1, length, self.config.vocab_size).tolist()
        generator = Generator(self.model, None)  # without a tokenizer there is no token that ends a text early
        seconds = {}
        for count in (1 + decoded, 1, 1 + decoded):  # the first warms up
            started = time.perf_counter()
            generator.generate(prompt, GenerationOptions(max_new_tokens=count))
            seconds[count] = time.perf_counter() - started
        prefill = length / seconds[1]
        decode = decoded / max(seconds[1 + decoded] - seconds[1], 1e-9)
        self.figures |= {"prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}
        return f"{prefill:,.0f} tokens/s of a prompt of {length:,}, then {decode:,.1f} new tokens/s", None

    def _memory(self) -> tuple[str, None]:
        device = self.placement.device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:  # in kB, on a Mac in bytes
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.figures["peak_memory_bytes"] = peak
        return f"{peak / 1e9:,.2f} GB on {device.type}", None

    def _transformers(self) -> tuple[str, bool]:
        try:
            found = compare_logits(self.source.path, self.source, dtype=self.source.weights.dtype)
        except UserError:
            raise
        except Exception as error:  # of transformers, on a folder that it does not open: all kinds
            return f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no message')}", False
        self.figures["logits_check"] = found.to_json()
        ids = "" if found.tokenizer_equal is not False else ", and its tokenizer gives other ids"
        return f"{found.max_difference:.1e} apart, {found.bound:.0e} is allowed{ids}", found.passed


def tensor_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file, without its header."""
    with open(path, "rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def default_text(tokenizer: Tokenizer) -> str:
    """A file of the standard library, without the characters that a character tokenizer refuses."""
    text = DEFAULT_TEXT.read_text(encoding="utf-8")
    if tokenizer.refusal(text) is None:
        return text
    refused = {character for character in set(text) if tokenizer.refusal(character) is not None}
    return "".join(character for character in text if character not in refused)


def _random_ids(rows: int, length: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def _near(found: float, expected: float) -> bool:
    return abs(found - expected) <= SIZE_TOLERANCE * expected
