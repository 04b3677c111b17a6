"""Text -> tokenizer -> token files -> windows -> batches. Imports neither torch nor transformers."""

from megaslm.data.builder import BuildProgress, build_token_file, find_tokenizer, vocab_size_of
from megaslm.data.corpus import DEFAULT_VOCAB_SIZE, PreparedCorpus, describe, prepare_corpus
from megaslm.data.dataset import (
    IGNORED_TARGET,
    TokenRange,
    TrainingData,
    ValidationData,
    common_tokenizer,
    split_bounds,
)
from megaslm.data.order import ORDER_VERSION, Blend, Segment, WindowsOrder
from megaslm.data.sources import PYTHON_STDLIB, Document, TextSource
from megaslm.data.token_file import TokenFile, TokenFileWriter, verify
from megaslm.data.tokenizer import Tokenizer, load_tokenizer
from megaslm.data.tokenizer_training import ascii_tokenizer, character_tokenizer, train_bpe

__all__ = [
    "DEFAULT_VOCAB_SIZE",
    "IGNORED_TARGET",
    "ORDER_VERSION",
    "PYTHON_STDLIB",
    "Blend",
    "BuildProgress",
    "Document",
    "PreparedCorpus",
    "Segment",
    "TextSource",
    "TokenFile",
    "TokenFileWriter",
    "TokenRange",
    "Tokenizer",
    "TrainingData",
    "ValidationData",
    "WindowsOrder",
    "ascii_tokenizer",
    "build_token_file",
    "character_tokenizer",
    "common_tokenizer",
    "describe",
    "find_tokenizer",
    "load_tokenizer",
    "prepare_corpus",
    "split_bounds",
    "train_bpe",
    "verify",
    "vocab_size_of",
]
