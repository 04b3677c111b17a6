"""Generation against transformers' generate, and what it promises beyond that."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from megaslm.checkpoint import as_transformers
from megaslm.data import Tokenizer, character_tokenizer
from megaslm.errors import UserError
from megaslm.generation import Completion, GenerationOptions, Generator, KeyValueCache, generator
from megaslm.model import stretch_context

sys.path.insert(0, str(Path(__file__).parent))

from networks import CONTEXT, FAMILIES, network, prompts  # noqa: E402

TOKENS = 64
OPTIONS = {
    "penalty": dict(repetition_penalty=1.3),
    "n-grams": dict(no_repeat_ngram_size=2),
    "both": dict(repetition_penalty=1.2, no_repeat_ngram_size=3),
}


def generate(model, rows, tokenizer=None, **options) -> list[Completion]:
    return Generator(model, tokenizer).generate(rows, GenerationOptions(**{"max_new_tokens": TOKENS, **options}))


def by_transformers(model, rows, **options) -> list[list[int]]:
    """Greedy; shorter rows padded on the left."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, **options}
    found = as_transformers(model).generate(tokens, attention_mask=mask, **options)
    return found[:, longest:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_transformers_token_for_token(family):
    """One row, and a padded batch."""
    model, rows = network(family), prompts(20, 3, 11, 20)
    found = [list(one.tokens) for one in generate(model, rows)]
    assert found == by_transformers(model, rows)
    assert generate(model, rows[:1])[0].tokens == tuple(found[0]) == tuple(by_transformers(model, rows[:1])[0])
    assert min(len(set(tokens)) for tokens in found) > 8, "the model repeats itself"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_penalties_are_those_of_transformers(options):
    model, rows = network("llama"), prompts(20, 20)
    found = [list(one.tokens) for one in generate(model, rows, **options)]
    assert found == by_transformers(model, rows, **options)
    assert found[0] != list(generate(model, rows[:1])[0].tokens), "the option changes nothing"


def test_penalties_of_a_padded_batch_are_those_of_each_row_by_itself():
    """In transformers the padding counts as a token that was seen."""
    model, rows = network("llama"), prompts(20, 3, 11)
    options = dict(repetition_penalty=1.5, no_repeat_ngram_size=2)
    assert generate(model, rows, **options) == [generate(model, [row], **options)[0] for row in rows]


@pytest.mark.parametrize("method", ["linear", "yarn", "ntk"])
def test_greedy_in_a_stretched_context_is_that_of_transformers(method):
    """Beyond the context that the weights are of; the export writes ntk as a larger theta."""
    short = network("llama", context_length=24)
    model = network("llama", **stretch_context(short.config, CONTEXT, method).model_dump(exclude={"init_std"}))
    model.load_state_dict(short.state_dict())
    rows = prompts(20, 9)
    found = [list(one.tokens) for one in generate(model, rows)]
    assert found == by_transformers(model, rows)


def test_prompts_are_computed_in_pieces(monkeypatch):
    model, rows = network("qwen3"), prompts(30, 12)
    expected = generate(model, rows)
    monkeypatch.setattr(generator, "PROMPT_CHUNK", 7)
    assert generate(model, rows) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_ends_with_the_context_and_the_last_token_that_fits_is_that_of_transformers(family):
    model, rows = network(family), prompts(CONTEXT - 4, CONTEXT, 40)
    found = generate(model, rows, max_new_tokens=70)
    assert [len(one.tokens) for one in found] == [5, 1, 57]
    assert [one.finish_reason for one in found] == ["context"] * 3
    for row, one in zip(rows, found, strict=True):
        assert list(one.tokens) == by_transformers(model, [row], max_new_tokens=len(one.tokens))[0]
    assert generate(model, rows[:1], max_new_tokens=5)[0].finish_reason == "length"


CHARACTERS = "".join(chr(33 + i) for i in range(94))
TOKENIZER = character_tokenizer([CHARACTERS])
DRAWS = dict(temperature=0.9, top_k=40, top_p=0.95)


@pytest.fixture(scope="module")
def talker():
    """A network whose tokens are characters."""
    return network("llama", vocab_size=TOKENIZER.vocab_size)


def test_the_end_of_the_document_ends_a_row_and_no_other(talker):
    """Whatever id of those that end one."""
    generator = Generator(talker, TOKENIZER)
    free = generator.generate(["abc", "xyz", "Q"], GenerationOptions(max_new_tokens=30))
    ends = {free[0].tokens[20], free[1].tokens[12]}
    generator = Generator(talker, TOKENIZER, ends)
    ended = generator.generate(["abc", "xyz", "Q"], GenerationOptions(max_new_tokens=30))
    for before, after in zip(free, ended, strict=True):
        whole = list(before.tokens)
        cut = min((place for place, token in enumerate(whole) if token in ends), default=len(whole))
        assert list(after.tokens) == whole[:cut]
        assert after.text == TOKENIZER.decode(whole[:cut])
        assert after.finish_reason == ("length" if cut == len(whole) else "eod")
    assert ended[0].finish_reason == ended[1].finish_reason == "eod" and len({len(one.tokens) for one in ended}) > 1


def test_the_end_of_the_document_is_the_tokenizers_unless_others_are_given(talker):
    tokenizer = Tokenizer(TOKENIZER.files, "with an end")
    tokenizer.eod_id = 7
    assert Generator(talker, tokenizer).eod_ids == {7} and Generator(talker, tokenizer, [3, 4]).eod_ids == {3, 4}
    assert Generator(talker, TOKENIZER).eod_ids == Generator(talker, None).eod_ids == frozenset()


def test_a_batch_is_over_with_its_last_row_and_its_cache_no_larger_than_it_needs(talker, monkeypatch):
    made, calls = [], []

    class Watched(KeyValueCache):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

        def extend(self, length):
            calls.append(length)
            return super().extend(length)

    monkeypatch.setattr(generator, "KeyValueCache", Watched)
    free = generate(talker, ["abcde", "xyz"], TOKENIZER, max_new_tokens=20)
    assert made[-1].capacity == made[-1].length == 5 + 20 - 1  # the last token is not read
    generate(talker, ["a" * (CONTEXT - 10), "b" * 7], TOKENIZER, max_new_tokens=50)
    assert made[-1].capacity == CONTEXT - 10 + 50 - 1
    calls.clear()
    ends = {one.tokens[9] for one in free}
    longest = max(len(one.tokens) for one in Generator(talker, TOKENIZER, ends).generate(["abcde", "xyz"]))
    assert calls == [5] + [1] * longest and longest < 10


@pytest.mark.parametrize("only", [dict(top_k=1), dict(top_p=1e-6)])
def test_draws_from_one_token_are_greedy(talker, only):
    greedy = generate(talker, ["abc", "xyz"], TOKENIZER)
    assert generate(talker, ["abc", "xyz"], TOKENIZER, temperature=3.0, **only) == greedy
    assert generate(talker, ["abc", "xyz"], TOKENIZER, temperature=1e-30) == greedy
    assert generate(talker, ["abc", "xyz"], TOKENIZER, temperature=3.0) != greedy


def test_the_temperature_divides_the_logits(talker):
    """The share of the most probable token among the first ones drawn."""
    with torch.no_grad():
        logits = talker(torch.tensor([TOKENIZER.encode("abc").tolist()]))[0, -1]
    for temperature in (0.5, 4.0):
        drawn = generate(talker, ["abc"] * 400, TOKENIZER, temperature=temperature, max_new_tokens=1)
        share = sum(one.tokens[0] == logits.argmax() for one in drawn) / 400
        assert abs(share - (logits / temperature).softmax(0).max()) < 0.08


@pytest.mark.parametrize("options", [{}, dict(temperature=1.0), dict(temperature=1.0, repetition_penalty=1.5)])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(number, options):
    model = network("llama")
    with torch.no_grad():
        model.head.weight[5] = number
    with pytest.raises(UserError, match=r"logits are not finite, after 0 tokens for prompt 1: .* use bf16 or fp32"):
        generate(model, prompts(5, 4), **options)


def test_one_row_of_logits_that_are_not_finite_is_named_and_after_its_end_is_nobodys():
    model, rows = network("llama"), prompts(5, 4)
    free = generate(model, rows, max_new_tokens=20)
    only = min(set(free[1].tokens[:3]) - set(free[0].tokens) - set(free[1].tokens[3:]) - set(sum(rows, [])))
    step = free[1].tokens.index(only)
    with torch.no_grad():
        model.decoder.embedding.weight[only] = math.nan
    for options in ({}, dict(temperature=1e-30)):
        with pytest.raises(UserError, match=f"after {step + 1} tokens for prompt 2"):
            generate(model, rows, max_new_tokens=20, **options)
        ended = Generator(model, None, {only}).generate(rows, GenerationOptions(max_new_tokens=20, **options))
        assert ended[0] == free[0] and ended[1].tokens == free[1].tokens[:step]


def test_a_text_in_which_no_token_may_come_again_goes_on_when_all_have():
    model = network("llama", vocab_size=12)
    for options in ({}, dict(temperature=1.0)):
        (one,) = generate(model, [[1, 2, 3]], no_repeat_ngram_size=1, max_new_tokens=30, **options)
        assert sorted(one.tokens[:9]) == [0, *range(4, 12)] and len(set(one.tokens[9:])) > 1


def test_a_stop_string_cuts_the_text_and_its_pieces_are_the_text(talker):
    rows = ["abc", "xyz", "Q"]
    free = Generator(talker, TOKENIZER).generate(rows, GenerationOptions(max_new_tokens=40))
    stop = (free[0].text[10:13], free[2].text[20:22])
    shown = {i: "" for i in range(3)}

    def on_text(row: int, text: str) -> None:
        assert text
        shown[row] += text

    found = Generator(talker, TOKENIZER).generate(rows, GenerationOptions(max_new_tokens=40, stop=stop), on_text)
    for i, (before, after) in enumerate(zip(free, found, strict=True)):
        cut = min((before.text.index(one) for one in stop if one in before.text), default=len(before.text))
        assert after.text == shown[i] == before.text[:cut]
        assert after.finish_reason == ("length" if cut == len(before.text) else "stop")
        assert before.tokens[: len(after.tokens)] == after.tokens and len(after.tokens) >= cut
    assert found[0].finish_reason == found[2].finish_reason == "stop"


def test_draws_depend_on_the_seed_and_the_prompt_and_not_on_the_batch(talker):
    alone = generate(talker, ["abc"], TOKENIZER, seed=5, **DRAWS)[0]
    assert generate(talker, ["xyzxyz", "Q", "abc"], TOKENIZER, seed=5, **DRAWS)[2] == alone
    assert generate(talker, ["abc"], TOKENIZER, seed=6, **DRAWS)[0] != alone
    copies = generate(talker, ["abc"] * 4, TOKENIZER, seed=5, **DRAWS)
    assert copies[0] == alone and len({one.text for one in copies}) == 4
    assert generate(talker, [TOKENIZER.encode("abc")], TOKENIZER, seed=5, **DRAWS)[0] == alone
    numbers = [generator._uniform(5, prompt, 0, 4) for prompt in ((1, 2), (1, 3))]
    assert not torch.equal(*numbers), "texts of different prompts are drawn by the same numbers"


def test_draws_leave_the_global_generator_alone(talker):
    torch.rand(3)
    before = torch.get_rng_state()
    generate(talker, ["abc"], TOKENIZER, **DRAWS)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_is_given_back_as_it_was(talker):
    """Also when a text is broken off."""

    def break_off(row: int, text: str) -> None:
        raise KeyboardInterrupt

    before = {name: dict(module.__dict__) for name, module in talker.named_modules()}
    with pytest.raises(KeyboardInterrupt):
        Generator(talker, TOKENIZER).generate(["abc"], GenerationOptions(), break_off)
    assert {name: dict(module.__dict__) for name, module in talker.named_modules()} == before
    talker(torch.tensor([[1, 2]]), torch.tensor([[2, 3]]))[0].backward()  # its tensors still take gradients
    talker.zero_grad()


def test_a_layer_that_somebody_has_changed_stays_so():
    model = network("llama")
    layer, seen = model.decoder.blocks[0].attention.out, []
    layer.forward = lambda x: seen.append(x) or -nn.Linear.forward(layer, x)
    changed = generate(model, prompts(5), max_new_tokens=4)
    assert len(seen) == 4 and "forward" in layer.__dict__
    del layer.forward
    assert generate(model, prompts(5), max_new_tokens=4) != changed


def test_an_empty_prompt_begins_a_document(talker):
    tokenizer = Tokenizer(TOKENIZER.files, "with a beginning")
    tokenizer.eod_id, tokenizer.bos_id = 5, 3
    generator = Generator(talker, tokenizer)
    options = GenerationOptions(max_new_tokens=8)
    assert generator.generate([""], options) == generator.generate([[3]], options)
    assert generator.encode("ab", start_of_document=True) == [3, *TOKENIZER.encode("ab")]
    assert generator.generate([], options) == []


def test_mistakes_in_prompts(talker):
    generator = Generator(talker, TOKENIZER)
    for rows, says in (
        (["a", ""], "prompt 2 is empty"),
        (["a", "a" * (CONTEXT + 1)], f"prompt 2 has {CONTEXT + 1} tokens, and the model's context {CONTEXT}; shorten"),
        ([[1, TOKENIZER.vocab_size]], f"no token {TOKENIZER.vocab_size}"),
        ([[-1]], "no token -1"),
        (["a", "b\udcff"], "prompt 2 is not UTF-8 text, from character 2 on"),
        ("abc", "give a list of prompts"),
    ):
        with pytest.raises(UserError, match=says):
            generator.generate(rows)
    with pytest.raises(UserError, match="no token that begins or ends a document"):
        generator.encode("a", start_of_document=True)
    with pytest.raises(UserError, match="needs a tokenizer"):
        generate(talker, ["abc"])
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        generate(talker, [[1]], stop=("a",))


@pytest.mark.parametrize(
    "option, value",
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("no_repeat_ngram_size", -1),
        ("temperature", 1e-46),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 1e300),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("top_p", None),
        ("stop", "abc"),
        ("stop", (1,)),
    ],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(UserError, match=f"^{option} {re.escape(str(value))}: give"):
        GenerationOptions(**{option: value})


def test_options_without_effect_are_refused():
    with pytest.raises(UserError, match="no effect with temperature 0"):
        GenerationOptions(top_k=5)
    with pytest.raises(UserError, match="stop string is empty"):
        GenerationOptions(stop=("a", ""))
