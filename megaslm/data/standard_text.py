"""Real text that every machine has, for checks that need some."""

import argparse
from pathlib import Path

from megaslm.data.tokenizer import Tokenizer

STANDARD_FILE = Path(argparse.__file__)  # of Python's standard library


def standard_text(tokenizer: Tokenizer, characters: int | None = None) -> str:
    """The first `characters` (None: all, some 100,000) of a file of Python's standard library.

    What a character tokenizer refuses is left out, which may be nearly all of it.
    """
    text = STANDARD_FILE.read_text(encoding="utf-8")
    if tokenizer.refusal(text) is not None:
        refused = {character for character in set(text) if tokenizer.refusal(character) is not None}
        text = "".join(character for character in text if character not in refused)
    return text[:characters]
