"""What is asked of a generation, and what comes of it."""

import numbers
from dataclasses import dataclass, fields
from typing import Literal

from megaslm.errors import UserError

# Numbers that logits are multiplied with or divided by: beyond these, the results do not fit in fp32.
SMALLEST, LARGEST = 1e-30, 1e30
KINDS = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    tuple: (tuple, "a tuple of strings"),
}


@dataclass(frozen=True)
class GenerationOptions:
    """How to go on with a prompt. UserError for values of another kind or out of range, named as
    tools/generate.py spells them.

    The definitions and their order are those of transformers' generate: repetition_penalty, no_repeat_ngram_size,
    temperature, top_k, top_p.
    """

    max_new_tokens: int = 128
    """Most tokens to generate."""
    temperature: float = 0.0
    """0: the most probable token each time (greedy). Else logits are divided by it and a token is drawn."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0: from all. Not with temperature 0."""
    top_p: float = 1.0
    """Draw from the fewest tokens that are this probable together (arXiv:1904.09751). Not with temperature 0."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that the prompt or the text has, and multiplies negative ones
    (arXiv:1909.05858); 1: off."""
    no_repeat_ngram_size: int = 0
    """No sequence of so many tokens comes twice, those of the prompt counted; 0: off. Where every token would complete
    one, all are allowed."""
    stop: tuple[str, ...] = ()
    """Strings that end a text, which is cut before them."""
    seed: int = 0
    """Of the draws. What is drawn for a prompt depends on it, on the prompt, and on how often the same prompt stands
    before it in the batch; not on other prompts."""

    def __post_init__(self):
        for field in fields(self):
            value, (kind, named) = getattr(self, field.name), KINDS[type(field.default)]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(f"{field.name} {value}: give {named}")
        if not all(isinstance(one, str) for one in self.stop):
            raise UserError(f"stop {self.stop}: give a tuple of strings")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: give 1 or more")
        if self.temperature != 0 and not SMALLEST <= self.temperature <= LARGEST:
            raise UserError(f"temperature {self.temperature}: give 0 (greedy), or from {SMALLEST:g} to {LARGEST:g}")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: give 1 or more, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: give a probability above 0, at most 1 (all tokens)")
        if not SMALLEST <= self.repetition_penalty <= LARGEST:
            raise UserError(
                f"repetition_penalty {self.repetition_penalty}: give 1 for no penalty, or from {SMALLEST:g} to "
                f"{LARGEST:g}"
            )
        if self.no_repeat_ngram_size < 0:
            raise UserError(f"no_repeat_ngram_size {self.no_repeat_ngram_size}: give 1 or more, or 0 to allow all")
        if self.temperature == 0 and (self.top_k > 0 or self.top_p < 1):
            raise UserError(
                "top_k and top_p have no effect with temperature 0: set them to 0 and 1, or the temperature above 0"
            )
        if "" in self.stop:
            raise UserError("a stop string is empty; give at least one character, or leave it out")


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt."""

    tokens: tuple[int, ...]
    """All ids that were generated, but for the end of the document."""
    text: str
    """Of these tokens, cut before a stop string."""
    finish_reason: Literal["eod", "stop", "length", "context"]
    """The model ended the document; a stop string came; max_new_tokens are there; the context is full."""
