"""Text -> tokenizer -> token files -> windows -> batches. Imports neither torch nor transformers."""

from megaslm.data.assembly import Assembly, assemble
from megaslm.data.builder import build_token_file, find_tokenizer, vocab_size_of
from megaslm.data.corpus import DEFAULT_VOCAB_SIZE, PreparedCorpus, describe, prepare_corpus
from megaslm.data.dataset import IGNORED_TARGET, Batch, TrainingData, ValidationData
from megaslm.data.encoder import ENCODERS, choose_encoder
from megaslm.data.megatron_order import MEGATRON_ORDER_VERSION, MegatronOrder
from megaslm.data.order import ORDER_VERSION, Blend, Segment, WindowsOrder
from megaslm.data.pipeline import ON_ERROR, BuildOptions, preprocess, skipped_records
from megaslm.data.reshaping import merge_token_files, split_token_file
from megaslm.data.sources import PYTHON_STDLIB, Document, TextSource
from megaslm.data.standard_text import STANDARD_FILE, standard_text
from megaslm.data.statistics import DatasetStatistics, dataset_statistics, excerpts, plot_lengths, tokenizer_of
from megaslm.data.token_file import TokenFile, verify
from megaslm.data.token_range import TokenRange, common_tokenizer, split_bounds
from megaslm.data.token_writer import TokenFileWriter, output_lock
from megaslm.data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from megaslm.data.tokenizer_training import ascii_tokenizer, character_tokenizer, train_bpe
from megaslm.data.work import BuildProgress
from megaslm.resources import num_cores

__all__ = [
    "DEFAULT_VOCAB_SIZE",
    "ENCODERS",
    "IGNORED_TARGET",
    "MEGATRON_ORDER_VERSION",
    "ON_ERROR",
    "ORDER_VERSION",
    "PYTHON_STDLIB",
    "TOKENIZER_FILES",
    "Assembly",
    "Batch",
    "Blend",
    "BuildOptions",
    "BuildProgress",
    "DatasetStatistics",
    "Document",
    "MegatronOrder",
    "PreparedCorpus",
    "STANDARD_FILE",
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
    "assemble",
    "build_token_file",
    "character_tokenizer",
    "choose_encoder",
    "common_tokenizer",
    "dataset_statistics",
    "describe",
    "excerpts",
    "find_tokenizer",
    "load_tokenizer",
    "merge_token_files",
    "num_cores",
    "output_lock",
    "plot_lengths",
    "prepare_corpus",
    "preprocess",
    "skipped_records",
    "split_bounds",
    "split_token_file",
    "standard_text",
    "tokenizer_of",
    "train_bpe",
    "verify",
    "vocab_size_of",
]
