"""What a checkpoint holds beside a run's tensors, parts of it that are enough for some, and others than a run's."""

import hashlib
import itertools
import json
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch

from megaslm.checkpoint import (
    DamagedCheckpoint,
    Fingerprint,
    LazyTensor,
    Part,
    Piece,
    SaveFailed,
    inspect_path,
    latest_sound,
    open_checkpoint,
    write_checkpoint,
)
from megaslm.checkpoint import folder as folder_module
from megaslm.checkpoint import format as format_module
from megaslm.checkpoint.fingerprint import Figures
from megaslm.checkpoint.format import Checkpoint, find_damage, read_manifest, write_manifest
from megaslm.checkpoint.safetensors_file import write_safetensors
from megaslm.config import ModelConfig
from megaslm.data import character_tokenizer
from megaslm.errors import UserError
from megaslm.parallel import Block

KINDS = ("weights", "exp_avg", "exp_avg_sq")
FINGERPRINT = Fingerprint([1, 2, 3], "fp32", 2.5, [0.25, -1.0], {"bf16": Figures(2.6, [0.5, -1.5])})
MODEL = {"context_length": 8, "num_layers": 1, "hidden_size": 8, "num_heads": 2, "ffn_hidden_size": 8, "vocab_size": 9}


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(["abc é"])


def write(directory: Path, step: int = 1, pieces=None, **options) -> Path:
    pieces = pieces or {kind: [Piece.whole("w", torch.arange(6.0).view(2, 3))] for kind in KINDS}
    arguments = {"run_config": {"model": MODEL}, "global_state": {}, "optimizer": None} | options
    return write_checkpoint(directory, pieces, step=step, **arguments)


def rewrite(path: Path, **changes) -> None:
    write_manifest(path, {key: value for key, value in read_manifest(path).items() if key != "sha256"} | changes)


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


def test_a_fingerprint_of_another_layout_is_left_aside(tmp_path, caplog):
    path = write(tmp_path, fingerprint=FINGERPRINT)
    rewrite(path, fingerprint={"version": 7})
    assert open_checkpoint(path).fingerprint is None
    assert "a fingerprint that this megaslm does not understand (KeyError('logits'))" in caplog.text
    report = inspect_path(path)
    assert report.passed and "does not understand" in report.contents.fingerprint["fault"]


def test_a_tokenizer_of_a_newer_version_is_no_damage(tmp_path, tokenizer):
    """The files are what was written: another checkpoint would be no better."""
    newer = {name: text.replace('"version": 1', '"version": 99') for name, text in tokenizer.files.items()}
    assert newer != tokenizer.files
    checkpoint = open_checkpoint(write(tmp_path, tokenizer_files=newer))
    with pytest.raises(UserError) as refusal:
        checkpoint.tokenizer()
    assert not isinstance(refusal.value, DamagedCheckpoint) and "version" in str(refusal.value)
    report = inspect_path(checkpoint.path)
    assert report.passed and report.contents.tokenizer == {"fault": str(refusal.value)}


@pytest.mark.parametrize("name", ["tokenizer/../../secret", "../secret", "/etc/passwd", "a/b", "tokenizer/..", ""])
def test_a_manifest_names_no_file_outside_of_its_folder(tmp_path, name):
    (tmp_path / "secret").write_text("hush")
    path = write(tmp_path)
    manifest = read_manifest(path)
    del manifest["sha256"]
    hush = {"bytes": 4, "sha256": hashlib.sha256(b"hush").hexdigest()}
    write_manifest(path, manifest | {"files": manifest["files"] | {name: hush}})
    with pytest.raises(UserError, match="was not written by megaslm.* is no file of a checkpoint") as refusal:
        open_checkpoint(path)
    assert not isinstance(refusal.value, DamagedCheckpoint)
    manifest["tensors"]["weights"]["w"]["pieces"][0]["file"] = name
    write_manifest(path, manifest)
    with pytest.raises(UserError, match="was not written by megaslm"):
        open_checkpoint(path)
    with pytest.raises(AssertionError, match="is no name"):
        write(tmp_path / "b", tokenizer_files={name: "{}"})
    if name:
        with pytest.raises(AssertionError, match="is no name"):
            write(tmp_path / "b", name=name)
    assert not (tmp_path / "b").exists()


LEFT, RIGHT = ({"offset": [0, at], "shape": [2, n]} for at, n in ((0, 1), (1, 2)))
SLICES = [{"start": 0, "numel": 2, "block": LEFT}, {"start": 0, "numel": 4, "block": RIGHT}]


@pytest.mark.parametrize(
    ("pieces", "fault"),
    [
        (SLICES[:1], "2 of 6 elements"),
        ([SLICES[0], SLICES[0], SLICES[1]], "gaps or overlaps"),
        ([SLICES[0], SLICES[0]], "gaps or overlaps"),
        ([SLICES[0] | {"numel": 6}], "gaps or overlaps"),
        ([{"start": -1, "numel": 7}], "gaps or overlaps"),
        ([SLICES[0], SLICES[1] | {"block": RIGHT | {"offset": [1, 1]}}], "reaches out"),
        ([SLICES[0], SLICES[1] | {"block": RIGHT | {"offset": [0, 0]}}], "overlap"),
        ([SLICES[0] | {"numel": 3}, SLICES[1] | {"block": RIGHT | {"shape": [2, 0]}}], "gaps or overlaps"),
        ([{"start": 0, "numel": 2, "block": {"offset": [0], "shape": [2]}}], "is not one of ours"),
        ([SLICES[0], SLICES[1] | {"block": {"offset": [0, 1]}}], "is not one of ours .*'shape'"),
        ([{"start": 0}], "is not one of ours .*'numel'"),
        ([{"start": "0", "numel": 6}], "is not one of ours"),
        ([], "0 of 6 elements"),
    ],
)
def test_a_manifest_whose_pieces_are_not_the_tensor_is_refused(tmp_path, pieces, fault):
    """What a read would not fill is whatever the memory held."""
    path = write(tmp_path)
    file = {"file": "weights_00000.safetensors"}
    manifest = read_manifest(path)
    manifest["tensors"]["weights"]["w"]["pieces"] = [file | piece for piece in pieces]
    rewrite(path, tensors=manifest["tensors"])
    for look in (open_checkpoint, inspect_path):
        with pytest.raises(UserError, match=f"manifest.json was not written by megaslm: .*{fault}.*; do not use it$"):
            look(path)
    assert "was not written by megaslm" in inspect_path(tmp_path).checkpoints[0].damage[0]


@pytest.mark.parametrize("change", [{"exp_avg": {}}, {"weights": {}}])
def test_a_manifest_whose_kinds_are_not_of_the_same_tensors_is_refused(tmp_path, change):
    path = write(tmp_path)
    rewrite(path, tensors=read_manifest(path)["tensors"] | change)
    with pytest.raises(UserError, match="was not written by megaslm: .* not of the parameters that the weights are of"):
        open_checkpoint(path)


def test_a_folder_that_older_code_wrote_is_read(tmp_path):
    """Byte by byte what a version 2 is: two ranks of ZeRO, no fingerprint, no slices."""
    folder = tmp_path / "step_00000003"
    folder.mkdir()
    files = {}
    for rank, numbers in enumerate(([0, 1, 2, 3], [4, 5])):
        entry = {"dtype": "F32", "shape": [len(numbers)], "data_offsets": [0, 4 * len(numbers)]}
        header = json.dumps({"__metadata__": {"format": "pt"}, "w": entry}).encode()
        data = struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(numbers)}f", *numbers)
        (folder / f"weights_{rank:05d}.safetensors").write_bytes(data)
        files[f"weights_{rank:05d}.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    pieces = [
        {"file": "weights_00000.safetensors", "start": 0, "numel": 4},
        {"file": "weights_00001.safetensors", "start": 4, "numel": 2},
    ]
    manifest = {
        "format": "megaslm-checkpoint",
        "version": 2,
        "sha256": "0" * 64,
        "serial": 1,
        "written": "2026-01-01T00:00:00.000000+00:00",
        "step": 3,
        "code": {"megaslm": "0.1.0"},
        "run_config": {"name": "old"},
        "global_state": {"samples": 12},
        "marks": {"validation_loss": None, "epoch": None},
        "optimizer": None,
        "files": files,
        "tensors": {"weights": {"w": {"shape": [2, 3], "pieces": pieces}}},
    }
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest(), 1))
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.step, checkpoint.global_state, checkpoint.fingerprint) == (3, {"samples": 12}, None)
    assert checkpoint.read("w").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert checkpoint.read_part("weights", "w", Part(Block((0, 1), (2, 1)), 0, 2)).tolist() == [1, 4]
    assert inspect_path(folder).passed


@pytest.fixture
def many_files(tmp_path) -> Path:
    """A checkpoint of 60 ranks."""
    entry, files = {"shape": [60], "pieces": []}, {}
    path = write(tmp_path)
    for i in range(60):
        name = f"weights_{i:05d}.safetensors"
        files[name] = write_safetensors(path / name, {"w": torch.full((1,), float(i))})
        entry["pieces"].append({"file": name, "start": i, "numel": 1})
    rewrite(path, files=files, tensors={"weights": {"w": entry}})
    return path


@pytest.fixture
def few_descriptors():
    """few_descriptors(room): so many more files may be open than now; the process may raise that again."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)  # the number that a listing of the open files takes, and gives back
    os.close(lowest)

    def limit(room: int) -> None:
        opened = set(map(int, os.listdir("/proc/self/fd"))) - {lowest}
        free = (number for number in itertools.count() if number not in opened)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, room, None)), limits[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="the system does not tell the open files")
def test_a_checkpoint_of_more_files_than_may_be_open(many_files, few_descriptors, monkeypatch):
    few_descriptors(20)
    checkpoint = open_checkpoint(many_files)
    assert checkpoint.read("w").tolist() == list(range(60))  # with few files open at a time
    with monkeypatch.context() as patch:
        patch.setattr(format_module, "allow_open_files", lambda count: None)
        with pytest.raises(UserError, match=r"no more files can be opened.*ulimit -n") as refusal:
            checkpoint.hold()
        assert not isinstance(refusal.value, DamagedCheckpoint)
    checkpoint.close()
    checkpoint.hold()  # raises the limit
    shutil.rmtree(many_files)
    assert checkpoint.read("w").tolist() == list(range(60))
    checkpoint.close()


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="the system does not tell the open files")
def test_a_lack_of_descriptors_is_no_damage(tmp_path, tokenizer, few_descriptors):
    """Else an older checkpoint would be taken, and the newer one deleted in the end."""
    checkpoint = open_checkpoint(write(tmp_path, tokenizer_files=tokenizer.files))
    file, entry = next(iter(checkpoint.manifest["files"].items()))
    read = checkpoint.read
    read("w", "exp_avg")
    few_descriptors(0)
    for look in (
        lambda: read_manifest(checkpoint.path),
        lambda: find_damage(checkpoint.path, file, entry, read=True),
        checkpoint.tokenizer,
        lambda: read("w"),  # of a file that was not looked at yet
        lambda: read("w", "exp_avg"),
    ):
        with pytest.raises(UserError, match="ulimit -n") as refusal:
            look()
        assert not isinstance(refusal.value, DamagedCheckpoint)


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
    assert checkpoint.read_part("weights", "w", Part(Block.whole((2, 3)), 2, 4)).tolist() == [2, 3]
    assert checkpoint.tokenizer().same_files(tokenizer)
    checkpoint.close()
    with pytest.raises(DamagedCheckpoint, match="its tokenizer can't be read"):
        checkpoint.tokenizer()
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
    others = [tmp_path / name for name in (".step_00000008.0.tmp", ".other.0.tmp", ".import.0.tmp")]
    for folder in (*others, tmp_path / "import"):
        folder.mkdir()
    path = write(tmp_path, step=0, name="import")
    assert path == tmp_path / "import" and open_checkpoint(path).step == 0
    assert all(folder.exists() for folder in others), "somebody may be writing there"
    assert latest_sound(tmp_path, print).step == 7
    before = sorted(os.listdir(path))
    with pytest.raises(UserError, match="import exists and is not an empty folder"):
        write(tmp_path, step=0, name="import")
    assert sorted(os.listdir(path)) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file exists and is not an empty folder"):
        write(tmp_path, step=0, name="file")
    assert (tmp_path / "file").read_text() == "mine"
    assert [hidden.name for hidden in tmp_path.glob(".import*")] == [".import.0.tmp"]


def test_of_two_who_write_the_same_name_the_faster_one_stays(tmp_path, monkeypatch):
    write_files = folder_module._write_files

    def overtaken(*arguments):
        monkeypatch.setattr(folder_module, "_write_files", write_files)
        write(tmp_path, step=1, name="import")
        return write_files(*arguments)

    monkeypatch.setattr(folder_module, "_write_files", overtaken)
    with pytest.raises(UserError, match="import exists and is not an empty folder"):
        write(tmp_path, step=2, name="import")
    assert open_checkpoint(tmp_path / "import").step == 1 and os.listdir(tmp_path) == ["import"]


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

    pieces = {"weights": [Piece.whole(name, lazy(name)) for name in tensors]}
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
            checkpoint.read_part("weights", "w", Part(Block.whole((2, 3)), 5, 6)) if in_part else checkpoint.read("w")
        checkpoint.close()


def test_the_manifest_stays_strict_json(tmp_path):
    nowhere = Fingerprint([1, 2], "fp32", float("nan"), [float("inf")])
    path = write(tmp_path, fingerprint=nowhere)
    text = (path / "manifest.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    own = {"tokens": [1, 2], "precision": "fp32", "loss": None, "logits": [None], "rounded": {}}
    assert json.loads(text)["fingerprint"] == own
