"""Generation against transformers' generate, and what it promises beyond that."""

import sys
from pathlib import Path

import pytest
import torch

from megaslm.checkpoint import as_transformers
from megaslm.data import character_tokenizer
from megaslm.errors import UserError
from megaslm.generation import Completion, GenerationOptions, Generator, generator
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
    generator = Generator(talker, TOKENIZER)
    free = generator.generate(["abc", "xyz", "Q"], GenerationOptions(max_new_tokens=30))
    generator.eod_id = free[1].tokens[12]
    ended = generator.generate(["abc", "xyz", "Q"], GenerationOptions(max_new_tokens=30))
    for before, after in zip(free, ended, strict=True):
        whole = list(before.tokens)
        cut = whole.index(generator.eod_id) if generator.eod_id in whole else len(whole)
        assert list(after.tokens) == whole[:cut]
        assert after.text == TOKENIZER.decode(whole[:cut])
        assert after.finish_reason == ("length" if cut == len(whole) else "eod")
    assert ended[1].finish_reason == "eod" and len({len(one.tokens) for one in ended}) > 1


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
    torch.manual_seed(0)
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


def test_an_empty_prompt_begins_a_document(talker):
    generator = Generator(talker, TOKENIZER)
    generator.eod_id = 3
    options = GenerationOptions(max_new_tokens=8)
    assert generator.generate([""], options) == generator.generate([[3]], options)
    assert generator.encode("ab", start_of_document=True) == [3, *TOKENIZER.encode("ab")]
    assert generator.generate([], options) == []


def test_mistakes_in_prompts(talker):
    generator = Generator(talker, character_tokenizer([CHARACTERS]))
    generator.eod_id = None
    for rows, says in (
        (["a", ""], "prompt 2 is empty"),
        (["a" * (CONTEXT + 1)], f"a prompt has {CONTEXT + 1} tokens, and the model's context {CONTEXT}; shorten"),
        ([[1, TOKENIZER.vocab_size]], f"no token {TOKENIZER.vocab_size}"),
        ([[-1]], "no token -1"),
    ):
        with pytest.raises(UserError, match=says):
            generator.generate(rows)
    with pytest.raises(UserError, match="no end-of-document token"):
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
    ],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(UserError, match=f"^{option} {value}: give"):
        GenerationOptions(**{option: value})


def test_options_without_effect_are_refused():
    with pytest.raises(UserError, match="no effect with temperature 0"):
        GenerationOptions(top_k=5)
    with pytest.raises(UserError, match="stop string is empty"):
        GenerationOptions(stop=("a", ""))
