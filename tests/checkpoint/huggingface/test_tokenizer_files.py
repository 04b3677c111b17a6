"""What AutoTokenizer makes of an export's tokenizer."""

import json

import pytest
from tokenizers.processors import TemplateProcessing

from megaslm.checkpoint.huggingface.tokenizer_files import same_tokenizer, save_tokenizer
from megaslm.data import Tokenizer, character_tokenizer, load_tokenizer, train_bpe

pytest.importorskip("transformers")
TEXT = "the quick brown fox <|endoftext|> jumps"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(["the quick brown fox jumps over the lazy dog\n"] * 4, vocab_size=300)


def with_files(tokenizer: Tokenizer, config=None, edit=None) -> Tokenizer:
    files = dict(tokenizer.files)
    if config is not None:
        files["tokenizer_config.json"] = json.dumps(config)
    if edit is not None:
        content = json.loads(files["tokenizer.json"])
        edit(content)
        files["tokenizer.json"] = json.dumps(content)
    return Tokenizer(files, "edited")


def with_bos(content: dict) -> None:
    """As Llama's: a text begins with a token of its own."""
    token = content["added_tokens"][0]
    post = TemplateProcessing(single=f"{token['content']} $A", special_tokens=[(token["content"], token["id"])])
    content["post_processor"] = json.loads(post.__getstate__())


@pytest.mark.parametrize("kind", ["bpe", "characters", "refusing", "bos", "foreign class", "code", "nothing"])
def test_exports_are_the_tokenizer(kind, bpe, tmp_path):
    eod = bpe.eod_token
    tokenizer = {
        "bpe": lambda: bpe,
        "characters": lambda: character_tokenizer(["the quick brown fox <|endoftext|> jumps"]),
        "refusing": lambda: character_tokenizer([TEXT], unknown="refuse"),
        "bos": lambda: with_files(bpe, edit=with_bos),
        "foreign class": lambda: with_files(bpe, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": eod, "some": 1}),
        "code": lambda: with_files(bpe, {"auto_map": {"AutoTokenizer": ["code.Mine", None]}, "eos_token": eod}),
        "nothing": lambda: with_files(bpe, {}),
    }[kind]()
    save_tokenizer(tokenizer, tmp_path)
    assert same_tokenizer(tmp_path, tokenizer, TEXT)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in config
    assert config.get("some") == (1 if kind == "foreign class" else None)
    assert config.get("eos_token") == tokenizer.eod_token
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def edit_normalizer(content):
    content["normalizer"] = {"type": "NFKC"}


def edit_pre_tokenizer(content):
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def edit_decoder(content):
    content["decoder"] = None


def edit_spaces(content):
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "  "}, "content": " "}


@pytest.mark.parametrize("edit", [edit_normalizer, edit_pre_tokenizer, edit_decoder, edit_spaces, with_bos])
def test_another_one_is_found(edit, bpe, tmp_path):
    save_tokenizer(with_files(bpe, edit=edit), tmp_path)
    assert not same_tokenizer(tmp_path, bpe, "the")
