"""A model of ours as lm-evaluation-harness sees one. Imports lm_eval; `run_harness` says so where that is missing.

Requests are answered as by its own adapter of transformers models (lm_eval/models/huggingface.py), in fp32 arithmetic
on the logits. Differences:

- Where that one stops with an assertion, a continuation longer than the context is scored in pieces, and one that
  leaves no token of its own when encoded with its context is encoded by itself.
- Text is text, as everywhere in megaslm: <|endoftext|> written in a document is encoded by its characters, and that
  one takes it for the token that ends documents, which is often far more probable.
"""

import contextlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from megaslm.data import Tokenizer
from megaslm.errors import UserError
from megaslm.evaluation.likelihood import Continuation, Likelihood, count_windows, score_continuations
from megaslm.generation import GenerationOptions, Generator
from megaslm.model import LanguageModel

logger = logging.getLogger(__name__)

MAX_GEN_TOKS = 256  # of a task that does not say; the harness's default
# Of its names for the options of generation, those that are ours; the first three are of draws alone.
OF_DRAWS = ("top_k", "top_p", "seed")
OPTIONS = (*OF_DRAWS, "repetition_penalty", "no_repeat_ngram_size")


class HarnessModel(TemplateLM):
    """Loglikelihoods and generations of `model` for lm_eval.

    Args:
        batch_size: requests that are answered in one forward pass.
        quiet: show no progress.
        eod_ids: ids that end a generation; None: the tokenizer's end-of-document token.

    Attributes:
        answering: the model is at work; still set where that ended in an error.

    UserError for what a task asks that the model or its tokenizer cannot give.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        batch_size: int,
        quiet: bool,
        eod_ids: Iterable[int] | None = None,
    ):
        super().__init__()
        self.generator = Generator(model, tokenizer, eod_ids)
        self.model, self.text_tokenizer, self.batch_size, self.quiet = model, tokenizer, batch_size, quiet
        self.max_length = model.config.context_length
        self.answering = False
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int | None:
        return self.text_tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the token that begins documents, else the one that ends them."""
        if self.text_tokenizer.bos_id is None:
            raise UserError(
                f"the tokenizer {self.text_tokenizer.name} has no end-of-document token, which stands before a text "
                "without a context: it cannot do tasks that ask for the likelihood of such a text"
            )
        return self.text_tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.text_tokenizer.fingerprint  # its cache of requests is kept under this name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.text_tokenizer.encode(string).tolist()  # which adds no tokens of its own

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, ids = super()._encode_pair(context, continuation)
        if not ids:  # a merge across the border took all of it
            ids = self.tok_encode(continuation)
        return context_ids or [self.prefix_token_id], ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        encoded = []
        for context, continuation in (request.args for request in requests):
            if context:
                ids = self._encode_pair(context, continuation)
            else:
                ids = [self.prefix_token_id], self.tok_encode(continuation)
            encoded.append(((context, continuation), *ids))
        cut = self.max_length + 1
        self._warn_of_cuts(
            requests, (len(context) + min(len(ids), self.max_length) for _, context, ids in encoded), cut
        )
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        found = self._score([Continuation(context, ids) for _, context, ids in requests])
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, tuple(answer))
        return [tuple(answer) for answer in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        found = self._score([Continuation([self.prefix_token_id], self.tok_encode(text)) for text in texts])
        for text, answer in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer.log_likelihood)
        return [answer.log_likelihood for answer in found]

    def _score(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        total = count_windows(continuations, self.max_length)
        with self._bar(total, " windows") as bar:
            return score_continuations(self.model, continuations, self.batch_size, bar.update)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)  # of requests that are answered with the same options
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(index)
        options = {key: self._options(requests[members[0]]) for key, members in groups.items()}  # mistakes come first
        with self._bar(len(requests), " requests") as bar:
            for key, members in groups.items():
                room = self.max_length - options[key].max_new_tokens
                prompts = [self.tok_encode(requests[index].args[0]) or [self.prefix_token_id] for index in members]
                self._warn_of_cuts([requests[index] for index in members], map(len, prompts), room)
                longest_first = sorted(zip(members, prompts, strict=True), key=lambda pair: -len(pair[1]))
                for start in range(0, len(members), self.batch_size):
                    batch = longest_first[start : start + self.batch_size]
                    completions = self.generator.generate([prompt[-room:] for _, prompt in batch], options[key])
                    for (index, _), completion in zip(batch, completions, strict=True):
                        text = postprocess_generated_text(completion.text, list(options[key].stop), None)
                        answers[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
        return answers

    def _options(self, request: Instance) -> GenerationOptions:
        """What a task asks for in ours. UserError for an option that we do not have, and for more than fits."""
        given = normalize_gen_kwargs(request.args[1], MAX_GEN_TOKS)
        stop = given.pop("until") or []
        sampled, max_new_tokens = given.pop("do_sample"), given.pop("max_gen_toks")
        temperature = given.pop("temperature", None)
        if unknown := sorted(set(given) - set(OPTIONS)):
            raise UserError(
                f"the task {request.task_name} asks for {', '.join(unknown)} in generation, which is not there: "
                f"{', '.join(OPTIONS)} and temperature are; change its generation_kwargs"
            )
        if max_new_tokens >= self.max_length:
            raise UserError(
                f"the task {request.task_name} asks for {max_new_tokens:,} new tokens, and with a prompt the model's "
                f"context has room for {self.max_length - 1:,}: give its generation_kwargs a lower max_gen_toks"
            )
        stop = [stop] if isinstance(stop, str) else stop
        temperature = 1.0 if temperature is None else temperature
        if not sampled or temperature == 0:
            temperature = 0.0
            given = {name: value for name, value in given.items() if name not in OF_DRAWS}
        return GenerationOptions(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=tuple(text for text in stop if text),
            **given,
        )

    @contextlib.contextmanager
    def _bar(self, total: int, unit: str) -> Iterator[tqdm]:
        """Progress, while the model answers."""
        with tqdm(total=total, disable=self.quiet, unit=unit, leave=False) as bar:
            self.answering = True
            yield bar
        self.answering = False

    def _warn_of_cuts(self, requests: Sequence[Instance], lengths: Iterable[int], room: int) -> None:
        """Of texts that lose their start, since the context does not hold them."""
        cuts = Counter(one.task_name for one, length in zip(requests, lengths, strict=True) if length > room)
        for task, cut in cuts.items():
            logger.warning(f"{task}: {cut:,} requests are cut to their last {room:,} tokens, which the context holds")
