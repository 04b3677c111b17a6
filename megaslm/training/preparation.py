"""From a run config to tokens: build or open the token files, load the tokenizer, fill in what follows from them."""

import math
from dataclasses import dataclass
from pathlib import Path

from megaslm.config import RunConfig
from megaslm.data import PreparedCorpus, Tokenizer, TrainingData, ValidationData, load_tokenizer, prepare_corpus
from megaslm.errors import UserError
from megaslm.parallel import Ranks


@dataclass(frozen=True)
class RunData:
    """What a run reads. `tokenizer` is None where the token files name none: no sample text, no bits per byte."""

    training: TrainingData
    validation: ValidationData | None
    tokenizer: Tokenizer | None
    tokenizer_dir: Path | None


def prepare_data(run: RunConfig, ranks: Ranks) -> tuple[RunConfig, RunData]:
    """Open the run's data on every rank (rank 0 builds it first if it must) and return the config with its vocabulary.

    Raises UserError: no data, a tokenizer that does not match the token files, ids over the vocabulary, a corpus that
    is shorter than one sequence.
    """
    data = run.data
    if data.input:
        built = ranks.on_first(lambda: _build(run))
        train, validation = [(built.train_prefix, 1.0)], [built.validation_prefix]
        tokenizer_dir = built.tokenizer_dir
    elif data.train:
        train = [(dataset.prefix, dataset.weight) for dataset in data.train]
        validation = [dataset.prefix for dataset in data.validation]
        tokenizer_dir = run.tokenizer.path
    else:
        raise UserError(
            f"the run {run.name!r} names no data: give raw text with data.input=FILE_OR_FOLDER, or token files with "
            "data.train=PREFIX (made by tools/preprocess_data.py)"
        )
    tokenizer = load_tokenizer(tokenizer_dir) if tokenizer_dir else None
    run = _with_vocabulary(run, tokenizer)
    fingerprint = tokenizer.fingerprint if tokenizer else None
    training = TrainingData(
        train,
        seq_length=run.seq_length,
        seed=run.train.seed,
        vocab_size=run.model.vocab_size,
        split=None if validation else data.split,
        tokenizer_fingerprint=fingerprint,
    )
    held_out = ValidationData(
        validation or [prefix for prefix, _ in train],
        seq_length=run.seq_length,
        vocab_size=run.model.vocab_size,
        split=None if validation else data.split,
        tokenizer_fingerprint=fingerprint,
    )
    return run, RunData(training, held_out, tokenizer, tokenizer_dir and Path(tokenizer_dir))


def _build(run: RunConfig) -> PreparedCorpus:
    return prepare_corpus(
        run.data.input,
        run.data.build_dir,
        run.name,
        text_key=run.data.text_key,
        tokenizer_path=run.tokenizer.path,
        tokenizer_type=run.tokenizer.type,
        vocab_size=run.tokenizer.vocab_size,
        unknown=run.tokenizer.unknown,
        validation_fraction=run.data.validation_fraction,
        validation_unit=run.data.validation_unit,
        report=lambda line: print(line, flush=True),
    )


def _with_vocabulary(run: RunConfig, tokenizer: Tokenizer | None) -> RunConfig:
    """Fill in model.vocab_size from the tokenizer, or check that the tokenizer fits."""
    vocab_size = run.model.vocab_size
    if tokenizer is None and vocab_size is None:
        raise UserError(
            "the vocabulary is not known: give the tokenizer that the token files were made with (tokenizer.path=DIR), "
            "or model.vocab_size=N"
        )
    if tokenizer is not None and vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and model.vocab_size is {vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size} or more, or leave it out"
        )
    if vocab_size is None:
        run = run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": tokenizer.vocab_size})})
    return run


def total_steps(run: RunConfig, training: TrainingData) -> int:
    """Optimizer steps of the whole run: the first of max_steps, max_tokens and max_epochs to be reached."""
    limits = []
    if run.train.max_steps:
        limits.append(run.train.max_steps)
    if run.train.max_tokens:
        limits.append(math.ceil(run.train.max_tokens / run.tokens_per_step))
    if run.train.max_epochs:
        limits.append(math.ceil(run.train.max_epochs * training.samples_per_epoch / run.train.global_batch_size))
    return min(limits)


def identity(run: RunConfig, data: RunData) -> dict:
    """What may not change when a run continues: flat names and JSON values."""
    values = {f"model.{key}": value for key, value in run.model.model_dump(mode="json").items()}
    values["train.seed"] = run.train.seed
    values["data.seq_length"] = run.seq_length
    values["tokenizer"] = data.tokenizer.fingerprint if data.tokenizer else None
    values["data"] = data.training.state()
    return values
