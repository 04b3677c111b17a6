"""A model of transformers as a checkpoint of ours, for continued pretraining.

The checkpoint holds weights alone, in fp32, which every number of theirs goes into and out of unchanged. Beside it lies
a run config, CHECKPOINT.json, with which `launch/pretrain.py --resume weights --from CHECKPOINT` starts.

Tensor by tensor: one is in memory at a time. The checkpoint is written into a hidden folder and gets its name when
transformers has computed the same logits from the original.
"""

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megaslm.checkpoint.fingerprint import NUM_TOKENS, Fingerprint, compare_fingerprints, take_fingerprint
from megaslm.checkpoint.folder import write_checkpoint
from megaslm.checkpoint.format import WEIGHTS, Piece
from megaslm.checkpoint.huggingface.families import DTYPE_NAMES, dropout_of
from megaslm.checkpoint.huggingface.folder import HuggingFaceFolder, find_folder
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
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainConfig,
    save_run_config,
)
from megaslm.errors import UserError
from megaslm.files import side_by_side, sync_folder
from megaslm.model import count_parameters


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
        UserError: a model that our network does not compute (see HuggingFaceFolder), a tokenizer with more tokens than
            the model, an output that is there already.
    """
    output = Path(output)
    preset = output.parent / f"{output.name}.json"
    for path in (output, preset):
        if path.exists() or path.is_symlink():
            raise UserError(f"{path} is there already; choose another --output, or move it away")
    source = open_huggingface(find_folder(model), tokenizer)
    if rates := dropout_of(source.weights.hf_config):
        given = ", ".join(f"{key} {rate}" for key, rate in rates.items())
        report(f"{given}: megaslm's network has no dropout, and continued training has none")
    origin = Path(model).absolute().name if Path(model).exists() else str(model)
    run = continued_run(source, f"{_as_name(output.name)}-continued", origin)
    staging = output.parent / f".{output.name}.import"  # in the same file system, to be renamed
    shutil.rmtree(staging, ignore_errors=True)  # of an import that was killed
    try:
        written = _write(source, staging, output.name, run, origin)
        imported = open_model(written)
        family, dtype = source.weights.family, _short_type(source.weights.dtype)
        report(f"read {count_parameters(source.config):,} parameters of a {family} in {dtype}")
        check = _check(source, imported, own_tokenizer=tokenizer is None, report=report)
        if imported.tokenizer is not None:
            # Where the tokenizer will be when the run starts, from whatever folder.
            folder = str((output / "tokenizer").absolute())
            run = run.model_copy(update={"tokenizer": TokenizerConfig(path=folder)})
        save_run_config(run, staging / preset.name)
        written.rename(output)
        (staging / preset.name).rename(preset)
        sync_folder(output.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return ImportResult(output, preset, run.name, output / "tokenizer" if imported.tokenizer else None, check)


def continued_run(source: ModelSource, name: str, origin: str) -> RunConfig:
    """A run config for continued pretraining of a model: its switches, and values to start from for the rest."""
    return RunConfig(
        name=name,
        description=f"Continued pretraining of {origin}",
        model=source.config,
        train=TrainConfig(global_batch_size=32, micro_batch_size=1, max_steps=1000),
        optimizer=OptimizerConfig(lr=3e-5),
        schedule=ScheduleConfig(warmup_steps=50),
    )


def _write(source: ModelSource, staging: Path, name: str, run: RunConfig, origin: str) -> Path:
    """Write the checkpoint into the hidden folder; its path there."""
    folder: HuggingFaceFolder = source.weights
    pieces = {
        parameter: Piece.whole(LazyTensor(torch.float32, shape, partial(folder.read, parameter)))
        for parameter, shape in folder.shapes.items()
    }
    tokenizer = source.tokenizer
    identity: dict[str, Any] = {f"model.{key}": value for key, value in source.config.model_dump(mode="json").items()}
    identity["tokenizer"] = tokenizer.fingerprint if tokenizer is not None else None
    return write_checkpoint(
        staging,
        {WEIGHTS: pieces},
        step=0,
        run_config=run.model_dump(mode="json"),
        global_state={"identity": identity, "imported_from": describe_origin(folder, origin)},
        optimizer=None,
        fingerprint=_fingerprint(source),
        tokenizer_files=tokenizer.files if tokenizer is not None else None,
        name=name,
    )


def describe_origin(folder: HuggingFaceFolder, name: str) -> dict[str, Any]:
    """What a checkpoint records of the model it was made from: name, family, type, hashes of its weights' files."""

    def sha256(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    hashes = side_by_side(sha256, folder.files)
    return {
        "name": name,
        "family": folder.family,
        "dtype": _short_type(folder.dtype),
        "files": {path.name: digest for path, digest in zip(folder.files, hashes, strict=True)},
    }


def _fingerprint(source: ModelSource) -> Fingerprint:
    """On tokens spread over the vocabulary, since there is no training data; a module's weights in memory at a time."""
    network = empty_network(source)
    with parameters_on_demand(network, source.weights.read):
        return take_fingerprint(network, fingerprint_tokens(source.config), "fp32", "cpu")


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
    compared = imported if own_tokenizer else replace(imported, tokenizer=None)
    check = compare_logits(source.path, compared, dtype=source.weights.dtype)
    verdict = f"logits of transformers {check.transformers} and megaslm differ by {check.max_difference:.1e} at most"
    verdict += f" ({check.tokens} tokens, {check.text}; allowed: {check.bound:.0e})"
    if not check.max_difference <= check.bound:  # a NaN is not below the bound
        raise ExportDiffers(f"{verdict}: the model of {source.path} is not what its config.json describes to megaslm")
    report(verdict)
    if check.tokenizer_equal is False:
        report(
            "transformers' AutoTokenizer gives other ids than tokenizer.json does; megaslm goes by tokenizer.json: "
            "see with which of the two the model was trained"
        )
    return check


def _as_name(text: str) -> str:
    """`text` with what the name of a run may hold."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip("._-") or "imported"


def _short_type(dtype: torch.dtype) -> str:
    return next(short for short, name in DTYPE_NAMES.items() if getattr(torch, name) == dtype)
