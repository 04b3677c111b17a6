"""What a model is evaluated on: token files, text, and what its own run held out. Opened, and with it checked, before
the first forward pass."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megaslm.checkpoint import Checkpoint, ModelSource
from megaslm.config import UNNAMED_SET, RunConfig, recorded_run_config
from megaslm.data import (
    Document,
    PreparedCorpus,
    TextSource,
    TokenFile,
    Tokenizer,
    ValidationData,
    build_token_file,
)
from megaslm.errors import UserError
from megaslm.evaluation.loss import LossSums, check_context, evaluate_tokens
from megaslm.model import LanguageModel

COUNTED_TOKENS = 1 << 22  # of a token file at a time


@dataclass(frozen=True)
class EvaluationSet:
    """Tokens to be evaluated on, opened.

    Attributes:
        name: as it was given.
        max_sequences: the first so many windows alone; None: all.
        byte_scale: UTF-8 bytes of the text for each that the tokenizer counts in its tokens. It maps characters, or
            does not know how many bytes a token stands for.
    """

    name: str
    data: ValidationData
    max_sequences: int | None = None
    byte_scale: float = 1.0

    def evaluate(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None,
        batch_size: int,
        progress: Callable[[int], None] = lambda windows: None,
    ) -> LossSums:
        """Errors as of `evaluate_tokens`."""
        sums = evaluate_tokens(model, self.data, tokenizer, batch_size, self.max_sequences, progress)
        return replace(sums, num_bytes=round(sums.num_bytes * self.byte_scale))


@dataclass(frozen=True)
class Windows:
    """How tokens are read; the arguments of `ValidationData`.

    Attributes:
        seq_length: tokens of a window.
        split: of token files, read the second part alone.
        text_key: the field of a record that holds its text.
        max_sequences: of each set, the first so many windows alone; None: all.
    """

    seq_length: int
    stride: int | None = None
    split: str | None = None
    mask_documents: bool = False
    text_key: str = "text"
    max_sequences: int | None = None


def open_sets(source: ModelSource, data: Sequence[str], text: Sequence[str], windows: Windows) -> list[EvaluationSet]:
    """Token files (PREFIX) and inputs of text, a set each.

    UserError for two sets of one name, text without a tokenizer, windows longer than the context, token files of
    another tokenizer than that of the model's training, whatever a source of text refuses, and a set of under two
    tokens.
    """
    check_names([*data, *text], "a set of data or text")
    check_context(source.config, windows.seq_length)
    if text and source.tokenizer is None:
        raise UserError(f"{source.path} has no tokenizer, which text needs: --tokenizer DIR")
    return [
        *(
            EvaluationSet(
                prefix,
                ValidationData(
                    [prefix],
                    windows.seq_length,
                    split=windows.split,
                    vocab_size=source.config.vocab_size,
                    tokenizer_fingerprint=source.tokenizer_fingerprint,
                    mask_documents=windows.mask_documents,
                    stride=windows.stride,
                ),
                windows.max_sequences,
            )
            for prefix in data
        ),
        *(tokenize_text(str(one), [one], source.tokenizer, source.config.vocab_size, windows) for one in text),
    ]


def check_names(names: Sequence[str], what: str) -> None:
    """UserError for a name that is empty, or there twice."""
    seen: set[str] = set()
    for name in map(str, names):
        if not name.strip():
            raise UserError(f"the name of {what} is empty: give one, or leave the option out")
        if name in seen:
            raise UserError(f"{what} is given twice: {name}; name each once")
        seen.add(name)


def tokenize_text(
    name: str, inputs: Sequence[str | os.PathLike], tokenizer: Tokenizer, vocab_size: int, windows: Windows
) -> EvaluationSet:
    """The text of `inputs`, whatever the sources of megaslm.data read, as tokens on the disk.

    Documents one after the other, each closed by the end-of-document token, which is a target and of no bytes. No more
    of them is read than the windows take. The files have lost their names when this returns, and their room on the disk
    is free when the set is let go, however the process ends.

    UserError for what a source refuses, and a text of under two tokens.
    """
    text = TextSource(inputs, windows.text_key)
    most = None
    if windows.max_sequences is not None:
        most = (windows.max_sequences - 1) * (windows.stride or windows.seq_length) + windows.seq_length + 1
    with tempfile.TemporaryDirectory(prefix="megaslm_") as folder:
        prefix = os.path.join(folder, "text")
        tokens = 0

        def count(done) -> None:
            nonlocal tokens
            tokens = done.tokens

        def documents() -> Iterator[Document]:
            for document in text:
                if most is not None and tokens >= most:
                    return
                yield document

        try:
            manifest = build_token_file(documents(), tokenizer, prefix, progress=count)
            data = ValidationData(
                [prefix],
                windows.seq_length,
                vocab_size=vocab_size,
                mask_documents=windows.mask_documents,
                stride=windows.stride,
            )
        except UserError as error:
            raise UserError(str(error).replace(prefix, name)) from None
        ids = TokenFile(prefix).tokens
    counted = sum(tokenizer.count_bytes(ids[at : at + COUNTED_TOKENS]) for at in range(0, len(ids), COUNTED_TOKENS))
    scale = manifest["text_bytes"] / counted if manifest["text_bytes"] and counted else 1.0
    return EvaluationSet(name, data, windows.max_sequences, scale)


def evaluate_text(
    model: LanguageModel,
    inputs: Sequence[str | os.PathLike],
    tokenizer: Tokenizer,
    batch_size: int,
    seq_length: int,
    *,
    stride: int | None = None,
    mask_documents: bool = False,
    max_sequences: int | None = None,
    text_key: str = "text",
    progress: Callable[[int], None] = lambda windows: None,
) -> LossSums:
    """The losses of `model` over the text of `inputs`, see `tokenize_text`.

    The first token of all is no target. Bytes are those of the text itself, also where the tokenizer maps characters or
    does not know how many a token stands for. UserError as of `tokenize_text`, and for windows longer than the context.
    """
    check_context(model.config, seq_length)
    windows = Windows(seq_length, stride, None, mask_documents, text_key, max_sequences)
    name = ", ".join(map(str, inputs))
    opened = tokenize_text(name, inputs, tokenizer, model.config.vocab_size, windows)
    return opened.evaluate(model, tokenizer, batch_size, progress)


def open_run_validation(
    run: RunConfig, corpus: PreparedCorpus | None, tokenizer_fingerprint: str | None
) -> dict[str, ValidationData]:
    """The validation sets of a run by name, UNNAMED_SET where they have none.

    Args:
        run: with its vocabulary.
        corpus: what was built of the run's raw text (data.input); None: it reads token files.
        tokenizer_fingerprint: of the tokenizer that the files are to be of.
    """
    if corpus is not None:
        sets = {UNNAMED_SET: [corpus.validation_prefix]}
    else:
        sets = run.data.validation_sets
    split = None if sets else run.data.split
    sets = sets or {UNNAMED_SET: [dataset.prefix for dataset in run.data.train if dataset.weight]}
    return {
        name: ValidationData(
            prefixes,
            run.seq_length,
            split=split,
            vocab_size=run.model.vocab_size,
            tokenizer_fingerprint=tokenizer_fingerprint,
            mask_documents=run.data.mask_documents,
        )
        for name, prefixes in sets.items()
    }


def own_validation(source: ModelSource, max_sequences: int | None = None) -> list[EvaluationSet]:
    """What the run of a checkpoint evaluates itself on, opened where its checkpoint says that it lay.

    Args:
        max_sequences: windows of each set; None: as many as the run reads.

    UserError for a model that names no data, and for data that is not there any more or of another tokenizer.
    """
    if not isinstance(source.weights, Checkpoint) or "data" not in source.weights.run_config:
        raise UserError(f"{source.path} says nothing of data: give --data, --text or --tasks")
    run = recorded_run_config(source.weights.run_config, f"checkpoint {source.path}")
    run = run.model_copy(update={"model": source.config})
    try:
        corpus = None
        if run.data.input:
            # Not looked for by the input, which may be gone or changed: then it would be another corpus.
            datasets = (source.weights.global_state.get("data") or {}).get("datasets")
            if not datasets:
                raise UserError("the checkpoint does not say where it was built")
            corpus = PreparedCorpus.in_folder(Path(datasets[0]["prefix"]).parent)
        sets = open_run_validation(run, corpus, source.tokenizer_fingerprint)
    except UserError as error:
        raise UserError(
            f"the validation data of the run cannot be read ({error}): run this where its relative paths lead to it, "
            "or give --data PREFIX or --text INPUT"
        ) from None
    return [EvaluationSet(name, data, max_sequences or run.eval.max_sequences) for name, data in sets.items()]
