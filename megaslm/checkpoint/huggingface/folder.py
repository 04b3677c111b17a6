"""A Hugging Face model folder, read as our parameters: safetensors files, sharded or not, tensor by tensor.

Nothing of it is executed: no code, no pickle. What it describes must be our network to the last switch and tensor;
whatever is not is refused by name.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaslm.checkpoint.huggingface.families import DTYPE_NAMES, SPECIAL_TOKENS, family_named, model_config
from megaslm.checkpoint.huggingface.mapping import Group, parameter_groups
from megaslm.checkpoint.safetensors_file import SafetensorsFile
from megaslm.config import ModelConfig, read_json_object
from megaslm.data import Tokenizer, load_tokenizer
from megaslm.errors import UserError, first_line

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
OLDER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt")  # and *.tiktoken
# Of a hub repository, what is looked at.
HUB_FILES = (CONFIG, ADAPTER, GENERATION, SINGLE, INDEX, "model-*.safetensors", "*token*.json", "*.jinja")
HUB_FILES += (*OLDER_TOKENIZERS, "*.tiktoken")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
# Tensors that older versions stored and that hold no weights: causal masks and rotary frequencies.
BUFFERS = re.compile(r"(.*\.)?((attn|attention)\.(bias|masked_bias)|rotary_emb\.(inv_freq|cos_cached|sin_cached))")
# What stands before the names of all tensors but the head's, and in some old files does not.
PREFIXES = {"llama": "model.", "mistral": "model.", "qwen3": "model.", "gpt2": "transformer.", "gpt_neox": "gpt_neox."}
HEADS = ("lm_head.weight", "embed_out.weight")  # gpt_neox had the second until transformers 5
MAX_NAMES = 3  # that a message lists
NO_PICKLES = (
    "can run code, which is why megaslm never opens it. If you trust it, write it anew: "
    "transformers.AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(NEW_FOLDER)"
)


class StoredTensors:
    """The tensors of a folder's safetensors files, by their names there. Each file is opened once.

    Raises:
        UserError: no safetensors files (says what there is instead), one that can't be read, a tensor in two of them.
    """

    def __init__(self, folder: Path) -> None:
        self.files = weight_files(folder)
        self._open: dict[Path, SafetensorsFile] = {}
        self.places: dict[str, Path] = {}
        for path in self.files:
            for name in self._opened(path).shapes:
                first = self.places.setdefault(name, path)
                if first != path and not BUFFERS.fullmatch(name):
                    raise UserError(
                        f"{folder}: {name} stands in {first.name} and in {path.name}, and only one of them can be "
                        "meant; fetch the model again"
                    )

    def shape(self, name: str) -> tuple[int, ...]:
        return self._opened(self.places[name]).shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Raises UserError for a type that is none of fp32, bf16 and fp16."""
        path = self.places[name]
        found = self._opened(path).types[name]
        if found not in DTYPES:
            raise UserError(
                f"{path}: {name} is of type {found}, and megaslm reads {', '.join(DTYPES)}; if the weights are "
                "quantized, take the model that they were made from"
            )
        return DTYPES[found]

    def read(self, name: str) -> Tensor:
        """One tensor, in host memory."""
        path = self.places[name]
        tensor = torch.empty(self.shape(name), dtype=self.dtype(name))
        try:
            self._opened(path).read_into(tensor.view(-1), name, 0)
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        return tensor

    def close(self) -> None:
        """Let go of the files; a later read opens them again."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def _opened(self, path: Path) -> SafetensorsFile:
        if path not in self._open:
            try:
                self._open[path] = SafetensorsFile(path)
            except (OSError, ValueError) as error:
                raise _unreadable(path, error) from error
        return self._open[path]


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return UserError(f"{path} can't be read: {reason}; fetch it again (a Git LFS pointer may stand in its place)")


class HuggingFaceFolder:
    """An opened folder: its model, and its tensors under our names, read when asked for.

    Attributes:
        path: the folder.
        hf_config: content of config.json.
        family: a key of FAMILIES.
        config: our network's switches.
        dtype: that its weights are stored in; fp32 where they are of several types.
        dtypes: all that they are stored in.
        files: that hold the weights.
    """

    def __init__(self, path: str | Path) -> None:
        """Look at config.json and at the names, shapes and types of all tensors.

        Raises:
            UserError: no such folder, an adapter, pickled or quantized weights, a model that our network does not
                compute, a tensor that is missing, of no use, or of another shape.
        """
        self.path = Path(path)
        self.hf_config = read_hf_config(self.path)
        where = str(self.path / CONFIG)
        self.family = family_named(self.hf_config, where)
        self.config: ModelConfig = model_config(self.hf_config, where)
        groups = parameter_groups(self.config, self.family)
        self._groups = {group.ours: group for group in groups if group.ours is not None}
        self._stored = StoredTensors(self.path)
        self.files = self._stored.files
        self._names = self._find_names(groups)
        self._check_shapes(groups)
        self._check_absent_biases(groups)
        self.dtypes = {self._stored.dtype(name) for name in self._names.values()}
        self.dtype: torch.dtype = next(iter(self.dtypes)) if len(self.dtypes) == 1 else torch.float32

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of ours, the vocabulary padded."""

        def joined(group: Group) -> Tensor:
            return group.join(tuple(torch.empty(shape, device="meta") for shape in group.shapes))

        return {name: tuple(joined(group).shape) for name, group in self._groups.items()}

    @property
    def stored(self) -> dict[str, tuple[Path, tuple[int, ...], torch.dtype]]:
        """File, shape and type there of every tensor that the model is made of, by its name in the files.

        Left out are buffers, and a head that is stored though it is tied.
        """
        stored = self._stored
        return {name: (stored.places[name], stored.shape(name), stored.dtype(name)) for name in self._names.values()}

    def read(self, name: str) -> Tensor:
        """One parameter of ours, in host memory, of the type it is stored in.

        Raises:
            KeyError: no such parameter.
            UserError: its file can't be read.
        """
        group = self._groups[name]
        return group.join(tuple(self._stored.read(self._names[theirs]) for theirs in group.theirs))

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the folder; None where there is no tokenizer.json."""
        return load_tokenizer(self.path) if (self.path / TOKENIZER).is_file() else None

    @property
    def older_tokenizer(self) -> Path | None:
        """A file of a tokenizer in a format that megaslm does not read."""
        found = [self.path / name for name in OLDER_TOKENIZERS] + sorted(self.path.glob("*.tiktoken"))
        return next((path for path in found if path.is_file()), None)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What our network has no place for and an export gives back: see `hf_config`. JSON."""
        generation = self.path / GENERATION
        return {
            "family": self.family,
            "dtype": next(short for short, name in DTYPE_NAMES.items() if getattr(torch, name) == self.dtype),
            "special_tokens": {key: self.hf_config[key] for key in SPECIAL_TOKENS if key in self.hf_config},
            "generation_config": read_json_object(generation, "the model's") if generation.is_file() else None,
        }

    def close(self) -> None:
        """Let go of the files; a later read opens them again."""
        self._stored.close()

    def _find_names(self, groups: list[Group]) -> dict[str, str]:
        """The names, in the files, of the tensors of theirs: all are there, and no others."""
        prefix = PREFIXES[self.family]
        found = {name for name in self._stored.places if not BUFFERS.fullmatch(name)}
        bare = not any(name.startswith(prefix) for name in found)
        head = next((name for name in HEADS if name in found), HEADS[0])
        names = {}
        for theirs in (name for group in groups for name in group.theirs):
            names[theirs] = head if theirs in HEADS else theirs.removeprefix(prefix) if bare else theirs
        unused = found - set(names.values())
        embedding = names[groups[0].theirs[0]]
        if self.config.tie_embeddings and head in unused and embedding in found:
            self._check_tied_head(head, embedding)
            unused.remove(head)
        for what, wrong in (("missing", set(names.values()) - found), ("of no use to it", unused)):
            if wrong:
                more = f" and {len(wrong) - MAX_NAMES} more" if len(wrong) > MAX_NAMES else ""
                raise UserError(
                    f"{self.path} does not hold the {self.family} that its {CONFIG} describes: "
                    f"{', '.join(sorted(wrong)[:MAX_NAMES])}{more} {'are' if len(wrong) > 1 else 'is'} {what}"
                )
        return names

    def _check_tied_head(self, head: str, embedding: str) -> None:
        """A head that is stored though it is tied must be the embedding."""
        if not torch.equal(self._stored.read(head), self._stored.read(embedding)):
            raise UserError(
                f"{self._stored.places[head]}: tie_word_embeddings of {CONFIG} is true, and {head} is not {embedding}; "
                "set it to false if the head is a matrix of its own"
            )

    def _check_shapes(self, groups: list[Group]) -> None:
        for group in groups:
            for theirs, shape in zip(group.theirs, group.shapes, strict=True):
                name = self._names[theirs]
                if self._stored.shape(name) != shape:
                    raise UserError(
                        f"{self._stored.places[name]}: {name} has the shape {self._stored.shape(name)}, and by "
                        f"{self.path / CONFIG} it is {shape}"
                    )

    def _check_absent_biases(self, groups: list[Group]) -> None:
        """Biases that theirs always has and our network, under these switches, has not."""
        for name in (self._names[group.theirs[0]] for group in groups if group.ours is None):
            if self._stored.read(name).any():
                raise UserError(
                    f"{self._stored.places[name]}: {name} is not zero, and attention_bias of {CONFIG} is false; "
                    "megaslm's network has biases in attention, feed-forward and norms alike, or in none"
                )


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        UserError: there is none (says what the folder looks like), or it is no JSON object.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}" if not folder.exists() else f"{folder} is a file, not a folder")
    if (folder / CONFIG).is_file():
        return read_json_object(folder / CONFIG, "the model's")
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{folder} is an adapter of another model: merge the two first (peft: merge_and_unload, then "
            "save_pretrained), and take what that writes"
        )
    names = sorted(path.name for path in folder.iterdir())
    raise UserError(
        f"{folder} is not a Hugging Face model ({CONFIG} is missing); it holds {', '.join(names[:4]) or 'nothing'}"
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: the one there is, or those of the index; in transformers' order.

    Raises:
        UserError: there are none, or one that the index names is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        index = read_json_object(folder / INDEX, "the index")
        places = index.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise UserError(f"{folder / INDEX} has no weight_map from tensors to files")
        names = sorted(set(places.values()))
        # A name in an index is no place to leave the folder by.
        if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
            raise UserError(f"{folder}: {missing[0]} of {INDEX} is missing; fetch the model again")
        return [folder / name for name in names]
    names = sorted(path.name for path in folder.iterdir())
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        raise UserError(f"{folder}: {pickles[0]} is pickled, and a pickle {NO_PICKLES}")
    raise UserError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}; it holds {', '.join(names[:4])}")


def find_folder(name: str | Path) -> Path:
    """The folder of a model: a path, or a name on the Hugging Face hub, fetched to its cache as usual.

    Raises:
        UserError: no such folder, and the hub gives none; one without safetensors files, or that is no model.
    """
    if not str(name):
        raise UserError("the model's name is empty: give a folder, or a name on the Hugging Face hub")
    if Path(name).exists() or not HUB_NAME.fullmatch(str(name)):
        return Path(name)
    from huggingface_hub import snapshot_download  # here, since it takes a while to import

    try:
        folder = Path(snapshot_download(str(name), allow_patterns=list(HUB_FILES)))
    except Exception as error:  # no network, no such name, no permission: one class each
        reason = first_line(error, type(error).__name__)
        raise UserError(
            f"there is no {name} here, and the Hugging Face hub gives no model of that name ({reason})"
        ) from None
    # Only some files were fetched: what else is there, the folder does not say.
    if (folder / CONFIG).is_file():
        if not any((folder / file).is_file() for file in (SINGLE, INDEX)):
            raise UserError(
                f"{name} on the Hugging Face hub has no weights in safetensors (neither {SINGLE} nor {INDEX}). Most "
                f"often they are pickled there, and a pickle {NO_PICKLES}"
            )
    elif not (folder / ADAPTER).is_file():
        raise UserError(
            f"{name} on the Hugging Face hub is not a model of transformers: it has no {CONFIG}; look there for the "
            "one that it was made from"
        )
    return folder
