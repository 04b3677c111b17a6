"""tools/generate.py: prompts in, texts out, alone, in a batch and in a conversation; mistakes are one message."""

import io
import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from megaslm.checkpoint import as_transformers, open_model
from megaslm.config import ModelConfig
from megaslm.data import character_tokenizer
from megaslm.generation import GenerationOptions, Generator
from megaslm.model import build_model

ROOT = Path(__file__).resolve().parents[2]
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


def stdin(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


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
    for i, text in enumerate((b"ab\n", b"xyz\r\n")):
        (tmp_path / f"{i}.txt").write_bytes(text)
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
    monkeypatch.setattr(sys, "stdin", stdin(b"some text\n"))
    whole = generate(*GREEDY).out.removesuffix("\n").removeprefix("some text")
    monkeypatch.setattr(sys, "stdin", stdin(b"some text\n"))
    finished = generate(*GREEDY, "--stop", whole[5:7], "never")
    assert finished.out == f"some text{whole[: whole.index(whole[5:7])]}\n" and "ended by stop" in finished.err


def test_line_ends_within_a_prompt_are_as_they_were(generate, monkeypatch, tmp_path, folders):
    (tmp_path / "dos.txt").write_bytes(b"a\r\nb\r\n")
    arguments = ("--json", *GREEDY)
    assert json.loads(generate("--prompt_file", tmp_path / "dos.txt", *arguments).out)["prompt"] == "a\r\nb"
    monkeypatch.setattr(sys, "stdin", stdin(b"a\r\nb\n\n"))
    assert json.loads(generate(*arguments).out)["prompt"] == "a\r\nb\n"


def test_the_arithmetic_is_that_of_dtype(generate, monkeypatch):
    dtypes = []
    real = Generator.generate

    def watched(self, *arguments):
        dtypes.append({parameter.dtype for parameter in self.model.parameters()})
        return real(self, *arguments)

    monkeypatch.setattr(Generator, "generate", watched)
    for dtype in ((), ("--dtype", "bf16")):
        assert generate("--prompt", "a", *GREEDY, *dtype).code == 0
    assert dtypes == [{torch.float32}, {torch.bfloat16}]


def test_a_text_ends_where_the_folder_says(generate, folders, tmp_path):
    """Its tokenizer names no end; transformers' generate would stop there too."""
    free = json.loads(generate("--prompt", "abc", *GREEDY, "--json").out)
    folder = tmp_path / "ends"
    folder.mkdir()
    for path in folders["rotary"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "generation_config.json").read_text())
    ends = [free["tokens"][8], free["tokens"][5]]
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": ends}))
    found = json.loads(generate("--prompt", "abc", *GREEDY, "--json", "--model", folder).out)
    cut = min(map(free["tokens"].index, ends))
    assert (found["tokens"], found["finish_reason"]) == (free["tokens"][:cut], "eod")
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": "</s>"}))
    assert "eos_token_id is '</s>'" in generate("--prompt", "abc", "--model", folder).message()


def test_start_of_document_puts_that_token_before_each_prompt(generate, folders, tmp_path, monkeypatch):
    folder = tmp_path / "tokenizer"
    open_model(folders["rotary"]).tokenizer.save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "!", "eos_token": "?"}))
    arguments = ("--tokenizer", folder, *GREEDY)
    plain, marked = (generate("--prompt", text, *arguments).out[len(text) :] for text in ("ab", "!ab"))
    assert plain != marked
    assert generate("--prompt", "ab", *arguments, "--start_of_document").out == f"ab{marked}"
    assert f"ab{marked}" in converse(generate, monkeypatch, ["ab"], *arguments, "--start_of_document").out


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
    lines = ["abc", "/again", "", KeyboardInterrupt(), "/set temperature 0", "abc", "abc", "/options"]
    finished = converse(generate, monkeypatch, lines)
    texts = [line for line in finished.out.splitlines() if line.startswith("abc")]
    assert finished.code == 0 and finished.err.count("8 tokens in") == 4 and "error" not in finished.err
    assert texts[0] != texts[1] and texts[2] == texts[3] and len(texts) == 4
    assert "    temperature 0\n    top_k 0\n" in finished.out and "    seed 1\n" in finished.out


def test_what_is_set_can_be_unset_and_defaults_go_along(generate, monkeypatch):
    states = [
        ("", "top_k 50\n    top_p 1.0\n    repetition_penalty 1.0\n    no_repeat_ngram_size 0\n    stop []"),
        ('stop ["x", "y z"]', 'stop ["x", "y z"]'),
        ('stop "\\n"', 'stop ["\\n"]'),
        ("stop []", "stop []"),
        ("stop END", 'stop ["END"]'),
        ("stop null", "stop []"),
        ("top_p 0.5", "top_k 0\n    top_p 0.5"),
        ("top_p null", "top_k 50\n    top_p 1.0"),
        ("temperature 0", "temperature 0\n    top_k 0"),
        ("temperature null", "temperature 0.8\n    top_k 50"),
    ]
    lines = [line for change, _ in states for line in ([f"/set {change}"] if change else []) + ["/options"]]
    finished = converse(generate, monkeypatch, lines)
    shown = finished.out.split("    max_new_tokens 8\n")[1:]
    assert finished.err == "" and len(shown) == len(states)
    for (_, expected), text in zip(states, shown, strict=True):
        assert f"    {expected}\n" in text


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
        "a\udcff": "not UTF-8 text, from character 2 on",
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
    calls.clear()
    finished = generate("--prompt", "abc", *GREEDY)
    assert (finished.code, finished.out, finished.err) == (130, "abchalf a te\n", "interrupted\n")


def test_another_text_at_temperature_0_is_refused(generate, monkeypatch):
    finished = converse(generate, monkeypatch, ["abc", "/again"], "--temperature", 0)
    assert finished.err.count("8 tokens in") == 1 and "error: at temperature 0 there is no other text" in finished.err


def test_a_conversation_in_a_terminal(folders):
    """Ctrl-C in a line and Ctrl-D, through a terminal's own line editing."""
    pty = pytest.importorskip("pty", reason="terminals like this are of Unix")
    command = [sys.executable, str(ROOT / "tools" / "generate.py"), "--model", str(folders["rotary"]), "--interactive"]
    # Not pty.fork: what other tests have started in this process may hang in a copy of it. So the terminal becomes the
    # program's own, from which Ctrl-C comes, in a process of its own.
    own_terminal = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", own_terminal, *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    shown = b""

    def wait_for(text: bytes, again: bytes) -> None:
        nonlocal shown
        deadline = time.monotonic() + 60
        while text not in shown:
            if select.select([ours], [], [], 10)[0]:
                shown += os.read(ours, 4096)
            else:
                assert time.monotonic() < deadline, f"{text!r} does not come: {shown!r}"
                os.write(ours, again)
        shown = shown.partition(text)[2]

    interrupt = b"\x03"
    try:
        for expected, again, keys in (
            (b"> ", b"", b"half a line" + interrupt),
            # Python's input() does not see one that comes between its prompt and its wait for keys.
            (b"> ", interrupt, b"/set max_new_tokens 3\n"),
            (b"> ", b"", b"abc\n"),
            (b"3 tokens in ", b"", b""),
            (b"> ", b"", b"\x04"),
        ):
            wait_for(expected, again)
            os.write(ours, keys)
        with suppress(OSError):  # the terminal is gone with its program
            while select.select([ours], [], [], 60)[0] and os.read(ours, 4096):
                pass
    finally:
        os.close(ours)  # hangs up: a program that is still there ends
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--prompt", "a", "--top_p", 1.5), "top_p 1.5: give a probability"),
        (("--prompt", "a", "--temperature", 0, "--top_k", 4), "no effect with temperature 0"),
        (("--prompt", "a", "--temperature", "nan"), "temperature nan: give"),
        (("--prompt", "a", "--num_samples", 0), "--num_samples 0: give 1 or more"),
        (("--prompt", "a", "--num_samples", 2, "--temperature", 0), "all samples are the same"),
        (("--interactive", "--num_samples", 2), "leave out --json and --num_samples"),
        (("--prompt", "a", "a" * (CONTEXT + 2)), f"prompt 2 has {CONTEXT + 2} tokens"),
        (("--prompt", "a", "--context_length", 10**11), "the context length is 100000000000, whose rotary angles take"),
        (("--prompt", "a\udcff"), "the prompt is not UTF-8 text, from character 2 on"),
        (("--prompt_file", os.devnull, __file__ + "/x"), "cannot be read: Not a directory"),
        (("--prompt", "a", "--interactive"), "give one of --prompt"),
        (("--interactive", "--json"), "leave out --json"),
        (("--prompt", "a", "--rope_scaling", "yarn"), "give --context_length too"),
        (("--prompt", "a", "--context_length", CONTEXT), "not longer than the model's"),
        (("--prompt", "a", "--context_length", 80, "--rope_scaling", "interpolate"), "take linear, ntk, yarn"),
        (("--prompt", "a", "--device", "toaster"), "the device toaster is not there"),
        (("--prompt", ""), "there is no token that begins a document"),
        (("--prompt", "a", "--start_of_document"), "no token that begins or ends a document"),
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


def test_stdin_that_is_closed_or_is_no_text(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", stdin(b"ab\xff"))
    assert "the prompt on stdin is not UTF-8 text, from byte 3 on" in generate().message()
    monkeypatch.setattr(sys, "stdin", None)
    assert "there is no prompt" in generate().message()
    assert "stdin is closed" in generate("--interactive").message()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_of_stdout_is_one_message(generate, monkeypatch):
    """Also where what cannot be written is written when all is done."""
    for buffering in (1, -1):
        with open("/dev/full", "w", buffering=buffering) as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert "No space left on device: make room" in generate("--prompt", "a", "--json", *GREEDY).message()
            monkeypatch.undo()
