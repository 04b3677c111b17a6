"""One door for every tool that uses a model: a checkpoint, a run, a Hugging Face folder or a name on its hub."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megaslm_kernels import REFERENCE, Ops

from megaslm.checkpoint.folder import latest_sound, list_checkpoints, summaries
from megaslm.checkpoint.format import MANIFEST, WEIGHTS, Checkpoint, follow_link, open_checkpoint
from megaslm.checkpoint.huggingface.folder import (
    ADAPTER,
    CONFIG,
    MAX_NAMES,
    HuggingFaceFolder,
    find_folder,
    read_hf_config,
)
from megaslm.config import ModelConfig
from megaslm.data import Tokenizer, find_tokenizer, load_tokenizer
from megaslm.errors import UserError
from megaslm.model import LanguageModel, stretch_positions
from megaslm.resources import available_memory

logger = logging.getLogger(__name__)

POSITIONS = "decoder.position_embedding.weight"


@dataclass(frozen=True)
class ModelSource:
    """A model that was found: what it is, and where its numbers are read.

    Attributes:
        path: the folder of the checkpoint or of the Hugging Face model.
        config: with its vocabulary.
        weights: `read(name)` gives a parameter, `shapes` says which there are.
        tokenizer: the one that the model was trained with; None where none was found.
        tokenizer_fingerprint: of the tokenizer that the model's ids are of, which need not have been found; None where
            nothing says which that was.
    """

    path: Path
    kind: Literal["checkpoint", "huggingface"]
    config: ModelConfig
    weights: Checkpoint | HuggingFaceFolder
    tokenizer: Tokenizer | None
    tokenizer_fingerprint: str | None

    @property
    def origin(self) -> dict[str, Any]:
        """`HuggingFaceFolder.facts` of the model of transformers that this is or was imported from; else nothing."""
        if isinstance(self.weights, HuggingFaceFolder):
            return self.weights.facts
        return self.weights.global_state.get("imported_from") or {}

    @property
    def eod_ids(self) -> frozenset[int]:
        """Ids that end a text: those of a model of transformers, or of the one it was imported from, where generate
        would read them; else the tokenizer's end-of-document token, if it has one.

        Raises UserError where that model has something else in their place.
        """
        origin = self.origin
        for settings in (origin.get("generation_config") or {}, origin.get("special_tokens") or {}):
            if (named := settings.get("eos_token_id")) is not None:
                ids = named if isinstance(named, list) else [named]
                if not all(type(one) is int for one in ids):
                    raise UserError(f"{self.path}: eos_token_id is {named!r}, and not an id or a list of them; mend it")
                return frozenset(ids)
        if self.tokenizer is None or self.tokenizer.eod_id is None:
            return frozenset()
        return frozenset((self.tokenizer.eod_id,))

    @torch.no_grad()
    def build(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        ops: Ops = REFERENCE,
        config: ModelConfig | None = None,
    ) -> LanguageModel:
        """The network with these weights, in eval mode. Host memory holds one parameter beside it at a time.

        Args:
            dtype: of the parameters; rotary angles stay fp32.
            config: of a longer context (see `stretch_context`); learned positions are drawn out to it.

        Raises:
            UserError: the weights are not those of the network that `self.config` describes; a file can't be read; the
                context is so long that its positions do not fit in memory.
        """
        if config is not None:
            _check_memory_of_positions(config, "the context length")
        config = config or self.config
        with torch.device("meta"):
            model = LanguageModel(config, ops)
        self._check_shapes(model)
        model.to(dtype).to_empty(device=device)
        model.tie_weights()
        if model.decoder.rotary_table is not None:
            model.decoder.rotary_table.fill()
        for name, parameter in model.named_parameters():
            value = self.weights.read(name)
            if name == POSITIONS and value.size(0) != config.context_length:
                value = stretch_positions(value, config.context_length)
            parameter.copy_(value)
        return model.eval()

    def _check_shapes(self, model: LanguageModel) -> None:
        """UserError unless the weights are the parameters of `model`, whose context alone may differ from theirs."""
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if POSITIONS in expected:
            expected[POSITIONS] = (self.config.context_length, *expected[POSITIONS][1:])
        found = self.weights.shapes
        faults = [f"{name} is missing" for name in expected.keys() - found.keys()]
        faults += [f"{name} is of no use to it" for name in found.keys() - expected.keys()]
        faults += [
            f"{name} has the shape {found[name]} instead of {expected[name]}"
            for name in expected.keys() & found.keys()
            if found[name] != expected[name]
        ]
        if faults:
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            raise UserError(
                f"the weights in {self.path} are not those of the model that its configuration describes: "
                f"{min(faults)}{more}; put back the configuration that they were saved with"
            )


def open_model(path: str | Path, tokenizer: str | None = None, verify: bool = True) -> ModelSource:
    """Find a model by any of its names.

    Args:
        path: a checkpoint, or a link to one such as lm_current; a run folder or its folder of checkpoints (the newest
            sound one is taken); a Hugging Face folder of a family that megaslm computes; or a name on the hub.
        tokenizer: a folder or a hub name, in place of the tokenizer that would be found.
        verify: compare the hashes of a checkpoint's weights; else sizes alone.

    Raises:
        DamagedCheckpoint: names the files at fault.
        UserError: nothing there, or something else (says what it looks like); a checkpoint of a newer version; a model
            that our network does not compute; a tokenizer with more tokens than the model, or another one than that
            of its training.
    """
    if not str(path):
        raise UserError("the model's name is empty: give a checkpoint, a run, a Hugging Face folder or a hub name")
    path = Path(path)
    if (directory := _checkpoints_of(path)) is not None:
        return _open_checkpoint(_newest(directory, verify), tokenizer)
    # A run folder without checkpoints has a config.json too, of another kind.
    if not (path / MANIFEST).exists() and ((path / CONFIG).is_file() or (path / ADAPTER).is_file()):
        begun = (path / "metrics.jsonl").exists() or (path / "checkpoints").is_dir()
        if begun and "model_type" not in read_hf_config(path):
            raise UserError(f"the run in {path} has saved no checkpoint yet")
        return open_huggingface(path, tokenizer)
    if path.is_dir() and not (path / MANIFEST).exists():
        if named := sorted(child for child in path.iterdir() if (child / MANIFEST).is_file()):
            raise UserError(f"{path} is a folder of checkpoints with names of their own: give one, such as {named[0]}")
    if path.exists() or path.is_symlink() or path.parent != Path() and path.parent.is_dir():
        return _open_checkpoint(open_checkpoint(path, verify=verify, kinds=(WEIGHTS,)), tokenizer)
    return open_huggingface(find_folder(path), tokenizer)


def _checkpoints_of(path: Path) -> Path | None:
    """The folder of checkpoints that is meant by a run folder or by itself."""
    return next((folder for folder in (path / "checkpoints", path) if list_checkpoints(folder)), None)


def _newest(directory: Path, verify: bool) -> Checkpoint:
    if verify:
        checkpoint = latest_sound(directory, report=logger.warning, repair=False, kinds=(WEIGHTS,))
        assert checkpoint is not None, "the folder was seen to hold checkpoints"
        return checkpoint
    return open_checkpoint(newest_checkpoint(directory), verify=False, kinds=(WEIGHTS,))


def newest_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `open_model` would take without comparing hashes, sound or not; else `path` itself.

    Args:
        path: a run folder, its folder of checkpoints, or anything else that `open_model` takes.
    """
    directory = _checkpoints_of(Path(path))
    if directory is None:
        return follow_link(Path(path))
    return ([one.path for one in summaries(directory)] or list_checkpoints(directory))[-1]


def _open_checkpoint(checkpoint: Checkpoint, given: str | None) -> ModelSource:
    config = checkpoint.model_config
    trained_with = (checkpoint.global_state.get("identity") or {}).get("tokenizer")
    if given is not None:
        tokenizer = load_tokenizer(given)
        if trained_with and tokenizer.fingerprint != trained_with:
            raise UserError(
                f"{given} (fingerprint {tokenizer.fingerprint}) is not the tokenizer that {checkpoint.path} was "
                f"trained with ({trained_with}): its ids mean other tokens; give that one"
            )
    else:
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None and trained_with:
            fitting = (one for one in _tokenizers_of_run(checkpoint) if one.fingerprint == trained_with)
            tokenizer = next(fitting, None)
    _check_size(tokenizer, config, checkpoint.path)
    fingerprint = trained_with or (tokenizer and tokenizer.fingerprint)
    return ModelSource(checkpoint.path, "checkpoint", config, checkpoint, tokenizer, fingerprint)


def _tokenizers_of_run(checkpoint: Checkpoint) -> Iterator[Tokenizer]:
    """Those that its run config and its data lead to: checkpoints did not always carry theirs."""
    folder = (checkpoint.run_config.get("tokenizer") or {}).get("path")
    datasets = (checkpoint.global_state.get("data") or {}).get("datasets", [])
    for look, name in [(str, folder), *((find_tokenizer, dataset["prefix"]) for dataset in datasets)]:
        try:
            if name and (found := look(name)):
                yield load_tokenizer(found)
        except UserError as error:  # gone, or another one by now
            logger.info("%s", error)


def open_huggingface(path: Path, given: str | None = None) -> ModelSource:
    """Open a Hugging Face folder; `given`: a tokenizer in place of its own. Raises UserError as `open_model`."""
    folder = HuggingFaceFolder(path)
    _check_memory_of_positions(folder.config, f"{folder.path / CONFIG}: max_position_embeddings")
    tokenizer = folder.tokenizer() if given is None else load_tokenizer(given)
    _check_size(tokenizer, folder.config, path, own=given is None)
    fingerprint = tokenizer and tokenizer.fingerprint
    return ModelSource(path, "huggingface", folder.config, folder, tokenizer, fingerprint)


def _check_size(tokenizer: Tokenizer | None, config: ModelConfig, path: Path, own: bool = False) -> None:
    """UserError for a tokenizer with ids that the embedding has no row for; `own`: it lies with the model."""
    if tokenizer is None or tokenizer.vocab_size <= config.vocab_size:
        return
    sizes = f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens and the model of {path} only "
    sizes += f"{config.vocab_size}"
    if not own:
        raise UserError(f"{sizes}: it is not the model's; give the right one with --tokenizer DIR")
    surplus = range(config.vocab_size, tokenizer.vocab_size)
    tokens = ", ".join(repr(tokenizer.decode([i], skip_special=False)) for i in surplus[:MAX_NAMES])
    raise UserError(
        f"{sizes}: beyond its embedding lie {tokens}{' and others' if len(surplus) > MAX_NAMES else ''}. Take them "
        "out of tokenizer.json and tokenizer_config.json, give the tokenizer without them (--tokenizer DIR), or "
        "enlarge the embedding with transformers (resize_token_embeddings)"
    )


def _check_memory_of_positions(config: ModelConfig, where: str) -> None:
    """UserError if what the network keeps of every position is more than the memory that is free; `where`: what to set
    lower."""
    rotary = config.position == "rope"
    # fp32 sines and cosines, or vectors
    size = 4 * config.context_length * (int(config.head_dim * config.rope_fraction) if rotary else config.hidden_size)
    free = available_memory()
    if size > free:
        raise UserError(
            f"{where} is {config.context_length}, whose {'rotary angles' if rotary else 'learned positions'} take "
            f"{size / 1e9:,.1f} GB, and {free / 1e9:.1f} GB of memory are free; set it to the context you will use"
        )
