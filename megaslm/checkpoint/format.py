"""The checkpoint format: a folder of safetensors files and a manifest, which knows nothing of ranks or ZeRO stages.

    step_00001000/
        manifest.json                   everything but the tensors; written last
        weights_00000.safetensors ...   fp32 master weights, the part that rank 0 wrote
        exp_avg_00000.safetensors ...   Adam's first moments; none in a checkpoint of weights alone
        exp_avg_sq_00000.safetensors ...

manifest.json:

    format, version         "megaslm-checkpoint", 1
    sha256                  of the manifest itself, with zeros in this place
    step                    optimizer steps made
    code                    versions that wrote it
    run_config              the resolved run config
    global_state            of the training loop: samples consumed, schedule, skipped steps, ...
    optimizer               null, or {type: "adam", moments, steps: {parameter: count}, loss_scaler: null or {...}}
    files                   {name: {bytes, sha256}}
    tensors                 {kind: {parameter: {shape, dtype, slices: [{file, key, offset}]}}}

`kind` is "weights" or a moment. A tensor is whole in one slice of offset zero, or cut along any dimensions into slices
that tile its global `shape`. Nothing is pickled: reading executes nothing.
"""

import contextlib
import hashlib
import json
import os
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from megaslm.errors import UserError
from megaslm.parallel import host

FORMAT = "megaslm-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights"
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
HASH_PLACE = "0" * 64


class DamagedCheckpoint(UserError):
    """A checkpoint of ours with a file that is missing, cut short or changed: another one may be sound."""


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write fp32 host tensors as a safetensors file, hashed on the way and fsynced.

    Ours instead of safetensors' own since that copies every tensor to bytes, and hides the errno of a full disk.

    Returns:
        {"bytes": size of the file, "sha256": hex digest}.

    Raises:
        OSError: the disk is full, the file too large, ...
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and tensor.is_cpu, "checkpoints hold fp32"
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for piece in (struct.pack("<Q", len(text)), text, *(tensor.contiguous() for tensor in tensors.values())):
            data = piece.view(-1).view(torch.uint8).numpy() if isinstance(piece, Tensor) else piece
            file.write(data)
            digest.update(data)
            size += len(data)
        flush_to_disk(file)
    return {"bytes": size, "sha256": digest.hexdigest()}


def flush_to_disk(file) -> None:
    """Wait until the device holds what was written."""
    file.flush()
    os.fsync(file.fileno())


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json with its own hash in it, and fsync it."""
    text = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, "sha256": HASH_PLACE, **manifest}, indent=1)
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
        if folder.is_dir() and all(file.suffix == ".safetensors" for file in folder.iterdir()):
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {MANIFEST} is missing")
        raise UserError(_describe_foreign(folder))
    try:
        text = path.read_bytes().decode()
        manifest = json.loads(text)
        known = manifest.get("format") == FORMAT
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {MANIFEST} can't be read ({error})") from error
    if not known and "sha256" not in manifest:
        raise UserError(f"{path} is not the manifest of a megaslm checkpoint; point to a folder step_... of a run")
    digest = str(manifest.get("sha256"))
    if hashlib.sha256(text.replace(digest, HASH_PLACE, 1).encode()).hexdigest() != digest:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {MANIFEST} is not what was written (hash differs)")
    if manifest["version"] > FORMAT_VERSION:
        raise UserError(
            f"checkpoint {folder} has format version {manifest['version']}, this megaslm reads up to {FORMAT_VERSION}: "
            f"use the megaslm that wrote it ({manifest.get('code')}) or a newer one"
        )
    return manifest


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
        optimizer: kind, step counts and loss scaler; None in a checkpoint of weights alone.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.step: int = manifest["step"]
        self.run_config: dict[str, Any] = manifest["run_config"]
        self.global_state: dict[str, Any] = manifest["global_state"]
        self.optimizer: dict[str, Any] | None = manifest["optimizer"]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every parameter."""
        return {name: tuple(entry["shape"]) for name, entry in self.manifest["tensors"][WEIGHTS].items()}

    def read(self, name: str, kind: str = WEIGHTS) -> Tensor:
        """One whole tensor, in host memory, in its global shape.

        Args:
            kind: "weights", or a moment such as "exp_avg".

        Raises:
            KeyError: no such tensor.
            DamagedCheckpoint: its file can't be read.
        """
        shape = self.manifest["tensors"][kind][name]["shape"]
        return self._read_rows(kind, name, 0, shape[0] if shape else 1).view(shape)

    def read_flat(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, (stop - start,); reads the rows they lie in and no others."""
        shape = self.manifest["tensors"][kind][name]["shape"]
        width = torch.Size(shape[1:]).numel()
        first, last = start // width, -(-stop // width)
        rows = self._read_rows(kind, name, first, last)
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def close(self) -> None:
        """Let go of the files, which else keep their room on the disk when deleted; a later read opens them again."""
        self.__dict__.pop("_files", None)

    @cached_property
    def _files(self) -> dict[str, Any]:
        return {}

    def _read_rows(self, kind: str, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of a tensor, put together from its slices; a scalar counts as one row."""
        entry = self.manifest["tensors"][kind][name]
        shape, slices = entry["shape"], entry["slices"]
        if len(slices) == 1:
            return self._slice_rows(slices[0], bool(shape), first, last)
        rows = torch.empty([last - first, *shape[1:]], dtype=getattr(torch, entry["dtype"]))
        for part in slices:
            top = part["offset"][0]
            data = self._slice_rows(part, True, max(first - top, 0), max(last - top, 0))
            top = max(top - first, 0)
            place = [slice(top, top + data.shape[0])]
            place += [slice(o, o + n) for o, n in zip(part["offset"][1:], data.shape[1:], strict=True)]
            rows[tuple(place)] = data
        return rows

    def _slice_rows(self, part: dict[str, Any], has_rows: bool, first: int, last: int) -> Tensor:
        """Rows [first, last) of one stored slice, as far as it has them."""
        file = part["file"]
        try:
            if file not in self._files:
                self._files[file] = safetensors.safe_open(self.path / file, framework="pt")
            if not has_rows:
                return self._files[file].get_tensor(part["key"])
            stored = self._files[file].get_slice(part["key"])
            height = stored.get_shape()[0]
            return stored[min(first, height) : min(last, height)]
        except (OSError, safetensors.SafetensorError) as error:
            raise DamagedCheckpoint(f"checkpoint {self.path} is damaged: {file} can't be read ({error})") from error


def find_damage(folder: Path, name: str, expected: dict[str, Any], read: bool) -> str | None:
    """What is wrong with one file of a checkpoint, None if nothing is.

    Args:
        expected: its entry in the manifest, {"bytes", "sha256"}.
        read: compare the hash too; else the size alone.
    """
    path = folder / name
    with contextlib.suppress(FileNotFoundError):
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
        if not read:
            return None
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
        return None if digest == expected["sha256"] else f"{name} is not what was written (hash differs)"
    return f"{name} is missing"


def open_checkpoint(path: str | Path, verify: bool = True) -> Checkpoint:
    """Open one checkpoint folder, after a look at every file.

    Collective with `verify` (the ranks share the reading), local without.

    Args:
        verify: compare the sha256 of every file; else sizes alone.

    Raises:
        DamagedCheckpoint: names the file at fault.
        UserError: no checkpoint, a foreign one (says what it looks like), or one of a newer version.
    """
    path = Path(path)

    def inspect() -> dict[str, Any]:
        manifest = read_manifest(path)
        files = sorted(manifest["files"].items())
        for name, expected in files[host.rank() :: host.world_size()] if verify else files:
            damage = find_damage(path, name, expected, read=verify)
            if damage:
                raise DamagedCheckpoint(f"checkpoint {path} is damaged: {damage}")
        return manifest

    if not verify:
        return Checkpoint(path, inspect())
    manifest, failures = host.try_together(inspect)
    if failures:
        raise failures[0][1]
    return Checkpoint(path, manifest)
