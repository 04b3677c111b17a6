"""Small corpora and tokenizers, made once per session; nothing is downloaded."""

from pathlib import Path

import numpy as np
import pytest

from megaslm.data import TokenFileWriter, Tokenizer, train_bpe

SAMPLE = """def window(tokens, start, seq_length):
    \"\"\"One sample: seq_length inputs and the target of the last.\"\"\"
    return tokens[start : start + seq_length + 1]


The quick brown fox jumps over the lazy dog; the dog doesn't mind, and it's 12345 o'clock in New York.
Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 敏捷的棕色狐狸 \U0001f98a
"""


@pytest.fixture(scope="session")
def sample_text() -> str:
    return SAMPLE


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return train_bpe([SAMPLE] * 4, vocab_size=300)


@pytest.fixture
def write_tokens(tmp_path):
    """write_tokens(documents, name=..., vocab_size=..., manifest=True, tokenizer=...) -> PREFIX"""

    def write(
        documents, name: str = "corpus", vocab_size: int = 60_000, manifest: bool = True, tokenizer: str = "f00d"
    ):
        prefix = str(tmp_path / name)
        with TokenFileWriter(prefix, vocab_size, tokenizer_fingerprint=tokenizer) as writer:
            writer.extend([np.asarray(document) for document in documents])
            writer.finish()
        if not manifest:
            Path(f"{prefix}.json").unlink()
        return prefix

    return write
