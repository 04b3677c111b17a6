"""A model of ours as lm-evaluation-harness sees one. Imports lm_eval; `run_harness` says so where that is missing.

Requests are answered as by its own adapter of transformers models (lm_eval/models/huggingface.py), in fp32 arithmetic
on the logits. Differences, all where that one stops with an assertion: a continuation longer than the context is scored
in pieces, and one that leaves no token of its own when encoded with its context is encoded by itself.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from megaslm.data import Tokenizer
from megaslm.errors import UserError
from megaslm.evaluation.likelihood import Continuation, Likelihood, score_continuations
from megaslm.generation import GenerationOptions, Generator
from megaslm.model import LanguageModel

logger = logging.getLogger(__name__)

MAX_GEN_TOKS = 256  # of a task that does not say; the harness's default
# Of its names for the options of generation, those that are ours; the first two of draws alone.
OF_DRAWS = ("top_k", "top_p", "seed")
OPTIONS = (*OF_DRAWS, "repetition_penalty", "no_repeat_ngram_size")


class HarnessModel(TemplateLM):
    """Loglikelihoods and generations of `model` for lm_eval.

    Args:
        batch_size: requests that are answered in one forward pass.
        quiet: show no progress.

    UserError for what a task asks that the model or its tokenizer cannot give.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, batch_size: int, quiet: bool):
        super().__init__()
        self.model, self.text_tokenizer, self.batch_size, self.quiet = model, tokenizer, batch_size, quiet
        self.max_length = model.config.context_length
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        if self.text_tokenizer.eod_id is None:
            raise UserError(
                f"the tokenizer {self.text_tokenizer.name} has no end-of-document token, which stands before a text "
                "without a context: it cannot do tasks that ask for the likelihood of such a text"
            )
        return self.text_tokenizer.eod_id

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
        self._warn_of_cuts(
            (len(one.context) + min(len(one.tokens), self.max_length) for one in continuations), self.max_length + 1
        )
        with tqdm(total=len(continuations), disable=self.quiet, unit=" requests", leave=False) as bar:
            return score_continuations(self.model, continuations, self.batch_size, bar.update)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)  # of requests that are answered with the same options
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(index)
        generator = Generator(self.model, self.text_tokenizer)
        with tqdm(total=len(requests), disable=self.quiet, unit=" requests", leave=False) as bar:
            for members in groups.values():
                options = self._options(requests[members[0]].args[1])
                # At least half of the context is the prompt's.
                room = max(self.max_length - options.max_new_tokens, self.max_length // 2)
                prompts = {
                    index: self.tok_encode(requests[index].args[0]) or [self.prefix_token_id] for index in members
                }
                self._warn_of_cuts(map(len, prompts.values()), room)
                members.sort(key=lambda index: -len(prompts[index]))
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    completions = generator.generate([prompts[index][-room:] for index in batch], options)
                    for index, completion in zip(batch, completions, strict=True):
                        text = postprocess_generated_text(completion.text, list(options.stop), None)
                        answers[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(batch))
        return answers

    def _options(self, asked: dict) -> GenerationOptions:
        """What a task asks for in ours. UserError for an option that we do not have."""
        given = normalize_gen_kwargs(asked, MAX_GEN_TOKS)
        stop = given.pop("until") or []
        sampled, max_new_tokens = given.pop("do_sample"), given.pop("max_gen_toks")
        temperature = given.pop("temperature", None)
        if unknown := sorted(set(given) - set(OPTIONS)):
            raise UserError(
                f"a task asks for {', '.join(unknown)} in generation, which is not there: {', '.join(OPTIONS)} and "
                "temperature are; change its generation_kwargs"
            )
        stop = [stop] if isinstance(stop, str) else stop
        if not sampled:
            given = {name: value for name, value in given.items() if name not in OF_DRAWS}
        return GenerationOptions(
            max_new_tokens=max_new_tokens,
            temperature=(temperature or 1.0) if sampled else 0.0,
            stop=tuple(text for text in stop if text),
            **given,
        )

    def _warn_of_cuts(self, lengths: Iterable[int], room: int) -> None:
        """Of texts that lose their start, since the context does not hold them."""
        if cut := sum(length > room for length in lengths):
            logger.warning(f"{cut:,} requests are cut to their last {room:,} tokens, for which the context has room")
