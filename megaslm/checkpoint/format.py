"""The checkpoint format: a folder of safetensors files and a manifest, which knows nothing of ranks or ZeRO stages.

    step_00001000/
        manifest.json                   everything but the tensors; written last
        weights_00000.safetensors ...   fp32 master weights, the part that rank 0 held
        exp_avg_00000.safetensors ...   Adam's first moments; none in a checkpoint of weights alone
        exp_avg_sq_00000.safetensors ...
        tokenizer/tokenizer.json ...    the run's, as a folder of its own; none where the token files lead to none

manifest.json:

    format, version         "megaslm-checkpoint", 2; 3 where a piece has a `tensor`, which readers of 2 do not know
    sha256                  of the manifest itself, with zeros in this place
    serial                  one more than the largest in the folder: the order of saves, whatever the clocks say
    written                 when, UTC, ISO 8601
    step                    optimizer steps made
    code                    versions that wrote it
    run_config              the resolved run config
    global_state            of the training loop: samples consumed, schedule, skipped steps, ...
    marks                   what retention goes by: {validation_loss: of this step, nats, or null;
                            epoch: the number of the epoch of training data that ended here, or null}
    optimizer               null, or {type: "adam", moments, steps: {parameter: count},
                            weight_decay: {parameter: rate}, loss_scaler: null or {...}}
    fingerprint             null (absent in older ones), or what the model of this step computes, see fingerprint.py:
                            {tokens, precision, loss, logits, rounded: {precision: {loss, logits}}}
    files                   {name: {bytes, sha256}}
    tensors                 {kind: {parameter: {shape, pieces: [{file, start, numel, block?, tensor?}]}}}

`kind` is "weights" or a moment; everything is fp32. A piece is the elements [start, start + numel) of the flattened
tensor, as one rank held them under ZeRO: ranks write what they have, without a word between them. `block`, {offset,
shape}, is the rectangle that a slice of tensor parallelism is, where that is no range of the flattened tensor: the
piece is then elements of the block, flattened. A piece lies in its file under the parameter's name; of a packed weight
a rank may have several (its queries, its keys, its values), and the second one's name there, as `tensor` says, is
NAME#1, the third one's NAME#2. Nothing is pickled: reading executes nothing.

What is whole (of one rank, or of stage 0) is stored in its own shape, and such a file is what others expect of one: all
of NAME. In a file of a slice, NAME is what that rank had of it, of a packed weight its queries alone: read those with
the manifest.

There is no random state to keep: initial weights, sample order and sampled text are pure functions of the seed and of
the samples consumed, and the network has no dropout.
"""

import hashlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from megaslm.checkpoint.fingerprint import Fingerprint
from megaslm.checkpoint.safetensors_file import LazyTensor, SafetensorsFile
from megaslm.checkpoint.slices import Part, Window, find_fault, overlaps
from megaslm.config import ModelConfig
from megaslm.data import Tokenizer
from megaslm.errors import UserError
from megaslm.files import allow_open_files, flush_to_disk, refuse_too_many_files, side_by_side
from megaslm.parallel import Block, host

logger = logging.getLogger(__name__)

FORMAT = "megaslm-checkpoint"
FORMAT_VERSIONS = (2, 3)
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
WEIGHTS = "weights"
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
HASH_PLACE = "0" * 64
FILES_AT_A_TIME = 8  # that are verified side by side
COPY_LIMIT = 2**22  # elements that are mapped at a time, at most or one row, where a rectangle is copied by rows


# Of a file in the manifest: nothing outside of the folder, whoever wrote it.
FILE_NAME = re.compile(rf"(?:{TOKENIZER}/)?(?!\.\.?\Z)[^/\\\0]+")


class DamagedCheckpoint(UserError):
    """A checkpoint of ours with a file that is missing, cut short or changed: another one may be sound."""


@dataclass(frozen=True)
class Piece:
    """What one rank writes of a tensor.

    parameter, shape: the tensor's name, and its shape as a whole.
    part: of it.
    data: on any device; (part.numel,), or the whole tensor (or block) in its own shape; written as fp32. A
        `LazyTensor`, which is a whole tensor in fp32, is made when it is written.
    """

    parameter: str
    shape: tuple[int, ...]
    part: Part
    data: Tensor | LazyTensor

    @property
    def nbytes(self) -> int:
        return 4 * self.part.numel

    @property
    def stored(self) -> Tensor | LazyTensor:
        """What is written: a whole tensor, or a whole block of one, in its own shape; else a line of elements."""
        if isinstance(self.data, LazyTensor):
            assert self.data.shape == self.shape and self.data.dtype == torch.float32, "a lazy piece is a whole tensor"
            return self.data
        assert self.data.numel() == self.part.numel, f"{self.data.numel()} elements of {self.parameter} for {self.part}"
        shape = self.part.block.shape
        return self.data.reshape(shape if self.part.numel == math.prod(shape) else -1)

    @classmethod
    def whole(cls, parameter: str, tensor: Tensor | LazyTensor) -> "Piece":
        shape = tuple(tensor.shape)
        return cls(parameter, shape, Part.whole(shape), tensor)

    def entry(self, key: str, file: str) -> dict[str, Any]:
        """Its entry in the manifest; key: its name in the file."""
        entry: dict[str, Any] = {"file": file, "start": self.part.start, "numel": self.part.numel}
        if self.part.block != Block.whole(self.shape):
            entry["block"] = {"offset": list(self.part.block.offset), "shape": list(self.part.block.shape)}
        if key != self.parameter:
            entry["tensor"] = key
        return entry


def by_key(pieces: Iterable[Piece]) -> dict[str, Piece]:
    """The pieces of one file by their names in it: the parameter's, and NAME#1, NAME#2, ... for more of the same."""
    count: Counter[str] = Counter()
    found = {}
    for piece in pieces:
        number = count[piece.parameter]
        found[f"{piece.parameter}#{number}" if number else piece.parameter] = piece
        count[piece.parameter] += 1
    return found


def _blocks(entry: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Block]]:
    """The pieces of a tensor with this entry in the manifest, and the block of the tensor that each is of."""
    whole = Block.whole(tuple(entry["shape"]))
    for piece in entry["pieces"]:
        place = piece.get("block")
        yield piece, Block(tuple(place["offset"]), tuple(place["shape"])) if place else whole


def find_tensor_fault(tensors: dict[str, dict[str, Any]]) -> str | None:
    """Why the `tensors` of a manifest are not all weights, and all of every kind there is; None if they are.

    Every element has to be there once: what a read would not fill is whatever the memory held.
    """
    if WEIGHTS not in tensors:
        return "it has no weights"
    shapes = {name: entry["shape"] for name, entry in tensors[WEIGHTS].items()}
    for kind, entries in tensors.items():
        if {name: entry["shape"] for name, entry in entries.items()} != shapes:
            return f"{kind} are not of the parameters that the weights are of"
        for name, entry in entries.items():
            ranges: dict[Block, list[tuple[int, int]]] = {}
            for piece, block in _blocks(entry):
                ranges.setdefault(block, []).append((piece["start"], piece["start"] + piece["numel"]))
            fault = find_fault(ranges, tuple(entry["shape"]))
            if fault is not None:
                return f"{kind} of {name} is not whole: {fault}"
    return None


def _version(manifest: dict[str, Any]) -> int:
    """The lowest one whose readers understand it."""
    entries = (entry for entries in manifest["tensors"].values() for entry in entries.values())
    pieces = (piece for entry in entries for piece in entry["pieces"])
    return 3 if any("tensor" in piece for piece in pieces) else 2


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json with its own hash in it, and fsync it."""
    text = json.dumps({"format": FORMAT, "version": _version(manifest), "sha256": HASH_PLACE, **manifest}, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    with open(folder / MANIFEST, "wb") as file:
        file.write(text.replace(HASH_PLACE, digest, 1).encode())
        flush_to_disk(file)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        DamagedCheckpoint: the manifest is missing, unreadable, or not what was written.
        UserError: no folder, not a checkpoint of ours (says what it looks like), or one of a newer version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        ours = names or folder.name.startswith("step_")
        if folder.is_dir() and ours and all(name.endswith(".safetensors") or name == TOKENIZER for name in names):
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {MANIFEST} is missing")
        raise UserError(_describe_foreign(folder))
    try:
        text = path.read_bytes().decode()
        manifest = json.loads(text)
        known = manifest.get("format") == FORMAT
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        refuse_too_many_files(error)
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {MANIFEST} can't be read ({error})") from error
    if not known and "sha256" not in manifest:
        raise UserError(f"{path} is not the manifest of a megaslm checkpoint; point to a folder step_... of a run")
    digest = str(manifest.get("sha256"))
    if hashlib.sha256(text.replace(digest, HASH_PLACE, 1).encode()).hexdigest() != digest:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {MANIFEST} is not what was written (hash differs)")
    if manifest["version"] not in FORMAT_VERSIONS:
        other = "a newer one" if manifest["version"] > max(FORMAT_VERSIONS) else "start anew"
        raise UserError(
            f"checkpoint {folder} has format version {manifest['version']}, this megaslm reads "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}: use the megaslm that wrote it ({manifest.get('code')}), "
            f"or {other}"
        )
    try:
        fault = _find_strange_name(manifest) or find_tensor_fault(manifest["tensors"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fault = f"an entry of a tensor is not one of ours ({error!r})"
    if fault is not None:
        raise UserError(f"{path} was not written by megaslm: {fault}; do not use it")
    return manifest


def _find_strange_name(manifest: dict[str, Any]) -> str | None:
    """Whether a manifest means files outside of its folder, or tensors in files whose hashes it does not have."""
    files = manifest["files"]
    strange = [name for name in files if not FILE_NAME.fullmatch(name)]
    for entries in manifest["tensors"].values():
        for entry in entries.values():
            strange += [piece["file"] for piece in entry["pieces"] if piece["file"] not in files]
    return f"{strange[0]!r} is no file of a checkpoint" if strange else None


def _describe_foreign(folder: Path) -> str:
    """Why a folder without a manifest is not a checkpoint, and what to do."""
    if not folder.exists():
        return f"there is no checkpoint {folder}"
    if not folder.is_dir():
        return f"{folder} is a file; a checkpoint is a folder step_... with a {MANIFEST} in it"
    names = {path.name for path in folder.iterdir()}
    deeper = sorted(path.parent.name for path in folder.glob(f"step_*/{MANIFEST}"))
    kind = None
    if deeper:
        return f"{folder} holds checkpoints but is none itself: name one of them, such as {folder / deeper[-1]}"
    if any(name.endswith(("_model_states.pt", "_optim_states.pt")) for name in names) or "zero_to_fp32.py" in names:
        kind = "a DeepSpeed checkpoint"
    elif "config.json" in names and any(name.endswith((".safetensors", ".bin")) for name in names):
        kind = "a Hugging Face model; tools/convert_from_hf.py turns one into a checkpoint"
    elif "latest_checkpointed_iteration.txt" in names or any(name.startswith("mp_rank_") for name in names):
        kind = "a Megatron-LM or DeepSpeed checkpoint"
    elif ".metadata" in names:
        kind = "a PyTorch distributed checkpoint"
    elif any(name.endswith((".pt", ".pth", ".ckpt")) for name in names):
        kind = "a pickled PyTorch checkpoint, which megaslm never opens"
    looks = f"it looks like {kind}" if kind else "it holds " + (", ".join(sorted(names)[:4]) or "nothing")
    return f"{folder} is not a megaslm checkpoint ({MANIFEST} is missing): {looks}"


class Checkpoint:
    """An opened checkpoint: its manifest, and its tensors by name, read when asked for.

    Attributes:
        path: the folder.
        manifest: see the module.
        step: optimizer steps made.
        run_config, global_state: as they were given to the save.
        optimizer: kind, step counts, weight decay and loss scaler; None in a checkpoint of weights alone.
        kinds: of tensors that it was opened for; None: all. The files of others may be missing.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], kinds: Sequence[str] | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.kinds = kinds
        self.step: int = manifest["step"]
        self.run_config: dict[str, Any] = manifest["run_config"]
        self.global_state: dict[str, Any] = manifest["global_state"]
        self.optimizer: dict[str, Any] | None = manifest["optimizer"]
        self._files: dict[str, SafetensorsFile] = {}
        self._stored: dict[tuple[str, str], list[tuple[Part, str, str]]] = {}
        self._held_texts: dict[str, str] | None = None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every parameter."""
        return {name: tuple(entry["shape"]) for name, entry in self.manifest["tensors"][WEIGHTS].items()}

    @cached_property
    def model_config(self) -> ModelConfig:
        """Of the network whose weights these are; what came into the config since then has its default.

        Raises:
            UserError: the run config describes no model, or one that only a newer megaslm knows.
        """
        if "model" not in self.run_config:
            raise UserError(f"the run config in checkpoint {self.path} says nothing of the model")
        try:
            return ModelConfig.model_validate(self.run_config["model"])
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"this megaslm does not understand the model of checkpoint {self.path}: "
                f"model.{'.'.join(map(str, first['loc']))}: {first['msg']}; use the megaslm that wrote it "
                f"({self.manifest['code']['megaslm']})"
            ) from error

    @cached_property
    def fingerprint(self) -> Fingerprint | None:
        """What the model computed when it was saved; None in older checkpoints.

        None too, with a warning in the log, where a newer megaslm wrote it in another layout.
        """
        found = self.manifest.get("fingerprint")
        try:
            return None if found is None else Fingerprint.from_json(found)
        except ValueError as error:
            if host.rank() == 0:
                logger.warning("checkpoint %s has %s: it is not compared", self.path, error)
            return None

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that lies in the checkpoint; None where it has none, as in older ones.

        Raises:
            DamagedCheckpoint: a file of it can't be read.
            UserError: it is of a newer version, or no tokenizer that megaslm can use.
        """
        files = self._held_texts if self._held_texts is not None else self._read_texts()
        return Tokenizer(files, str(self.path / TOKENIZER)) if files else None

    def _read_texts(self) -> dict[str, str]:
        """The tokenizer's files by name."""
        names = [name for name in self.manifest["files"] if name.startswith(f"{TOKENIZER}/")]
        try:
            return {Path(name).name: (self.path / name).read_bytes().decode() for name in names}
        except (OSError, UnicodeDecodeError) as error:
            refuse_too_many_files(error)
            raise self._damaged(f"its tokenizer can't be read ({error})") from error

    def read(self, name: str, kind: str = WEIGHTS) -> Tensor:
        """One whole tensor, fp32 in host memory, in its global shape.

        There is no second copy of it at any moment, and none is left when it is let go. Most tensors are mapped: see
        `SafetensorsFile.map` for what a file that is cut short does then.

        Args:
            kind: "weights", or a moment such as "exp_avg".

        Raises:
            KeyError: no such tensor.
            DamagedCheckpoint: its file can't be read.
        """
        shape = tuple(self.manifest["tensors"][kind][name]["shape"])
        return self.read_part(kind, name, Part.whole(shape)).view(shape)

    def read_part(self, kind: str, name: str, part: Part) -> Tensor:
        """Some elements of a tensor, (part.numel,), fp32, whatever the parts in which it was saved.

        Reads no others, but where rows are cut through: then it may read whole rows, a few at a time. Where one piece
        has all of them in a row, they are mapped.

        Raises as `read`.
        """
        pieces = self._pieces(kind, name)
        found = [(file, key, *both) for held, file, key in pieces for both in overlaps(held, part)]
        assert sum(source.numel for *_, source, _ in found) == part.numel, f"pieces of {kind} of {name} are missing"
        mapped = len(found) == 1 and found[0][2].is_contiguous
        out = None if mapped else torch.empty(part.numel, dtype=torch.float32)
        for file_name, key, source, target in found:
            file = self._file(file_name)
            try:
                if out is None:
                    return file.map(key, source.start, source.stop, torch.float32)
                _copy(file, key, source, target.of(out[target.start : target.stop]))
            except (OSError, ValueError) as error:
                refuse_too_many_files(error)
                raise self._damaged(f"{file_name} can't be read ({error})") from error
        return out

    def _pieces(self, kind: str, name: str) -> list[tuple[Part, str, str]]:
        """Of a tensor: each piece's part, its file, and its name there."""
        if (kind, name) not in self._stored:
            self._stored[kind, name] = [
                (Part(block, piece["start"], piece["start"] + piece["numel"]), piece["file"], piece.get("tensor", name))
                for piece, block in _blocks(self.manifest["tensors"][kind][name])
            ]
        return self._stored[kind, name]

    def hold(self) -> None:
        """Keep what can be read, even if another process deletes the folder: open files, and the tokenizer's texts.

        On a local disk: a file system of the network may take away what another machine deletes.

        Raises:
            DamagedCheckpoint: a file can't be opened.
            UserError: there are more files than this process may have open.
        """
        names = [name for name in files_of(self.manifest, self.kinds) if name.endswith(".safetensors")]
        allow_open_files(len(names))
        for name in names:
            self._files[name] = self._open(name, hold=True)
        self._held_texts = self._read_texts()

    def close(self) -> None:
        """Let go of what is held, which else keeps its room on the disk when deleted; a later read opens it again."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._held_texts = None

    def _open(self, name: str, hold: bool = False) -> SafetensorsFile:
        try:
            return SafetensorsFile(self.path / name, hold)
        except (OSError, ValueError) as error:
            refuse_too_many_files(error)
            raise self._damaged(f"{name} can't be read ({error})") from error

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            self._files[name] = self._open(name)
        return self._files[name]

    def _damaged(self, what: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"checkpoint {self.path} is damaged: {what}")


def _copy(file: SafetensorsFile, key: str, source: Window, out: Tensor) -> None:
    """Fill `out`, of any strides, with a rectangle of a tensor in a file."""
    if source.is_contiguous and out.is_contiguous():
        file.read_into(out.view(-1), key, source.start)
        return
    rows = max(1, COPY_LIMIT // math.prod(source.shape[1:]))
    for first in range(0, len(out), rows):
        some = source.rows(first, min(first + rows, len(out)))
        out[first : first + rows] = some.of(file.map(key, some.start, some.stop, torch.float32))


def files_of(manifest: dict[str, Any], kinds: Sequence[str] | None = None) -> list[str]:
    """The files that hold tensors of these kinds (None: of all), and those that hold none, sorted."""
    holders = {
        kind: {piece["file"] for entry in entries.values() for piece in entry["pieces"]}
        for kind, entries in manifest["tensors"].items()
    }
    left_out = set().union(*(holders[kind] for kind in holders if kinds is not None and kind not in kinds))
    return sorted(set(manifest["files"]) - left_out)


def find_damage(folder: Path, name: str, expected: dict[str, Any], read: bool) -> str | None:
    """What is wrong with one file of a checkpoint, None if nothing is.

    Args:
        expected: its entry in the manifest, {"bytes", "sha256"}.
        read: compare the hash too; else the size alone.

    Raises:
        UserError: no more files can be opened.
    """
    try:
        size = (folder / name).stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
        if read:
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    return f"{name} is not what was written (hash differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        refuse_too_many_files(error)
        return f"{name} can't be read ({error.strerror})"
    return None


def find_damages(folder: Path, manifest: dict[str, Any], names: list[str], read: bool) -> dict[str, str]:
    """What is wrong with those of the named files that are at fault."""
    found: list[str | None] = []
    for start in range(0, len(names), FILES_AT_A_TIME):
        some = names[start : start + FILES_AT_A_TIME]
        found += side_by_side(lambda name: find_damage(folder, name, manifest["files"][name], read), some)
    return {name: damage for name, damage in zip(names, found, strict=True) if damage}


def follow_link(path: Path) -> Path:
    """The folder that a link such as lm_current means now, since the name may move on while we read; else `path`."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def open_checkpoint(path: str | Path, verify: bool = True, kinds: Sequence[str] | None = None) -> Checkpoint:
    """Open one checkpoint folder, after a look at its files.

    Collective with `verify` (the ranks share the reading), local without.

    Args:
        path: the folder, or a link such as lm_current: what it means now, even if the name moves on while we read.
        verify: compare the sha256 of every file; else sizes alone.
        kinds: of tensors that will be read, such as ("weights",); None: all. The files of the other kinds are not
            looked at, and may be missing.

    Raises:
        DamagedCheckpoint: names the files at fault.
        UserError: no checkpoint, a foreign one (says what it looks like), or one of a newer version.
    """
    # One rank's answer for all: the others may look a moment later.
    given = Path(path)
    path = host.on_first(lambda: follow_link(given)) if verify else follow_link(given)

    def inspect() -> dict[str, Any]:
        manifest = read_manifest(path)
        names = files_of(manifest, kinds)
        damage = find_damages(path, manifest, names[host.rank() :: host.world_size()] if verify else names, read=verify)
        if damage:
            raise DamagedCheckpoint(f"checkpoint {path} is damaged: {'; '.join(damage.values())}")
        return manifest

    if not verify:
        return Checkpoint(path, inspect(), kinds)
    manifest, failures = host.try_together(inspect)
    if failures:
        raise failures[0][1]
    if len(set(host.gather(manifest["sha256"]))) > 1:
        raise UserError(f"the ranks do not see the same checkpoint {path}: it was replaced meanwhile; start again")
    return Checkpoint(path, manifest, kinds)
