"""tools/generate.py: prompts in, texts out, alone, in a batch and in a conversation; mistakes are one message."""

import io
import json
import sys

import pytest

from megaslm.checkpoint import as_transformers, open_model
from megaslm.config import ModelConfig
from megaslm.data import character_tokenizer
from megaslm.generation import GenerationOptions, Generator
from megaslm.model import build_model

CONTEXT = 40
CHARACTERS = "\n" + "".join(chr(32 + i) for i in range(95))
GREEDY = ("--temperature", 0, "--max_new_tokens", 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models in the format of Hugging Face: with a tokenizer (rotary, learned positions), and without one."""
    tokenizer = character_tokenizer([CHARACTERS])
    sizes = dict(vocab_size=tokenizer.vocab_size, context_length=CONTEXT, num_layers=2, hidden_size=32, num_heads=4)
    switches = {
        "rotary": dict(),
        "learned": dict(position="learned", norm="layernorm", feed_forward="gelu_tanh", bias=True, tie_embeddings=True),
    }
    found = {}
    for name in (*switches, "bare"):
        folder = tmp_path_factory.mktemp("models") / name
        config = ModelConfig(**sizes, ffn_hidden_size=64, init_std=0.3, **switches.get(name, {}))
        as_transformers(build_model(config, seed=6)).save_pretrained(folder)
        if name != "bare":
            tokenizer.save(folder)
        found[name] = folder
    return found


@pytest.fixture
def generate(run_tool, folders):
    return lambda *arguments, model="rotary": run_tool("generate.py", "--model", folders[model], *arguments)


def test_one_prompt_is_shown_with_its_text_and_the_speed_goes_to_stderr(generate, folders):
    finished = generate("--prompt", "some text", *GREEDY)
    source = open_model(folders["rotary"])
    (expected,) = Generator(source.build(), source.tokenizer).generate(
        ["some text"], GenerationOptions(max_new_tokens=12)
    )
    assert finished.code == 0 and finished.out == f"some text{expected.text}\n"
    assert finished.err.startswith("12 tokens in ") and finished.err.endswith("ended by length\n")


def test_several_prompts_and_samples_as_json(generate, tmp_path):
    for i, text in enumerate(("ab\n", "xyz")):
        (tmp_path / f"{i}.txt").write_text(text)
    arguments = ("--prompt_file", tmp_path / "0.txt", tmp_path / "1.txt", "--num_samples", 3, "--max_new_tokens", 9)
    records = [json.loads(line) for line in generate(*arguments, "--json").out.splitlines()]
    assert [one["prompt"] for one in records] == ["ab"] * 3 + ["xyz"] * 3
    assert len({one["text"] for one in records}) == 6 and all(len(one["tokens"]) == 9 for one in records)
    shown = generate(*arguments).out
    assert shown == "".join(
        f"--- prompt {i // 3 + 1}, sample {i % 3 + 1} (length)\n{one['prompt']}{one['text']}\n"
        for i, one in enumerate(records)
    )
    assert generate(*arguments, "--json", "--seed", 1).out != generate(*arguments, "--json").out


def test_a_prompt_is_read_from_stdin_and_a_stop_string_ends_the_text(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("some text\n"))
    whole = generate(*GREEDY).out.removesuffix("\n").removeprefix("some text")
    monkeypatch.setattr(sys, "stdin", io.StringIO("some text\n"))
    finished = generate(*GREEDY, "--stop", whole[5:7], "never")
    assert finished.out == f"some text{whole[: whole.index(whole[5:7])]}\n" and "ended by stop" in finished.err


@pytest.mark.parametrize("model, scaling", [("rotary", ["--rope_scaling", "ntk"]), ("rotary", []), ("learned", [])])
def test_a_longer_context_takes_a_longer_prompt(generate, model, scaling):
    arguments = ("--prompt", "a" * (CONTEXT + 5), *GREEDY)
    message = generate(*arguments, model=model).message()
    assert f"has {CONTEXT + 5} tokens" in message and "--context_length and --rope_scaling" in message
    finished = generate(*arguments, "--context_length", 2 * CONTEXT, *scaling, model=model)
    assert finished.code == 0 and len(finished.out) == CONTEXT + 5 + 12 + 1


def converse(generate, monkeypatch, lines: list, *arguments):
    """A conversation; an exception among the lines is raised where the line is asked for."""
    lines = iter(lines)

    def ask(prompt: str) -> str:
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", ask)
    return generate("--interactive", "--max_new_tokens", 8, *arguments)


def test_a_conversation_goes_on_until_the_end_of_its_input(generate, monkeypatch):
    lines = ["abc", "/again", "", KeyboardInterrupt(), "/set top_k 0", "/set temperature 0", "abc", "abc", "/options"]
    finished = converse(generate, monkeypatch, lines)
    texts = [line for line in finished.out.splitlines() if line.startswith("abc")]
    assert finished.code == 0 and finished.err.count("8 tokens in") == 4 and "error" not in finished.err
    assert texts[0] != texts[1] and texts[2] == texts[3] and len(texts) == 4
    assert "    temperature 0\n" in finished.out and "    seed 1\n" in finished.out


def test_a_mistake_in_a_conversation_does_not_end_it(generate, monkeypatch):
    mistakes = {
        "/nothing": "no command /nothing",
        "/again": "no prompt yet",
        "/set bla 3": "write /set NAME VALUE",
        "/set seed": "write /set NAME VALUE",
        "/set seed 0.5": "seed 0.5: give a whole number",
        "/set top_k true": "top_k True: give a whole number",
        "/set temperature hot": "temperature hot: give a number",
        "/set top_p 2": "top_p 2: give a probability",
        "a" * (CONTEXT + 1): "shorten it",
    }
    finished = converse(generate, monkeypatch, [*mistakes, "/help", "/set stop \\n", "abc"])
    errors = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(mistakes)
    assert all(says in error for says, error in zip(mistakes.values(), errors, strict=True))
    assert "/set NAME VALUE   change an option" in finished.out and "abc" in finished.out


def test_ctrl_c_stops_a_text_and_not_the_program(generate, monkeypatch):
    calls = []
    real = Generator.generate

    def interrupted(self, prompts, options, on_text=None):
        calls.append(prompts)
        if len(calls) == 1:
            on_text(0, "half a te")
            raise KeyboardInterrupt
        return real(self, prompts, options, on_text)

    monkeypatch.setattr(Generator, "generate", interrupted)
    finished = converse(generate, monkeypatch, ["abc", "xyz"])
    assert finished.code == 0 and len(calls) == 2 and finished.err.count("tokens in") == 1
    assert "abchalf a te\n" in finished.out and "xyz" in finished.out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--prompt", "a", "--top_p", 1.5), "top_p 1.5: give a probability"),
        (("--prompt", "a", "--temperature", 0, "--top_k", 4), "no effect with temperature 0"),
        (("--prompt", "a", "--temperature", "nan"), "temperature nan: give"),
        (("--prompt", "a", "--num_samples", 0), "--num_samples 0: give 1 or more"),
        (("--prompt", "a", "--interactive"), "give one of --prompt"),
        (("--interactive", "--json"), "leave out --json"),
        (("--prompt", "a", "--rope_scaling", "yarn"), "give --context_length too"),
        (("--prompt", "a", "--context_length", CONTEXT), "not longer than the model's"),
        (("--prompt", "a", "--context_length", 80, "--rope_scaling", "interpolate"), "take linear, ntk, yarn"),
        (("--prompt", "a", "--device", "toaster"), "the device toaster is not there"),
        (("--prompt", ""), "there is no end-of-document token to begin with"),
        (("--prompt", "a", "--start_of_document"), "no end-of-document token"),
        (("--prompt_file", "not/there"), "the prompt file not/there cannot be read: No such file"),
    ],
)
def test_mistakes(generate, arguments, says):
    assert says in generate(*arguments).message()


def test_a_model_without_a_tokenizer_says_what_to_give(generate, folders):
    assert "--tokenizer DIR" in generate("--prompt", "a", model="bare").message()
    given = generate("--prompt", "a", "--tokenizer", folders["rotary"], *GREEDY, model="bare")
    assert given.out == generate("--prompt", "a", *GREEDY).out


def test_without_a_prompt_a_terminal_is_not_waited_for(generate, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert "there is no prompt" in generate().message()
