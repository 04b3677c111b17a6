"""Text from a model: a checkpoint, a run folder, a link such as lm_current, a Hugging Face folder or a name on its hub.

    python tools/generate.py --model runs/x --prompt "def main():"
    python tools/generate.py --model EXPORT --prompt_file story.txt --temperature 0 --stop $'\\n\\n'
    echo "Once upon" | python tools/generate.py --model runs/x --num_samples 4 --json
    python tools/generate.py --model runs/x --interactive

A model of this kind goes on with a text; it was not taught to answer. One text is shown as it comes, prompt included;
of several, each is shown when all are there. A line about the speed goes to stderr.

With --interactive, each line is a prompt. Ctrl-C stops a text, Ctrl-D ends the program, and these lines are commands:

    /set NAME VALUE   change an option: /set temperature 0.5; /set stop ["\\n", "END"]; null: the default
    /options          show the options
    /again            another text for the last prompt
    /help             show this

A prompt with what it is to be continued by may be as long as the model's context. --context_length makes that longer:
learned positions are drawn out, rotary ones stretched by a method of your choice; the texts get worse with the factor.
"""

import argparse
import json
import re
import sys
import time
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megaslm.checkpoint import open_model
from megaslm.commands import run_command
from megaslm.errors import UserError
from megaslm.evaluation import choose_placement
from megaslm.generation import Completion, GenerationOptions, Generator
from megaslm.model import DTYPES, STRETCH_METHODS, stretch_context

TEMPERATURE, TOP_K = 0.8, 50


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="a checkpoint, a run folder, an export or a hub name")
    add("--tokenizer", metavar="DIR", help="tokenizer folder or hub name (default: the model's)")
    add("--prompt", nargs="+", metavar="TEXT", help="one or more prompts (default: one, from stdin)")
    add("--prompt_file", nargs="+", metavar="FILE", help="files of one prompt each, without its last newline")
    add("--interactive", action="store_true", help="ask for prompts, again and again")
    add("--start_of_document", action="store_true", help="put the token that begins documents before each prompt")
    add("--num_samples", type=int, default=1, metavar="N", help="texts for each prompt (default: 1)")
    add("--max_new_tokens", type=int, default=128, metavar="N", help="most tokens of a text (default: 128)")
    add("--temperature", type=float, default=TEMPERATURE, metavar="T", help=f"0: greedy (default: {TEMPERATURE})")
    add("--top_k", type=int, metavar="K", help=f"draw from the K most probable tokens (default: {TOP_K}, or all with "
        "--top_p)")  # fmt: skip
    add("--top_p", type=float, metavar="P", help="draw from the most probable tokens that are P together")
    add("--repetition_penalty", type=float, default=1.0, metavar="F", help="above 1: repeat less (default: 1)")
    add("--no_repeat_ngram_size", type=int, default=0, metavar="N", help="no N tokens come twice (default: 0, off)")
    add("--stop", nargs="+", metavar="TEXT", help="strings that end a text")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    add("--context_length", type=int, metavar="N", help="tokens of a longer context than the model's")
    add("--rope_scaling", choices=STRETCH_METHODS, help="how to get there (default: yarn; interpolate where positions "
        "are learned)")  # fmt: skip
    add("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--dtype", choices=DTYPES, default="fp32", help="arithmetic of the model (default: fp32)")
    add("--json", action="store_true", help="one JSON object a text, with its tokens and how it ended")
    arguments = parser.parse_args()
    if sum(map(bool, (arguments.prompt, arguments.prompt_file, arguments.interactive))) > 1:
        raise UserError("give one of --prompt, --prompt_file and --interactive")
    if arguments.interactive and (arguments.json or arguments.num_samples != 1):
        raise UserError("--interactive shows one text at a time: leave out --json and --num_samples")
    if arguments.num_samples < 1:
        raise UserError(f"--num_samples {arguments.num_samples}: give 1 or more")
    if arguments.num_samples > 1 and arguments.temperature == 0:
        raise UserError("with --temperature 0 all samples are the same: leave out --num_samples, or give another one")
    if arguments.rope_scaling and not arguments.context_length:
        raise UserError("--rope_scaling is of a longer context: give --context_length too, or leave it out")
    given = arguments.prompt or arguments.prompt_file or arguments.interactive
    if not given and (sys.stdin is None or sys.stdin.isatty()):
        raise UserError("there is no prompt: give --prompt, --prompt_file or --interactive, or pipe one in")
    if arguments.interactive and sys.stdin is None:
        raise UserError("--interactive asks for prompts, and stdin is closed; open it, or give --prompt")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    given = {field.name: getattr(arguments, field.name) for field in fields(GenerationOptions)}
    if arguments.stop:
        given["stop"] = tuple(arguments.stop)
    options = options_of(given)
    prompts = [] if arguments.interactive else read_prompts(arguments)
    generator = open_generator(arguments)
    if arguments.interactive:
        return Conversation(generator, given, arguments.start_of_document).run()
    names = [f"prompt {i + 1}" if len(prompts) > 1 else "the prompt" for i in range(len(prompts))]
    start_of_document = arguments.start_of_document
    encoded = [generator.encode(text, start_of_document, name) for text, name in zip(prompts, names, strict=True)]
    numbered = [(i, text) for i, text in enumerate(prompts) for _ in range(arguments.num_samples)]
    ids = [encoded[i] for i, _ in numbered]
    streamed = len(numbered) == 1 and not arguments.json
    if streamed:
        show(prompts[0])
    start = time.perf_counter()
    try:
        completions = generator.generate(ids, options, (lambda _, text: show(text)) if streamed else None)
    finally:
        if streamed:
            print(flush=True)
    seconds = time.perf_counter() - start
    for place, ((i, prompt), completion) in enumerate(zip(numbered, completions, strict=True)):
        if arguments.json:
            print(json.dumps({"prompt": prompt, **asdict(completion)}))
        elif not streamed:
            sample = f", sample {place % arguments.num_samples + 1}" if arguments.num_samples > 1 else ""
            print(f"--- prompt {i + 1}{sample} ({completion.finish_reason})\n{prompt}{completion.text}")
    report(completions, seconds)


def options_of(given: dict[str, Any]) -> GenerationOptions:
    """The options that somebody gave, by name; None stands for the default, which may depend on the others."""
    given = {"temperature": TEMPERATURE} | {name: value for name, value in given.items() if value is not None}
    if given["temperature"] != 0 and "top_p" not in given:
        given = {"top_k": TOP_K} | given
    return GenerationOptions(**given)


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt:
        return arguments.prompt
    if not arguments.prompt_file:
        return [prompt_of(sys.stdin.buffer.read(), "the prompt on stdin")]
    prompts = []
    for path in arguments.prompt_file:
        try:
            prompts.append(prompt_of(Path(path).read_bytes(), f"the prompt file {path}"))
        except OSError as error:
            raise UserError(f"the prompt file {path} cannot be read: {error.strerror}") from None
    return prompts


def prompt_of(data: bytes, name: str) -> str:
    """Text as it stands, without its last line end."""
    try:
        return re.sub(r"\r?\n\Z", "", data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text, from byte {error.start + 1} on; convert it") from None


def open_generator(arguments: argparse.Namespace) -> Generator:
    placement = choose_placement(arguments.device, arguments.dtype)
    source = open_model(arguments.model, arguments.tokenizer)
    if source.tokenizer is None:
        raise UserError(f"{arguments.model} has no tokenizer, which text needs: --tokenizer DIR")
    config = source.config
    if arguments.context_length is not None:
        default = "interpolate" if config.position == "learned" else "yarn"
        config = stretch_context(config, arguments.context_length, arguments.rope_scaling or default)
    model = source.build(placement.device, placement.dtype, placement.ops, config)
    return Generator(model, source.tokenizer, source.eod_ids)


class Conversation:
    """--interactive: prompts and commands from the terminal until it ends."""

    def __init__(self, generator: Generator, given: dict[str, Any], start_of_document: bool):
        self.generator = generator
        self.given = given
        self.options = options_of(given)
        self.start_of_document = start_of_document
        self.prompt: str | None = None

    def run(self) -> None:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  # gives input() its history and keys
        print("Each line is a prompt; Ctrl-C stops a text, Ctrl-D ends, /help shows the commands.")
        while True:
            try:
                self.take(input("> "))
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return
            except UnicodeDecodeError:
                print("error: the line is not UTF-8 text", file=sys.stderr)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)

    def take(self, line: str) -> None:
        command, _, rest = line.strip().partition(" ")
        if command == "/help":
            print(__doc__.partition("are commands:\n\n")[2].partition("\n\n")[0])
        elif command == "/options":
            print("\n".join(f"    {name} {json.dumps(value)}" for name, value in asdict(self.options).items()))
        elif command == "/set":
            self.set(*rest.split(maxsplit=1))
        elif command == "/again":
            if self.prompt is None:
                raise UserError("there is no prompt yet; give one")
            if self.options.temperature == 0:
                raise UserError("at temperature 0 there is no other text; /set temperature above 0")
            self.give("seed", self.options.seed + 1)
            self.talk()
        elif command.startswith("/"):
            raise UserError(f"there is no command {command}; /help shows those that there are")
        elif line:
            self.prompt = line
            self.talk()

    def set(self, name: str = "", value: str = "") -> None:
        """Change an option to a value in JSON; text that is none is taken as it stands."""
        if name not in (names := [field.name for field in fields(GenerationOptions)]) or not value:
            raise UserError(f"write /set NAME VALUE, where NAME is one of {', '.join(names)}")
        with suppress(ValueError):
            value = json.loads(value)
        if name == "stop" and value is not None:
            value = tuple(map(str, value if isinstance(value, list) else [value]))
        self.give(name, value)

    def give(self, name: str, value: Any) -> None:
        given = {**self.given, name: value}
        self.options, self.given = options_of(given), given

    def talk(self) -> None:
        ids = self.generator.encode(self.prompt, self.start_of_document)
        start = time.perf_counter()
        show(self.prompt)
        completions = self.generator.generate([ids], self.options, lambda _, text: show(text))
        print()
        report(completions, time.perf_counter() - start)


def show(text: str) -> None:
    print(text, end="", flush=True)


def report(completions: list[Completion], seconds: float) -> None:
    tokens = sum(len(one.tokens) for one in completions)
    ends = ", ".join(sorted({one.finish_reason for one in completions}))
    print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s; ended by {ends}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
