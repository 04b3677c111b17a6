"""One door for every tool that uses a model: a checkpoint, a run, a Hugging Face folder or a name on its hub."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from megaslm_kernels import REFERENCE, Ops

from megaslm.checkpoint.folder import latest_sound, list_checkpoints, summaries
from megaslm.checkpoint.format import MANIFEST, WEIGHTS, Checkpoint, open_checkpoint
from megaslm.checkpoint.huggingface.folder import ADAPTER, CONFIG, HuggingFaceFolder, find_folder
from megaslm.config import ModelConfig
from megaslm.data import Tokenizer, find_tokenizer, load_tokenizer
from megaslm.errors import UserError
from megaslm.model import LanguageModel, stretch_positions

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
    """

    path: Path
    kind: Literal["checkpoint", "huggingface"]
    config: ModelConfig
    weights: Checkpoint | HuggingFaceFolder
    tokenizer: Tokenizer | None

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
            UserError: a file of the weights can't be read.
        """
        config = config or self.config
        with torch.device("meta"):
            model = LanguageModel(config, ops)
        model.to(dtype).to_empty(device=device)
        model.tie_weights()
        if model.decoder.rotary_table is not None:
            model.decoder.rotary_table.fill()
        for name, parameter in model.named_parameters():
            value = self.weights.read(name)
            if name == POSITIONS and value.size(0) != config.context_length:
                value = stretch_positions(value, config.context_length)
            assert value.shape == parameter.shape, f"{name} is {tuple(value.shape)}, not {tuple(parameter.shape)}"
            parameter.copy_(value)
        return model.eval()


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
    path = Path(path)
    if (directory := _checkpoints_of(path)) is not None:
        return _open_checkpoint(_newest(directory, verify), tokenizer)
    # A run folder without checkpoints has a config.json too, of another kind.
    if not (path / MANIFEST).exists() and ((path / CONFIG).is_file() or (path / ADAPTER).is_file()):
        if (path / "metrics.jsonl").exists() or (path / "checkpoints").is_dir():
            raise UserError(f"the run in {path} has saved no checkpoint yet")
        return open_huggingface(path, tokenizer)
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
    found = [one.path for one in summaries(directory)] or list_checkpoints(directory)
    return open_checkpoint(found[-1], verify=False, kinds=(WEIGHTS,))


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
    return ModelSource(checkpoint.path, "checkpoint", config, checkpoint, tokenizer)


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
    tokenizer = folder.tokenizer() if given is None else load_tokenizer(given)
    _check_size(tokenizer, folder.config, path)
    return ModelSource(path, "huggingface", folder.config, folder, tokenizer)


def _check_size(tokenizer: Tokenizer | None, config: ModelConfig, path: Path) -> None:
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens and the model of {path} only "
            f"{config.vocab_size}: it is not the model's; give the right one with --tokenizer DIR"
        )
