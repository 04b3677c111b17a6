"""What a checkpoint holds beside a run's tensors, parts of it that are enough for some, and others than a run's."""

import itertools
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch

from megaslm.checkpoint import (
    DamagedCheckpoint,
    Fingerprint,
    LazyTensor,
    Piece,
    SaveFailed,
    inspect_path,
    latest_sound,
    open_checkpoint,
    write_checkpoint,
)
from megaslm.checkpoint import folder as folder_module
from megaslm.checkpoint.format import Checkpoint, read_manifest, write_manifest
from megaslm.checkpoint.safetensors_file import write_safetensors
from megaslm.config import ModelConfig
from megaslm.data import character_tokenizer
from megaslm.errors import UserError

KINDS = ("weights", "exp_avg", "exp_avg_sq")
FINGERPRINT = Fingerprint([1, 2, 3], "bf16", 2.5, [0.25, -1.0])
MODEL = {"context_length": 8, "num_layers": 1, "hidden_size": 8, "num_heads": 2, "ffn_hidden_size": 8, "vocab_size": 9}


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(["abc é"])


def write(directory: Path, step: int = 1, pieces=None, **options) -> Path:
    pieces = pieces or {kind: {"w": Piece.whole(torch.arange(6.0).view(2, 3))} for kind in KINDS}
    arguments = {"run_config": {"model": MODEL}, "global_state": {}, "optimizer": None} | options
    return write_checkpoint(directory, pieces, step=step, **arguments)


def test_tokenizer_and_fingerprint_come_back(tmp_path, tokenizer):
    path = write(tmp_path, tokenizer_files=tokenizer.files, fingerprint=FINGERPRINT)
    checkpoint = open_checkpoint(path)
    assert checkpoint.fingerprint == FINGERPRINT
    assert checkpoint.tokenizer().same_files(tokenizer)
    assert checkpoint.tokenizer().decode(checkpoint.tokenizer().encode("cab é")) == "cab é"
    assert {f"tokenizer/{name}" for name in tokenizer.files} < set(checkpoint.manifest["files"])
    assert inspect_path(path).other_files == []


def test_a_checkpoint_from_before_has_neither(tmp_path):
    path = write(tmp_path)
    manifest = {key: value for key, value in read_manifest(path).items() if key not in ("sha256", "fingerprint")}
    write_manifest(path, manifest)
    checkpoint = open_checkpoint(path)
    assert checkpoint.fingerprint is None and checkpoint.tokenizer() is None


@pytest.mark.parametrize("name", ["tokenizer.json", "megaslm_tokenizer.json"])
def test_a_damaged_tokenizer_is_named(tmp_path, tokenizer, name):
    path = write(tmp_path, tokenizer_files=tokenizer.files)
    file = path / "tokenizer" / name
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + b"?")
    with pytest.raises(DamagedCheckpoint, match=f"tokenizer/{name} is not what was written"):
        open_checkpoint(path)
    assert f"tokenizer/{name} is not what was written (hash differs)" in inspect_path(path).damage
    shutil.rmtree(file.parent)
    for kinds in (None, ("weights",)):
        with pytest.raises(DamagedCheckpoint, match=f"tokenizer/{name} is missing"):
            open_checkpoint(path, kinds=kinds)


def test_a_folder_without_its_manifest_is_still_known_as_ours(tmp_path, tokenizer):
    path = write(tmp_path, tokenizer_files=tokenizer.files)
    (path / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="manifest.json is missing"):
        open_checkpoint(path)


def test_weights_and_tokenizer_are_enough_for_who_wants_no_more(tmp_path, tokenizer):
    path = write(tmp_path, tokenizer_files=tokenizer.files)
    for file in path.glob("exp_avg_*"):
        file.unlink()
    with pytest.raises(DamagedCheckpoint, match="exp_avg_00000.safetensors is missing; exp_avg_sq_00000"):
        open_checkpoint(path)
    for verify in (True, False):
        checkpoint = open_checkpoint(path, verify, kinds=("weights",))
        checkpoint.hold()
        assert checkpoint.read("w").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert checkpoint.tokenizer().same_files(tokenizer)
        with pytest.raises(DamagedCheckpoint, match="exp_avg_00000.safetensors can't be read"):
            checkpoint.read("w", "exp_avg")
    assert latest_sound(tmp_path, print, kinds=("weights",)).path == path
    weights = path / "weights_00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="none of the 1 checkpoints.*weights_00000.safetensors is not what"):
        latest_sound(tmp_path, print, kinds=("weights",))


def test_what_is_held_can_be_read_after_the_folder_is_gone(tmp_path, tokenizer):
    checkpoint = open_checkpoint(write(tmp_path, tokenizer_files=tokenizer.files))
    checkpoint.hold()
    shutil.rmtree(checkpoint.path)
    assert checkpoint.read("w", "exp_avg_sq").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert checkpoint.read_flat("weights", "w", 2, 4).tolist() == [2, 3]
    checkpoint.close()
    with pytest.raises(DamagedCheckpoint, match="weights_00000.safetensors can't be read"):
        checkpoint.read("w")


def test_what_is_done_to_a_tensor_does_not_reach_the_file(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path))
    tensor = checkpoint.read("w")
    checkpoint.close()
    tensor.zero_()
    assert checkpoint.read("w").sum() == 15


def test_the_tokenizer_counts_among_the_bytes_that_a_save_needs(tmp_path, tokenizer, monkeypatch):
    size = sum(len(text.encode()) for text in tokenizer.files.values())
    usage, room = shutil.disk_usage(tmp_path), folder_module.MANIFEST_ROOM + 3 * 24
    for missing in (0, 1):
        free = room + size - missing
        monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if missing:
            with pytest.raises(SaveFailed, match="No space left on device"):
                write(tmp_path / "b", tokenizer_files=tokenizer.files)
        else:
            write(tmp_path / "a", tokenizer_files=tokenizer.files)


def test_the_model_is_described_with_defaults_for_what_is_new(tmp_path):
    assert open_checkpoint(write(tmp_path)).model_config == ModelConfig(**MODEL)
    for step, config, message in (
        (2, {}, "says nothing of the model"),
        (3, {"model": MODEL | {"of_the_future": 1}}, r"model.of_the_future: .*; use the megaslm that wrote it"),
    ):
        checkpoint = open_checkpoint(write(tmp_path, step, run_config=config))
        with pytest.raises(UserError, match=message):
            checkpoint.model_config  # noqa: B018


def test_a_checkpoint_by_another_name(tmp_path):
    """Beside the files of others, a run's among them, which may be saving."""
    write(tmp_path, step=7)
    others = [tmp_path / name for name in (".step_00000008.0.tmp", ".other.0.tmp")]
    stale = tmp_path / ".import.0.tmp"
    for folder in (*others, stale, tmp_path / "import"):
        folder.mkdir()
    path = write(tmp_path, step=0, name="import")
    assert path == tmp_path / "import" and open_checkpoint(path).step == 0
    assert all(folder.exists() for folder in others) and not stale.exists()
    assert latest_sound(tmp_path, print).step == 7
    before = sorted(os.listdir(path))
    with pytest.raises(UserError, match="import exists and is not an empty folder"):
        write(tmp_path, step=0, name="import")
    assert sorted(os.listdir(path)) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file exists and is not an empty folder"):
        write(tmp_path, step=0, name="file")
    assert (tmp_path / "file").read_text() == "mine" and not list(tmp_path.glob(".import*"))


def test_a_named_checkpoint_that_fails_says_so_by_its_name(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: usage._replace(free=0))
    with pytest.raises(SaveFailed, match="could not write the checkpoint .*/import: No space left.*; free 17 MB$"):
        write(tmp_path, step=0, name="import")
    assert os.listdir(tmp_path) == []


def test_lazy_pieces_are_made_one_at_a_time(tmp_path):
    tensors = {f"w{i}": torch.full((3, 2), float(i)) for i in range(4)}
    made = []

    def lazy(name: str) -> LazyTensor:
        return LazyTensor(torch.float32, (3, 2), lambda: made.append(name) or tensors[name].to(torch.bfloat16))

    pieces = {"weights": {name: Piece.whole(lazy(name)) for name in tensors}}
    checkpoint = open_checkpoint(write(tmp_path, pieces=pieces))
    assert made == list(tensors)
    assert checkpoint.shapes == dict.fromkeys(tensors, (3, 2))
    assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in tensors)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the system tells no peak of the memory")
@pytest.mark.parametrize("count", [1, 3])
def test_reading_takes_the_memory_of_one_copy(tmp_path, count):
    """Mapped pages count, and those of the tensors that were read before must be gone."""
    numel = 2**23  # 32 MiB
    cuts = [numel * i // count + i % 2 for i in range(count)] + [numel]
    tensors = {name: {"shape": [2, numel // 2], "pieces": []} for name in ("a", "b", "c")}
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        write_safetensors(tmp_path / str(i), {name: torch.arange(start, stop).float() for name in tensors})
        for entry in tensors.values():
            entry["pieces"].append({"file": str(i), "start": start, "numel": stop - start})
    nothing = {"step": 1, "run_config": {}, "global_state": {}, "optimizer": None}
    checkpoint = Checkpoint(tmp_path, nothing | {"tensors": {"weights": tensors}})

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split(f"{field}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    for name in tensors:
        assert checkpoint.read(name)[1, -1] == numel - 1
        checkpoint.read(name).sum()
    assert resident("VmHWM") - before < 1.25 * 4 * numel


W = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "header",
    [[], {"w": 3}, {"w": {}}, {"v": W}]
    + [{"w": W | {"data_offsets": place}} for place in ([4, 28], [-4, 20], [2**70, 2**71], ["0"], None)]
    + [{"w": W | change} for change in ({"dtype": "F16"}, {"dtype": "I64"}, {"shape": [5]}, {"shape": ["6"]})],
    ids=repr,
)
@pytest.mark.parametrize("in_part", [False, True])
def test_a_file_that_lies_about_its_tensors_is_damaged(tmp_path, header, in_part):
    checkpoint = open_checkpoint(write(tmp_path))
    text = json.dumps(header).encode()
    for part in (text, text[:-1]):
        file = struct.pack("<Q", len(part)) + part + bytes(24)
        (checkpoint.path / "weights_00000.safetensors").write_bytes(file)
        with pytest.raises(DamagedCheckpoint, match="weights_00000.safetensors can't be read"):
            checkpoint.read_flat("weights", "w", 5, 6) if in_part else checkpoint.read("w")
        checkpoint.close()


def test_the_manifest_stays_strict_json(tmp_path):
    nowhere = Fingerprint([1, 2], "fp32", float("nan"), [float("inf")])
    path = write(tmp_path, fingerprint=nowhere)
    text = (path / "manifest.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["fingerprint"] == {"tokens": [1, 2], "precision": "fp32", "loss": None, "logits": [None]}
