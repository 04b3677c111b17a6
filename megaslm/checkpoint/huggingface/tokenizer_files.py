"""The tokenizer's files of an export, and the proof that transformers' AutoTokenizer does with them what ours does."""

import json
from pathlib import Path

import tokenizers

from megaslm.checkpoint.huggingface.library import load_transformers
from megaslm.data import Tokenizer

TOKENIZER_CONFIG = "tokenizer_config.json"
# Taken as it is by transformers; other classes put a pre-tokenizer of their own in the place of tokenizer.json's.
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# Accents of both spellings, a ligature, other scripts, emoji, runs of spaces, a space at the beginning.
LINE = "  Café nai\u0308ve \ufb01ne, Ελληνικά, 日本語と한국어; 👩‍🚀🙂  two  spaces\tand\n\nlines 12345 "


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write its files so that AutoTokenizer goes by tokenizer.json and runs no code of theirs.

    Raises UserError if they can't be written.
    """
    tokenizer.save(folder)
    path = folder / TOKENIZER_CONFIG
    given = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in given.items() if key != "auto_map"}
    config["tokenizer_class"] = TOKENIZER_CLASS
    if "eos_token" not in {**json.loads(tokenizer.files.get("special_tokens_map.json", "{}")), **config}:
        config |= {"eos_token": tokenizer.eod_token} if tokenizer.eod_token is not None else {}
    if config != given:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def same_tokenizer(folder: Path, tokenizer: Tokenizer, text: str) -> bool:
    """Whether AutoTokenizer gives the ids that `tokenizer` gives of a text and of LINE, and the text of ids; and, as a
    user calls it, those ids with what tokenizer.json itself puts around them."""
    theirs = load_transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    known = LINE
    if tokenizer.refusal(LINE) is not None:
        known = "".join(character for character in LINE if tokenizer.refusal(character) is None)
    plain = tokenizers.Tokenizer.from_str(tokenizer.files["tokenizer.json"])
    plain.no_padding()
    plain.no_truncation()
    # Special tokens written in a text are text to us.
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    for some in (text, known):
        ids = tokenizer.encode(some).tolist()
        spelled = tokenizer.decode(ids, skip_special=False)
        if theirs(some, **options)["input_ids"] != ids:
            return False
        # What cleans up the spaces of a decoded text is a matter of tokenizer_config.json alone.
        if theirs.decode(ids, clean_up_tokenization_spaces=False) != spelled:
            return False
    return theirs(known, verbose=False)["input_ids"] == plain.encode(known).ids
