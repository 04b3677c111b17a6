"""A model of transformers as a checkpoint of ours, for continued pretraining.

The checkpoint holds weights alone, in fp32, which every number of theirs goes into and out of unchanged. In it lies a
run config, continue.json, with which `launch/pretrain.py --resume weights --from CHECKPOINT` starts.

It is written tensor by tensor, one in memory at a time, into a hidden folder, and gets its name when transformers has
computed the same logits from the original, for which that is in memory whole where there is room.
"""

import contextlib
import hashlib
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megaslm.checkpoint.fingerprint import NUM_TOKENS, Fingerprint, compare_fingerprints, take_fingerprint
from megaslm.checkpoint.folder import write_checkpoint
from megaslm.checkpoint.format import WEIGHTS, Piece
from megaslm.checkpoint.huggingface.families import dropout_of, needs_transformers_5
from megaslm.checkpoint.huggingface.folder import CONFIG, HuggingFaceFolder, find_folder
from megaslm.checkpoint.huggingface.library import load_transformers
from megaslm.checkpoint.huggingface.parity import (
    ExportDiffers,
    LogitsCheck,
    compare_logits,
    empty_network,
    parameters_on_demand,
)
from megaslm.checkpoint.opening import ModelSource, open_huggingface, open_model
from megaslm.checkpoint.safetensors_file import LazyTensor
from megaslm.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainConfig,
    save_run_config,
)
from megaslm.errors import UserError
from megaslm.files import side_by_side, sole_writer, sync_folder
from megaslm.model import count_parameters

CONTINUE = "continue.json"
# Of a run that continues: what fits in memory to begin with, whatever context the model allows.
SEQ_LENGTH = 2048
CHECKPOINTING_FROM = 1_000_000_000  # parameters
MAX_REASON = 400  # characters of a message of transformers


@dataclass(frozen=True)
class ImportResult:
    """A model that was imported.

    Attributes:
        checkpoint: its folder.
        run_config: path of the run config for continued pretraining.
        run_name: of the run that the config describes.
        tokenizer: folder of the tokenizer in the checkpoint; None where none was found.
        logits_check: how the comparison with transformers came out.
    """

    checkpoint: Path
    run_config: Path
    run_name: str
    tokenizer: Path | None
    logits_check: LogitsCheck


def import_model(
    model: str | Path, output: str | Path, tokenizer: str | None = None, report: Callable[[str], None] = print
) -> ImportResult:
    """Write a Hugging Face model as a checkpoint of weights alone, and prove it equal.

    Args:
        model: a folder, or a name on the hub.
        output: the checkpoint's folder, which is not there yet.
        tokenizer: a folder or a hub name, in place of the model's own.
        report: gets a line for each part that is done.

    Raises:
        ExportDiffers: transformers does not compute the same from the original; nothing is left.
        SaveFailed: a full disk, no permission, ...; nothing is left.
        UserError: a model that our network does not compute (see HuggingFaceFolder) or that transformers does not open,
            a tokenizer with more tokens than the model, weights that give no finite numbers, an output that is there
            already or that another process is writing.
    """
    output = Path(output)
    _check_free(output)
    source = open_huggingface(find_folder(model), tokenizer)
    _check_with_transformers(source.weights, own_tokenizer=tokenizer is None and source.tokenizer is not None)
    fingerprint = _fingerprint(source, with_roundings=True)
    if not all(map(math.isfinite, (fingerprint.loss, *fingerprint.logits))):
        raise UserError(
            f"the logits of {source.path} are not finite: its weights hold NaN, or numbers that overflow; fetch it "
            "again, or take another model"
        )
    origin = Path(model).absolute().name if Path(model).exists() else str(model)
    folder = output / "tokenizer" if source.tokenizer is not None else None
    run = continued_run(source, f"{_as_name(output.name)}-continued", origin, folder)
    with _hidden_folder(output) as hidden:
        written = _write(source, hidden, output.name, run, origin, fingerprint)
        report(f"read {count_parameters(source.config):,} parameters of a {source.weights.family}, {_types(source)}")
        check = _check(source, open_model(written), own_tokenizer=tokenizer is None, report=report)
        for line in _remarks(source, run):
            report(line)
        with _disk_errors(output):
            save_run_config(run, written / CONTINUE)
            written.rename(output)
            sync_folder(output.parent)
    return ImportResult(output, output / CONTINUE, run.name, folder, check)


def _check_free(output: Path) -> None:
    """UserError unless a folder of that name can be made."""
    if output.name in ("", ".."):
        raise UserError(f"--output {output} is no name for a new folder: give one, such as checkpoints/llama")
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} is there already; choose another --output, or move it away")


@contextlib.contextmanager
def _hidden_folder(output: Path) -> Iterator[Path]:
    """A place beside `output`, to be renamed from, for one process at a time; with all that is left in it, it goes.

    What was left by an import that was killed goes at the beginning.
    """
    hidden = output.with_name(f".{output.name}.import")
    with contextlib.ExitStack() as stack:
        with _disk_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(sole_writer(output))
        _check_free(output)  # by another process, meanwhile
        stack.callback(shutil.rmtree, hidden, ignore_errors=True)
        shutil.rmtree(hidden, ignore_errors=True)
        yield hidden


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise UserError(f"cannot write {output}: {error.strerror or error}{place}; choose another --output") from error


def _check_with_transformers(folder: HuggingFaceFolder, own_tokenizer: bool) -> None:
    """See that transformers opens what it will be asked to: before hours of work, not after them.

    Raises:
        UserError: names the file that it does not open, and why; or it is too old for it.
    """
    transformers = load_transformers()
    if int(transformers.__version__.split(".")[0]) < 5 and needs_transformers_5(folder.hf_config, CONFIG):
        raise UserError(
            f"{folder.path / CONFIG}: its rotary settings are spelled as transformers 5 spells them, and transformers "
            f"{transformers.__version__} passes over them: install transformers 5, to compare with"
        )
    opened = {CONFIG: transformers.AutoConfig}
    if own_tokenizer:
        opened["tokenizer_config.json"] = transformers.AutoTokenizer
    for file, kind in opened.items():
        try:
            kind.from_pretrained(folder.path, trust_remote_code=False)
        except Exception as error:  # a class for each fault
            reason = " ".join(str(error).split()) or type(error).__name__
            advice = "mend the file; no code beside it is run"
            if file != CONFIG:
                advice = "mend the file (no code beside it is run), or give a tokenizer (--tokenizer DIR)"
            raise UserError(
                f"{folder.path / file}: transformers {transformers.__version__}, which the model is compared with, "
                f"does not open it: {reason[:MAX_REASON]}; {advice}"
            ) from None


def _types(source: ModelSource) -> str:
    types = sorted(str(dtype).removeprefix("torch.") for dtype in source.weights.dtypes)
    if len(types) == 1:
        return f"in {source.weights.facts['dtype']}"
    return f"in {' and '.join(types)}: an export of it will be in one type, {source.weights.facts['dtype']}"


def _remarks(source: ModelSource, run: RunConfig) -> Iterator[str]:
    """What the user may not expect."""
    folder, tokenizer = source.weights, source.tokenizer
    if rates := dropout_of(folder.hf_config):
        given = ", ".join(f"{key} {rate}" for key, rate in rates.items())
        yield f"{given}: megaslm's network has no dropout, and continued training has none"
    if tokenizer is None:
        older = folder.older_tokenizer
        found = f"its tokenizer, {older}, is in a format that megaslm does not read" if older else "it has no tokenizer"
        convert = ": convert it with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)) and"
        yield f"{found}{convert if older else ':'} name the folder (--tokenizer FOLDER) wherever a tool needs one"
    elif tokenizer.bos_id != tokenizer.eod_id:
        begin, end = (
            "nothing" if i is None else f"{tokenizer.decode([i], skip_special=False)!r} ({i})"
            for i in (tokenizer.bos_id, tokenizer.eod_id)
        )
        yield f"its tokenizer begins a text with {begin} and ends one with {end}"
    if run.data.seq_length is not None:
        yield (
            f"continued training starts with sequences of {run.data.seq_length} tokens (data.seq_length), of the "
            f"{source.config.context_length} that the model has room for"
        )
    if run.train.activation_checkpointing:
        yield "continued training starts with activation checkpointing (train.activation_checkpointing)"


def continued_run(source: ModelSource, name: str, origin: str, tokenizer: Path | None) -> RunConfig:
    """A run config for continued pretraining of a model: its switches, and values to start from for the rest."""
    large = count_parameters(source.config) >= CHECKPOINTING_FROM
    return RunConfig(
        name=name,
        description=f"Continued pretraining of {origin}",
        model=source.config,
        data=DataConfig(seq_length=SEQ_LENGTH if source.config.context_length > SEQ_LENGTH else None),
        # Where the tokenizer will be when the run starts, from whatever folder.
        tokenizer=TokenizerConfig(path=None if tokenizer is None else str(tokenizer.absolute())),
        train=TrainConfig(global_batch_size=32, micro_batch_size=1, max_steps=1000, activation_checkpointing=large),
        optimizer=OptimizerConfig(lr=3e-5),
        schedule=ScheduleConfig(warmup_steps=50),
    )


def _write(source: ModelSource, hidden: Path, name: str, run: RunConfig, origin: str, fingerprint: Fingerprint) -> Path:
    """Write the checkpoint into the hidden folder; its path there."""
    folder: HuggingFaceFolder = source.weights
    pieces = [
        Piece.whole(name, LazyTensor(torch.float32, shape, partial(folder.read, name)))
        for name, shape in folder.shapes.items()
    ]
    tokenizer = source.tokenizer
    identity: dict[str, Any] = {f"model.{key}": value for key, value in source.config.model_dump(mode="json").items()}
    identity["tokenizer"] = tokenizer.fingerprint if tokenizer is not None else None
    return write_checkpoint(
        hidden,
        {WEIGHTS: pieces},
        step=0,
        run_config=run.model_dump(mode="json"),
        global_state={"identity": identity, "imported_from": describe_origin(folder, origin)},
        optimizer=None,
        fingerprint=fingerprint,
        tokenizer_files=tokenizer.files if tokenizer is not None else None,
        name=name,
    )


def describe_origin(folder: HuggingFaceFolder, name: str) -> dict[str, Any]:
    """What a checkpoint records of the model it was made from: its name and facts, and hashes of its weights' files."""

    def sha256(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    hashes = side_by_side(sha256, folder.files)
    return {
        "name": name,
        **folder.facts,
        "files": {path.name: digest for path, digest in zip(folder.files, hashes, strict=True)},
    }


def _fingerprint(source: ModelSource, with_roundings: bool = False) -> Fingerprint:
    """On tokens spread over the vocabulary, since there is no training data; a module's weights in memory at a time."""
    network = empty_network(source)
    with parameters_on_demand(network, source.weights.read):
        tokens = fingerprint_tokens(source.config)
        return take_fingerprint(network, tokens, "fp32", "cpu", with_roundings=with_roundings)


def fingerprint_tokens(config: ModelConfig) -> list[int]:
    """Ids spread evenly over the vocabulary, as many as a fingerprint has and the context holds."""
    count = min(NUM_TOKENS, config.context_length + 1)
    return [config.vocab_size * i // count for i in range(count)]


def _check(
    source: ModelSource, imported: ModelSource, own_tokenizer: bool, report: Callable[[str], None]
) -> LogitsCheck:
    """Compare what was written with the original: our fingerprint, and transformers' logits."""
    if difference := compare_fingerprints(imported.weights.fingerprint, _fingerprint(imported)):
        raise ExportDiffers(f"the checkpoint is not what was read from {source.path}: {difference}")
    # A tokenizer from elsewhere is not in the original's folder, and need not be equal to one that is.
    compared = replace(imported, path=source.path)  # what messages are to name
    check = compare_logits(source.path, compared, dtype=source.weights.dtype, same_ids=own_tokenizer)
    if not check.logits_equal:
        raise ExportDiffers(f"{check}: the model of {source.path} is not what its config.json describes to megaslm")
    report(str(check))
    if check.tokenizer_equal is False:
        report(
            "transformers' AutoTokenizer gives other ids of a text than tokenizer.json does, or another text of ids; "
            "megaslm goes by tokenizer.json: see with which of the two the model was trained"
        )
    return check


def _as_name(text: str) -> str:
    """`text` with what the name of a run may hold."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip("._-") or "imported"
