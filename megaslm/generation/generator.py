"""Text from a model: prompts in, completions out, a token for every row at each step.

Shapes: B rows (prompts), T tokens that the longest row can reach, V vocabulary.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from megaslm.data import Tokenizer
from megaslm.errors import UserError
from megaslm.generation.cache import KeyValueCache
from megaslm.generation.linear import fast_linear_layers, linear
from megaslm.generation.options import Completion, GenerationOptions
from megaslm.generation.processors import RepeatedNgrams, draw, keep_top_k, keep_top_p, penalize_repetition
from megaslm.generation.text import TextStream
from megaslm.model import LanguageModel

# Tokens of a prompt that are computed at once: bounds the memory of scores and hidden states, not the speed.
PROMPT_CHUNK = 512

DEFAULTS = GenerationOptions()
OnText = Callable[[int, str], None]


class Generator:
    """Generates with a model in evaluation mode, on the device and in the type of its weights.

    Args:
        tokenizer: None where prompts are ids and no text is wanted: the texts are empty then.
        eod_ids: ids that end a text. None: the tokenizer's end-of-document token.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer | None, eod_ids: Iterable[int] | None = None):
        self.model = model
        self.tokenizer = tokenizer
        self.context_length = model.config.context_length
        if eod_ids is None:
            eod_ids = () if tokenizer is None or tokenizer.eod_id is None else (tokenizer.eod_id,)
        self.eod_ids = frozenset(eod_ids)
        self.bos_id = None if tokenizer is None else tokenizer.bos_id

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        options: GenerationOptions = DEFAULTS,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """A completion for each prompt, text or ids, all of them generated side by side as one batch.

        on_text: called with a prompt's number and a piece of its text, as soon as it is certain; put together, the
            pieces of a number are the text of its completion. An exception it raises ends the generation.

        Rows do not change each other's numbers, but for the last bits, in which a batch differs from a single row: in
        fp32 the texts are the same, and in bf16 and fp16 these bits may decide between tokens that are as probable.

        UserError for a prompt that is empty where the tokenizer has no token to begin with, is longer than the context,
        or has ids that the model does not know; for logits that are not finite.
        """
        if isinstance(prompts, str):
            raise UserError("the prompts are one string; give a list of prompts")
        if options.stop and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer; give one, or leave them out")
        ids = [self._ids(number, prompt) for number, prompt in enumerate(prompts)]
        if not ids:
            return []
        assert not self.model.training, "generation is for a model in evaluation mode"
        with torch.inference_mode(), fast_linear_layers(self.model):
            batch = _Batch(self, ids, options, on_text)
            batch.run()
        return [row.completion() for row in batch.rows]

    def encode(self, text: str, start_of_document: bool = False, where: str = "the prompt") -> list[int]:
        """Ids of a prompt, which an error calls `where`. With `start_of_document`, behind the token that stands before
        each document in training: the one that ends them, where the tokenizer names no other. UserError for a tokenizer
        that has none, for a prompt longer than the context, and for text that is not Unicode."""
        if self.tokenizer is None:
            raise UserError("a prompt of text needs a tokenizer; give one, or give ids")
        if start_of_document and self.bos_id is None:
            raise UserError(
                f"the tokenizer {self.tokenizer.name} has no token that begins or ends a document, for a prompt to "
                "begin with; leave start_of_document out"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes that were not UTF-8, as Python hides them in a str
            raise UserError(f"{where} is not UTF-8 text, from character {error.start + 1} on; convert it") from None
        ids = self.tokenizer.encode(text, where).tolist()
        ids = [self.bos_id, *ids] if start_of_document else ids
        self._check_length(ids, where)
        return ids

    def _ids(self, number: int, prompt: str | Sequence[int]) -> list[int]:
        """A prompt as ids that the model can go on with."""
        where = f"prompt {number + 1}"
        ids = self.encode(prompt, where=where) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids:
            if self.bos_id is None:
                raise UserError(f"{where} is empty, and there is no token that begins a document; give a prompt")
            ids = [self.bos_id]
        self._check_length(ids, where)
        vocabulary = self.model.config.vocab_size
        if wrong := [token for token in ids if not 0 <= token < vocabulary]:
            raise UserError(f"{where}: the model has {vocabulary:,} tokens, and no token {wrong[0]}")
        return ids

    def _check_length(self, ids: list[int], where: str) -> None:
        if len(ids) > self.context_length:
            raise UserError(
                f"{where} has {len(ids):,} tokens, and the model's context {self.context_length:,}; shorten it, or "
                "stretch the context (tools/generate.py: --context_length and --rope_scaling)"
            )


class _Row:
    """What the host knows of one prompt's text."""

    def __init__(self, number: int, prompt: list[int], generator: Generator, options: GenerationOptions):
        room = generator.context_length - len(prompt) + 1  # the last token is not read, only written
        self.number = number
        self.prompt = prompt
        self.most = min(options.max_new_tokens, room)
        self.reason = None
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.stream = generator.tokenizer and TextStream(generator.tokenizer, prompt, options.stop)
        self._at_most = "length" if options.max_new_tokens <= room else "context"
        self._eod_ids = generator.eod_ids

    def append(self, token: int) -> str:
        """Take the next token; returns the text that is certain with it. `reason` says whether the text has ended."""
        new = ""
        if token in self._eod_ids:
            self.reason = "eod"
        else:
            self.tokens.append(token)
            if self.stream:
                new = self.stream.feed(token)
            if len(self.tokens) == self.most:
                self.reason = self._at_most
        if self.stream and self.reason and not self.stream.stopped:
            new += self.stream.finish()
        if self.stream and self.stream.stopped:
            self.reason = "stop"
        self.pieces.append(new)
        return new

    def completion(self) -> Completion:
        return Completion(tuple(self.tokens), "".join(self.pieces), self.reason)


class _Batch:
    """One call of `Generator.generate`."""

    def __init__(
        self, generator: Generator, prompts: list[list[int]], options: GenerationOptions, on_text: OnText | None
    ):
        self.model = generator.model
        self.options = options
        self.on_text = on_text
        self.rows = [_Row(number, prompt, generator, options) for number, prompt in enumerate(prompts)]
        self.device = self.model.head.weight.device
        longest = max(map(len, prompts))
        self.steps = max(row.most for row in self.rows)
        padding = torch.tensor([longest - len(prompt) for prompt in prompts])
        self.cache = KeyValueCache(self.model.config, longest + self.steps - 1, padding.to(self.device))
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        self.prompts_BT = torch.tensor(padded, device=self.device)
        self._prepare_choice(prompts)

    def _prepare_choice(self, prompts: list[list[int]]) -> None:
        """What the choice of tokens needs to know of the prompts."""
        options = self.options
        self.seen_BV = self.ngrams = self.uniform_SB = None
        if options.repetition_penalty != 1:
            shape = (len(prompts), self.model.config.vocab_size)
            self.seen_BV = torch.zeros(shape, dtype=torch.bool, device=self.device)
            for seen_V, prompt in zip(self.seen_BV, prompts, strict=True):
                seen_V[torch.tensor(prompt, device=self.device)] = True
        if options.no_repeat_ngram_size:
            self.ngrams = RepeatedNgrams(options.no_repeat_ngram_size, prompts)
        if options.temperature > 0:
            earlier = Counter()
            draws = []
            for prompt in prompts:
                key = tuple(prompt)
                draws.append(_uniform(options.seed, key, earlier[key], self.steps))
                earlier[key] += 1
            self.uniform_SB = torch.stack(draws, dim=1).to(self.device)

    def run(self) -> None:
        chunks = self.prompts_BT.split(PROMPT_CHUNK, dim=1)
        for chunk in chunks[:-1]:
            self.model.decoder(chunk, cache=self.cache)
        tokens_BS = chunks[-1]
        for step in range(self.steps):
            next_B, largest_B = self._choose(self._logits(tokens_BS), step)
            self._take(next_B.tolist(), largest_B.tolist())
            if all(row.reason for row in self.rows):
                return
            tokens_BS = next_B[:, None]

    def _logits(self, tokens_BS: Tensor) -> Tensor:
        """Of the token after the last, [B, V] fp32."""
        hidden_BE = self.model.decoder(tokens_BS, cache=self.cache)[:, -1]
        return linear(hidden_BE, self.model.head.weight)[:, : self.model.config.vocab_size].float()

    def _choose(self, logits_BV: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The next token of each row, and the largest logit, [B] each; without meaning where that is not finite."""
        options = self.options
        if self.seen_BV is not None:
            logits_BV = penalize_repetition(logits_BV, self.seen_BV, options.repetition_penalty)
        if self.ngrams is not None:
            logits_BV = self.ngrams.ban(logits_BV)
        largest_B, next_B = logits_BV.max(-1)
        if options.temperature > 0:
            # Without the largest one, no temperature takes the others out of fp32 but to -inf.
            logits_BV = (logits_BV - largest_B[:, None]) / options.temperature
            if options.top_k:
                logits_BV = keep_top_k(logits_BV, options.top_k)
            if options.top_p < 1:
                logits_BV = keep_top_p(logits_BV, options.top_p)
            next_B = draw(logits_BV, self.uniform_SB[step])
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, next_B[:, None], True)
        return next_B, largest_B

    def _take(self, tokens: list[int], largest: list[float]) -> None:
        for row, token, logit in zip(self.rows, tokens, largest, strict=True):
            if row.reason:
                continue
            if not math.isfinite(logit):
                raise UserError(
                    f"the model's logits are not finite, after {len(row.tokens)} tokens for prompt {row.number + 1}: "
                    "fp16 overflows where bf16 and fp32 do not, and damaged weights do in any type; use bf16 or fp32, "
                    "or check the model with tools/validate_model.py"
                )
            text = row.append(token)
            if self.ngrams is not None:
                self.ngrams.append(row.number, token)
            if text and self.on_text:
                self.on_text(row.number, text)


def _uniform(seed: int, prompt: tuple[int, ...], earlier: int, count: int) -> Tensor:
    """`count` numbers in [0, 1), fp64, for a prompt that stands `earlier` times before in its batch."""
    digest = hashlib.blake2b(f"{seed}/{earlier}/{prompt}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)
