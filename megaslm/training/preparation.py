"""From the configs to a plan: open or build the tokens, load the tokenizer, decide layout, precision and length."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from megaslm_kernels import Ops

from megaslm.checkpoint import NUM_TOKENS
from megaslm.config import (
    BatchLayout,
    ModelConfig,
    RunConfig,
    requested_precision,
    resolve_batch,
    resolve_engine_config,
)
from megaslm.data import (
    PreparedCorpus,
    Tokenizer,
    TrainingData,
    ValidationData,
    common_tokenizer,
    find_tokenizer,
    load_tokenizer,
    prepare_corpus,
    vocab_size_of,
)
from megaslm.errors import UserError
from megaslm.evaluation import open_run_validation
from megaslm.parallel import Ranks, check_sizes, host
from megaslm.training.device import check_precision, choose_kernels, preferred_precision

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What the command line says beside the configs.

    resume: "auto" continues what the folder holds, "never" refuses a folder that holds a run, "weights" starts a new
        run from the weights of `weights_from`, a checkpoint or a run folder; later it continues that new run.
    """

    run_dir: Path
    resume: str = "auto"
    weights_from: Path | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class RunData:
    """What a run reads. `validation` by the names of its sets, UNNAMED_SET where they have none. `tokenizer` is None
    where the token files lead to none: no sample text, no bits per byte. `sample_prompt` is eval.sample_prompt in ids,
    or None where it is empty. `fingerprint_tokens` are those that every checkpoint's fingerprint is of."""

    training: TrainingData
    validation: dict[str, ValidationData]
    tokenizer: Tokenizer | None
    sample_prompt: np.ndarray | None
    fingerprint_tokens: list[int]


@dataclass(frozen=True)
class Plan:
    """A run with everything decided: what the header prints and the loop follows. Alike on all ranks."""

    run: RunConfig
    engine_config: dict
    options: Options
    ranks: Ranks
    data: RunData
    layout: BatchLayout
    precision: str
    ops: Ops
    steps: int
    say: Callable[..., None]


def make_plan(run: RunConfig, engine_file: dict, options: Options, ranks: Ranks) -> Plan:
    """Decide everything that follows from the configs, the data and the machine.

    Raises UserError on all ranks: configs that contradict each other or the machine, or are not those of another rank;
    and what `prepare_data` raises.
    """
    check_alike(run, engine_file, options)

    def say(*lines: str) -> None:
        """Print on rank 0. A terminal that is gone is no reason to lose a run."""
        if ranks.is_first:
            with contextlib.suppress(OSError):
                print(*lines, sep="\n", flush=True)

    batch = resolve_batch(run.train.global_batch_size, run.train.micro_batch_size, ranks.data_parallel_size)
    precision = requested_precision(engine_file, run.train.precision, auto=lambda: preferred_precision(ranks.device))
    check_precision(precision, ranks.device)
    ops = choose_kernels(run.train.kernels, ranks.device)
    engine_config = resolve_engine_config(
        engine_file, run=run, precision=precision, batch=batch, data_parallel_size=ranks.data_parallel_size
    )
    check_sizes(run.model, ranks.tensor_parallel.size)
    run, data = prepare_data(run, say)
    check_sizes(run.model, ranks.tensor_parallel.size)  # with the vocabulary
    steps = total_steps(run, data.training.samples_per_epoch)
    return Plan(run, engine_config, options, ranks, data, batch, precision, ops, steps, say)


def check_alike(run: RunConfig, engine_file: dict, options: Options) -> None:
    """Ranks with different settings would wait for each other for ever, or train different models. Collective.

    Raises UserError on all ranks, which names the first setting that differs.
    """
    settings = {"--resume": options.resume, "--dry_run": options.dry_run, "--ds_config": engine_file}
    for section, value in run.model_dump(mode="json").items():
        settings |= {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
    of_ranks = host.gather(settings)
    for rank, others in enumerate(of_ranks):
        for name, value in of_ranks[0].items():
            if others[name] != value:
                raise UserError(
                    f"every rank must be given the same settings, and {name} is {value} on rank 0 and {others[name]} "
                    f"on rank {rank}: start all of them with the same arguments and configs"
                )


def prepare_data(run: RunConfig, say: Callable[[str], None]) -> tuple[RunConfig, RunData]:
    """Open the run's data on every rank (rank 0 builds it first if it must) and return the config with its vocabulary.

    Raises UserError: no data, a tokenizer that does not match the token files, ids over the vocabulary, a corpus that
    is shorter than one sequence.
    """
    if not run.data.input and not run.data.train:
        raise UserError(
            f"the run {run.name!r} names no data: give raw text with data.input=FILE_OR_FOLDER, or token files with "
            "data.train=PREFIX (made by tools/preprocess_data.py)"
        )
    corpus = host.on_first(lambda: _build(run, say)) if run.data.input else None
    # On every rank, since a node may not see the files.
    return host.together(lambda: _open(run, corpus))


def _open(run: RunConfig, corpus: PreparedCorpus | None) -> tuple[RunConfig, RunData]:
    data = run.data
    if corpus is not None:
        train, tokenizer_dir = [(corpus.train_prefix, 1.0)], corpus.tokenizer_dir
    else:
        train = [(dataset.prefix, dataset.weight) for dataset in data.train]
        tokenizer_dir = run.tokenizer.path or _first(find_tokenizer, train)
    tokenizer = load_tokenizer(tokenizer_dir) if tokenizer_dir else None
    run = _with_vocabulary(run, tokenizer, train)
    fingerprint = tokenizer.fingerprint if tokenizer else None
    # Megatron's order is a shuffle of all the samples, those before this run too; the other one need not know of them.
    megatron = data.order == "megatron"
    num_samples = data.first_sample + total_steps(run) * run.train.global_batch_size if megatron else None
    training = TrainingData(
        train,
        run.seq_length,
        run.train.seed,
        split=None if corpus or data.validation_sets else data.split,
        vocab_size=run.model.vocab_size,
        tokenizer_fingerprint=fingerprint,
        order=data.order,
        num_samples=num_samples,
        mask_documents=data.mask_documents,
    )
    held_out = open_run_validation(run, corpus, fingerprint)
    common_tokenizer([*training.parts, *(part for one in held_out.values() for part in one.parts)])
    prompt = None
    if run.eval.sample_prompt:
        if tokenizer is None:
            raise UserError("eval.sample_prompt needs the tokenizer of the token files: tokenizer.path=DIR")
        prompt = tokenizer.encode(run.eval.sample_prompt, "eval.sample_prompt")
    count = min(NUM_TOKENS, run.model.context_length + 1)  # the last is a target alone
    return run, RunData(training, held_out, tokenizer, prompt, first_tokens(held_out, count))


def first_tokens(held_out: dict[str, ValidationData], count: int) -> list[int]:
    """The ids that the first validation set begins with, over again where it has fewer.

    Raises UserError: one of them is not in the vocabulary.
    """
    part = next(iter(held_out.values())).parts[0]
    ids = np.array(part.tokens[:count])
    part.check_ids(0, ids)
    return np.resize(ids, count).tolist()


def _build(run: RunConfig, say: Callable[[str], None]) -> PreparedCorpus:
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
        report=say,
    )


def _first(look: Callable[[str], T | None], train: list[tuple[str, float]]) -> T | None:
    """What `look` finds at the first token file where it finds something."""
    return next((found for prefix, _ in train if (found := look(prefix)) is not None), None)


def _with_vocabulary(run: RunConfig, tokenizer: Tokenizer | None, train: list[tuple[str, float]]) -> RunConfig:
    """Fill in model.vocab_size from the tokenizer or the token files, or check that the tokenizer fits."""
    given = run.model.vocab_size
    found = tokenizer.vocab_size if tokenizer is not None else _first(vocab_size_of, train)
    if given is None and found is None:
        raise UserError(
            f"the vocabulary of {train[0][0]} is not known: give its tokenizer (tokenizer.path=DIR), "
            "or model.vocab_size=N"
        )
    if given is not None and found is not None and found > given:
        raise UserError(
            f"the tokenizer has {found} tokens and model.vocab_size is {given}; "
            f"set model.vocab_size={found} or more, or leave it out"
        )
    if given is None:
        run = run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": found})})
    return run


def total_steps(run: RunConfig, samples_per_epoch: int | None = None) -> int:
    """Optimizer steps of the whole run: the first of max_steps, max_tokens and max_epochs to be reached.

    samples_per_epoch: needed for max_epochs alone.
    """
    limits = [run.step_limit] if run.step_limit else []
    if run.train.max_epochs:
        limits.append(math.ceil(run.train.max_epochs * samples_per_epoch / run.train.global_batch_size))
    return min(limits)


def identity(run: RunConfig, data: RunData) -> dict:
    """What may not change when a run continues: flat names and JSON values. (The data checks itself: `load_state`.)

    The global batch is among it: it sets how many samples a step is, and with them the schedule and the run's length.
    """
    values = {f"model.{key}": value for key, value in run.model.model_dump(mode="json").items()}
    values["train.seed"] = run.train.seed
    values["train.global_batch_size"] = run.train.global_batch_size
    values["data.seq_length"] = run.seq_length
    values["tokenizer"] = data.tokenizer.fingerprint if data.tokenizer else None
    for key in ("mask_documents", "first_sample"):
        if value := getattr(run.data, key):  # left out otherwise: checkpoints from before it say nothing of it
            values[f"data.{key}"] = value
    return values


def completed_identity(saved: dict) -> dict:
    """The `identity` in a checkpoint, with the defaults of what came into the model's config since it was saved."""
    fields = ModelConfig.model_fields.items()
    return {f"model.{name}": field.get_default() for name, field in fields if not field.is_required()} | saved
