"""A model of ours as a folder that transformers opens.

    DIR/
        config.json, generation_config.json
        model.safetensors               or model-00001-of-00003.safetensors ... and model.safetensors.index.json
        tokenizer.json, ...             the tokenizer's files
        README.md                       the model card
        megaslm_export.json             where it comes from, size and hash of every file, what was checked

Tensor by tensor: one is in memory at a time. The folder is made under a hidden name beside DIR, and gets its own when
the checks are passed and its last byte is on the disk.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import megaslm
from megaslm.checkpoint.fingerprint import check_fingerprint
from megaslm.checkpoint.format import WEIGHTS, Checkpoint, DamagedCheckpoint, files_of, find_damages
from megaslm.checkpoint.huggingface.card import model_card
from megaslm.checkpoint.huggingface.configuration import configuration_faults
from megaslm.checkpoint.huggingface.families import family_of, generation_config, hf_config
from megaslm.checkpoint.huggingface.folder import CONFIG, GENERATION, INDEX, SINGLE
from megaslm.checkpoint.huggingface.mapping import Group, parameter_groups
from megaslm.checkpoint.huggingface.new_folder import new_folder, output_path
from megaslm.checkpoint.huggingface.parity import (
    ExportDiffers,
    LogitsCheck,
    compare_logits,
    empty_network,
    parameters_on_demand,
    rounded,
    tokens_to_compare,
)
from megaslm.checkpoint.huggingface.record import EXPORT_RECORD, RECORD_FORMAT, RECORD_VERSION
from megaslm.checkpoint.huggingface.tokenizer_files import save_tokenizer
from megaslm.checkpoint.safetensors_file import LazyTensor, write_safetensors
from megaslm.errors import UserError
from megaslm.files import flush_to_disk
from megaslm.model import DTYPES

if TYPE_CHECKING:
    from megaslm.checkpoint.opening import ModelSource

DEFAULT_DTYPE = "bf16"
MAX_SHARD_BYTES = 5_000_000_000
OTHER_FILES_ROOM = 64 * 2**20  # bytes set apart for the tokenizer and the small files


@dataclass(frozen=True)
class ExportResult:
    """An export that is there.

    Attributes:
        path: the folder.
        family: the architecture of transformers.
        dtype: of the weights.
        parameters: numbers in them, vocabulary padding and tied copies not counted.
        bytes: of all files.
        logits_check: how the proof came out; None where it was left out.
    """

    path: Path
    family: str
    dtype: str
    parameters: int
    bytes: int
    logits_check: LogitsCheck | None


def export_checkpoint(
    source: "ModelSource",
    output: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    text: str | None = None,
    without_tokenizer: bool = False,
    overwrite: bool = False,
    name: str | None = None,
    check: bool = True,
    report: Callable[[str], None] = print,
) -> ExportResult:
    """Write a model as a Hugging Face folder, and prove it equal.

    Args:
        source: may be opened without comparing hashes: that is done here, beside the conversion.
        output: a folder that is not there, or empty.
        dtype: "bf16", "fp16" or "fp32". None: the type it came in, if it was imported; else bf16.
        max_shard_bytes: the most bytes of tensors in a file that has more than one.
        text: to compare logits on, see `compare_logits`.
        without_tokenizer: export none, whether `source` has one or not.
        overwrite: replace `output` if it is an export of ours and nothing else.
        name: what users of the export open, for its card, such as that of a repository; None: the folder's name.
        check: False leaves the proof out, which only a measurement of the conversion alone has use for.
        report: gets a line for each part that is done.

    Raises:
        ExportDiffers: transformers does not compute the same; nothing is left.
        DamagedCheckpoint: a file is not what was saved; nothing is left.
        UserError: a model that no class of transformers holds, no tokenizer, an output that is not ours to replace, a
            full disk, a weight out of fp16's range; nothing is left.
    """
    output = output_path(output)
    dtype = dtype or source_dtype(source)
    family = family_of(source.config, source.origin.get("family"))
    if without_tokenizer:
        source = replace(source, tokenizer=None)
    elif source.tokenizer is None:
        raise UserError(
            f"there is no tokenizer with {source.path}: name the one it was trained with (--tokenizer FOLDER), or "
            "export the model without one (--without_tokenizer)"
        )
    if check:
        tokens_to_compare(source, text)  # a text that does not do is told before the work
    tensors = _lazy_tensors(source, parameter_groups(source.config, family), dtype)
    shards = plan_shards({name: tensor.nbytes for name, tensor in tensors.items()}, max_shard_bytes)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    needed = sum(tensor.nbytes for tensor in tensors.values()) + OTHER_FILES_ROOM
    with new_folder(output, overwrite, needed) as folder:
        verification = _Verification(source)
        files = _write_shards(folder, shards, tensors)
        verification.finish()
        report(f"wrote {parameters:,} parameters as {family} in {dtype}: {_plural(len(shards), 'file')}")
        _write_json(folder / CONFIG, hf_config(source.config, dtype, source.tokenizer, source.origin))
        _write_json(folder / GENERATION, generation_config(source.tokenizer, source.origin))
        if source.tokenizer is not None:
            save_tokenizer(source.tokenizer, folder)
        fingerprint = logits = None
        if check:
            fingerprint = _check_fingerprint(source, report)
            logits = compare_logits(folder, source, text)
            _judge(logits, report)
            if faults := configuration_faults(folder, source, dtype):
                raise ExportDiffers(f"the files of the export do not say what the model is: {'; '.join(faults[:3])}")
        record = {
            "format": RECORD_FORMAT,
            "version": RECORD_VERSION,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "megaslm": megaslm.__version__,
            "checkpoint": describe_source(source),
            "family": family,
            "dtype": dtype,
            "parameters": parameters,
            "logits_check": logits and logits.to_json(),
            "fingerprint_check": fingerprint,
        }
        (folder / "README.md").write_text(model_card(source, name or output.name, record), encoding="utf-8")
        for path in sorted(folder.iterdir()):
            if path.name not in files:
                files[path.name] = _finish_file(path)
        _write_json(folder / EXPORT_RECORD, {**record, "files": files})
    total = sum(entry["bytes"] for entry in files.values())
    return ExportResult(output, family, dtype, parameters, total, logits)


def source_dtype(source: "ModelSource") -> str:
    """The type that a model came in from transformers; bf16 for what was trained here."""
    return source.origin.get("dtype", DEFAULT_DTYPE)


def describe_source(source: "ModelSource") -> dict[str, Any]:
    """What the record of an export says of the model it was made from: no path, which would mean nothing elsewhere."""
    if isinstance(source.weights, Checkpoint):
        checkpoint = source.weights
        name = checkpoint.run_config.get("name")
        return {"run": name, "step": checkpoint.step, "manifest_sha256": checkpoint.manifest["sha256"]}
    return {"huggingface": source.path.name}


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """The tensors of each file, in order: as many as fit, and at least one.

    Args:
        sizes: bytes by name.
    """
    parts: list[list[str]] = [[]]
    size = 0
    for name, length in sizes.items():
        if parts[-1] and size + length > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += length
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _lazy_tensors(source: "ModelSource", groups: list[Group], dtype: str) -> dict[str, LazyTensor]:
    """Every tensor of the export, in the order of the network."""
    reader = _GroupReader(source, dtype)
    tensors = {}
    for group in groups:
        for i, (name, shape) in enumerate(zip(group.theirs, group.shapes, strict=True)):
            tensors[name] = LazyTensor(DTYPES[dtype], shape, lambda group=group, i=i: reader.read(group, i))
    return tensors


class _GroupReader:
    """Reads each tensor of ours once for all of theirs that it is split into, which are written one after the other."""

    def __init__(self, source: "ModelSource", dtype: str) -> None:
        self._source, self._dtype = source, dtype
        self._group: Group | None = None
        self._parts: tuple[Tensor, ...] = ()

    def read(self, group: Group, i: int) -> Tensor:
        if group is not self._group:
            self._parts = ()  # before the next is read
            self._parts = self._read(group)
            self._group = group
        part = self._parts[i]
        if i == len(self._parts) - 1:
            self._parts, self._group = (), None
        return part

    def _read(self, group: Group) -> tuple[Tensor, ...]:
        if group.ours is None:
            return tuple(torch.zeros(shape) for shape in group.shapes)
        tensor = self._source.weights.read(group.ours)
        largest = torch.finfo(DTYPES[self._dtype]).max
        if self._dtype == "fp16" and not (-largest <= tensor.min() and tensor.max() <= largest):
            raise UserError(
                f"{group.ours} has values that fp16 cannot hold (beyond +-{largest:,.0f}): take --dtype bf16 or fp32"
            )
        return group.split(tensor)


def _write_shards(folder: Path, shards: dict[str, list[str]], tensors: dict[str, LazyTensor]) -> dict[str, Any]:
    """Write the tensors, and their index where there are several files. Returns {file: {bytes, sha256}}."""
    files = {
        file: write_safetensors(folder / file, {name: tensors[name] for name in names})
        for file, names in shards.items()
    }
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return files


class _Verification:
    """Compares the hashes of a checkpoint's files while they are converted: the disk gives each byte once."""

    def __init__(self, source: "ModelSource") -> None:
        self._path, self._damages, self._failure = source.path, {}, None
        checkpoint = source.weights
        if not isinstance(checkpoint, Checkpoint):
            self._thread = None
            return
        names = files_of(checkpoint.manifest, (WEIGHTS,))

        def verify() -> None:
            try:
                self._damages = find_damages(checkpoint.path, checkpoint.manifest, names, read=True)
            except BaseException as error:
                self._failure = error

        self._thread = threading.Thread(target=verify, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        if self._thread is None:
            return
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        if self._damages:
            raise DamagedCheckpoint(f"checkpoint {self._path} is damaged: {'; '.join(self._damages.values())}")


def _check_fingerprint(source: "ModelSource", report: Callable[[str], None]) -> str | None:
    """Our network, of the weights as they are stored, against the numbers that the run stored with them."""
    stored = getattr(source.weights, "fingerprint", None)
    if stored is None:
        return None
    network = empty_network(source)
    dtype = DTYPES.get(stored.precision, torch.float32)
    # Rounded in place: the largest tensor has no second copy.
    with parameters_on_demand(network, lambda name: rounded(source.weights.read(name), dtype)):
        check = check_fingerprint(network, stored, "cpu", is_rounded=True)
    if check.equal is False:
        raise ExportDiffers(
            f"the network does not compute what it computed when {source.path} was saved: {check.text}. Its files are "
            "what was written; run the tests of this installation, or use the megaslm that wrote it"
        )
    report(f"fingerprint: {check.text}" if check.equal else f"warning: the fingerprint was not compared: {check.text}")
    return "equal" if check.equal else "not compared"


def _judge(check: LogitsCheck, report: Callable[[str], None]) -> None:
    if check.tokenizer_equal is False:
        raise ExportDiffers(
            "AutoTokenizer gives other ids or another text than the tokenizer of the model; nothing was exported. Give "
            "a tokenizer that it opens as it is (--tokenizer), or export without one (--without_tokenizer)"
        )
    if not check.logits_equal:
        raise ExportDiffers(
            f"transformers does not compute the same: {check}. Nothing was exported; try another version of "
            "transformers, and report this together with the run's config"
        )
    report(str(check))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        flush_to_disk(file)


def _finish_file(path: Path) -> dict[str, Any]:
    """Wait until a small file is on the disk. Returns {bytes, sha256}."""
    with open(path, "rb+") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        flush_to_disk(file)
    return {"bytes": path.stat().st_size, "sha256": digest}


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")
