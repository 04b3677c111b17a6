"""tools/inspect_checkpoint.py: what it says of one checkpoint, of all of a run, and of two; it changes nothing."""

import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaslm.checkpoint import (
    Piece,
    compare_checkpoints,
    comparison,
    inspect_path,
    inspection,
    report_json,
    write_checkpoint,
)
from megaslm.checkpoint.format import read_manifest, write_manifest
from megaslm.checkpoint.safetensors_file import write_safetensors

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "inspect_checkpoint.py"
SHAPES = {"a.weight": (5, 4), "b.weight": (4, 6), "norm": (7,), "scale": ()}  # 52 elements
Finished = namedtuple("Finished", "code out err")
KINDS = ("weights", "exp_avg", "exp_avg_sq")
PROGRESS = {"samples": 2048, "tokens": 65536, "skipped_steps": 1, "seconds": 12.5}
OPTIMIZER = {
    "type": "adam",
    "moments": ["exp_avg", "exp_avg_sq"],
    "steps": {"a.weight": 3, "b.weight": 3, "norm": 3, "scale": 2},
    "weight_decay": {"a.weight": 0.1, "b.weight": 0.1, "norm": 0.0, "scale": 0.0},
    "loss_scaler": None,
}
MANIFEST_VALUES = {
    "step": 3,
    "run_config": {"name": "tiny", "model": {"num_layers": 2, "rope": {"theta": 10000.0}}},
    "global_state": {"progress": PROGRESS, "identity": {"data.seed": 1}},
    "optimizer": OPTIMIZER,
    "marks": {"validation_loss": 2.5, "epoch": 4},
}


def make_tensors() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for kind in KINDS}


def write(directory: Path, tensors: dict | None = None, **changes) -> Path:
    pieces = {
        kind: [Piece.whole(name, tensor) for name, tensor in part.items()]
        for kind, part in (tensors or make_tensors()).items()
    }
    return write_checkpoint(directory, pieces, **(MANIFEST_VALUES | changes))


def write_weights(directory: Path, **weights: list[float]) -> Path:
    tensors = {"weights": {name: torch.tensor(values) for name, values in weights.items()}}
    return write(directory, tensors, optimizer=None)


def rewrite_manifest(path: Path, **changes) -> None:
    write_manifest(path, {key: value for key, value in read_manifest(path).items() if key != "sha256"} | changes)


def write_by_two_ranks(path: Path, blocks: bool = False) -> Path:
    """The same tensors as those of `write`, as two ranks hold them: flat halves, or column blocks of the matrices."""
    write(path.parent / "whole")
    path.mkdir(parents=True)
    manifest = read_manifest(path.parent / "whole" / "step_00000003") | {"files": {}, "tensors": {}}
    for kind, part in make_tensors().items():
        files: list[dict[str, Tensor]] = [{}, {}]
        entries = manifest["tensors"][kind] = {}
        for name, tensor in part.items():
            pieces = []
            for rank in (0, 1):
                if blocks and tensor.dim() == 2:
                    left, right = ((0, 1), (1, tensor.shape[1]))[rank]
                    place = {"offset": [0, left], "shape": [tensor.shape[0], right - left]}
                    held, start = tensor[:, left:right].reshape(-1), {"start": 0, "block": place}
                else:
                    middle = tensor.numel() // 2
                    begin, end = ((0, middle), (middle, tensor.numel()))[rank]
                    held, start = tensor.reshape(-1)[begin:end], {"start": begin}
                if held.numel():
                    files[rank][name] = held if tensor.dim() else held.reshape(())
                    pieces.append({"file": f"{kind}_{rank:05d}.safetensors", "numel": held.numel(), **start})
            entries[name] = {"shape": list(tensor.shape), "pieces": pieces}
        for rank in (0, 1):
            file = f"{kind}_{rank:05d}.safetensors"
            manifest["files"][file] = write_safetensors(path / file, files[rank])
    del manifest["sha256"]
    write_manifest(path, manifest)
    return path


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")


def load_strictly(text: str) -> dict:
    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def tool(monkeypatch, capsys):
    """tool(argument, ...) -> Finished: the tool in this process."""

    def run(*arguments) -> Finished:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
        out, err = capsys.readouterr()
        return Finished(end.value.code, out, err)

    return run


def facts(out: str) -> dict[str, str]:
    """The first part of what is said of one checkpoint."""
    return {line[:13].strip(): line[13:] for line in out.split("\n\n")[0].splitlines()}


def test_as_the_user_runs_it(tmp_path):
    """As a process, which must not import DeepSpeed nor touch a device."""
    path = write(tmp_path)
    code = (
        "import runpy, sys, torch\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "print(code, 'deepspeed' in sys.modules, torch.cuda.is_initialized())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", f"import sys; sys.argv.pop(0); {code}", str(TOOL), str(path), str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout.splitlines()[-2:] == ["equal", "0 False False"]


def test_one_checkpoint(tmp_path, tool):
    path = write(tmp_path)
    result = tool(path)
    assert result.code == 0 and result.err == ""
    said, versions = facts(result.out), read_manifest(path)["code"]
    total = sum(file.stat().st_size for file in path.iterdir())
    assert said["checkpoint"] == str(path) and said["step"] == "3" and said["run"] == "tiny"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", said["written"])
    assert said["format"] == "version 2" and said["code"] == ", ".join(f"{k} {v}" for k, v in versions.items())
    assert said["consumed"] == "2,048 samples, 65,536 tokens" and said["skipped"] == "1 step"
    assert said["trained"] == "12.5 s"
    assert said["marks"] == "validation loss 2.5000 nats, end of epoch 4"
    assert said["parameters"] == "52 in 4 tensors" and said["holds"] == "weights, exp_avg, exp_avg_sq"
    assert said["optimizer"] == "adam" and said["steps"] == "2 (1 tensor), 3 (3 tensors)"
    assert said["weight decay"] == "0.1 (2 tensors, 44 elements), 0 (2 tensors, 8 elements)"
    assert said["loss scaler"] == "none"
    assert said["size"].endswith(f"({total:,} bytes) in 4 files of 1 rank")
    for file in path.iterdir():
        assert re.search(rf"{file.stat().st_size:,}  {re.escape(file.name)} +sound", result.out), file
    assert result.out.endswith("\nsound\n")


def test_weights_alone_and_a_loss_scaler(tmp_path, tool):
    alone = write(tmp_path / "alone", {"weights": make_tensors()["weights"]}, optimizer=None, global_state={})
    said = facts(tool(alone).out)
    assert said["holds"] == "weights alone, without the optimizer" and "optimizer" not in said
    assert said["consumed"] == "- samples, - tokens"
    scaled = write(tmp_path / "scaled", optimizer=OPTIMIZER | {"loss_scaler": {"cur_scale": 512.0, "cur_iter": 7}})
    assert facts(tool(scaled).out)["loss scaler"] == "cur_scale 512.0, cur_iter 7"


def test_every_damaged_file_is_named(tmp_path, tool):
    path = write(tmp_path)
    flip(path / "exp_avg_00000.safetensors")
    cut = path / "weights_00000.safetensors"
    cut.write_bytes(cut.read_bytes()[:-3])
    (path / "notes.txt").write_text("x")
    result = tool(path)
    assert result.code == 1 and result.err == ""
    assert "exp_avg_00000.safetensors is not what was written (hash differs)" in result.out
    assert "weights_00000.safetensors has" in result.out and "not of the checkpoint: notes.txt" in result.out
    assert re.search(r"exp_avg_sq_00000.safetensors +sound", result.out)
    assert len(re.findall(r"safetensors +DAMAGED", result.out)) == 2
    assert inspect_path(path).bytes == sum(file.stat().st_size for file in path.glob("[emw]*"))
    quick = tool(path, "--quick")
    assert quick.code == 1 and "weights_00000.safetensors has" in quick.out and "hash" not in quick.out
    cut.unlink()
    assert "weights_00000.safetensors is missing" in tool(path).out


def test_quick_says_what_it_left_out(tmp_path, tool):
    path = write(tmp_path)
    flip(path / "exp_avg_00000.safetensors")
    result = tool(path, "--quick")
    assert result.code == 0 and result.out.endswith("\nsound as far as sizes tell (hashes not compared)\n")
    assert tool(path).code == 1


@pytest.mark.parametrize("fault", ["missing", "changed"])
def test_without_its_manifest(tmp_path, tool, fault):
    path = write(tmp_path / "a")
    other = write(tmp_path / "b")
    (path / "manifest.json").unlink() if fault == "missing" else flip(path / "manifest.json", -3)
    for arguments in ([path], [path, other], [other, path]):
        result = tool(*arguments)
        assert result.code == 1 and result.err == ""
        assert result.out.count("\n  manifest.json ") + result.out.count("\nmanifest.json ") == 1
        report = load_strictly(tool(*arguments, "--json").out)
        assert report["passed"] is False
    assert facts(tool(path).out)["step"] == "3"  # of the folder's name


def test_links_are_followed(tmp_path, tool):
    path = write(tmp_path)
    link = tmp_path / "lm_current"
    link.symlink_to(path.name, target_is_directory=True)
    assert facts(tool(link).out)["checkpoint"] == str(path)
    assert tool(link, path).code == 0


def test_table_of_a_run(tmp_path, tool):
    directory = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3, 40):
        write(directory, step=step, marks={"validation_loss": 2 + step / 8 if step < 3 else None})
    flip(directory / "step_00000002" / "weights_00000.safetensors")
    flip(directory / "step_00000002" / "exp_avg_00000.safetensors")
    (directory / "step_00000003" / "manifest.json").unlink()
    for name, step in {"lm_current": 40, "lm_prev": 2, "lm_prev2": 9}.items():
        (directory / name).symlink_to(f"step_{step:08d}")
    (directory / ".step_00000050.tmp").mkdir()
    result = tool(directory)
    assert result.code == 1 and result == tool(directory.parent) and result.err == ""
    rows = {line.split()[0]: re.split(r"  +", line.strip()) for line in result.out.splitlines()[3:7]}
    assert [rows[step][3:] for step in ("1", "40")] == [["2.1250", "-", "sound"], ["-", "lm_current", "sound"]]
    assert rows["2"][3:5] == ["2.2500", "lm_prev"] and rows["2"][5].startswith("DAMAGED: ")
    assert "weights_00000.safetensors is not" in rows["2"][5] and "exp_avg_00000.safetensors is not" in rows["2"][5]
    assert rows["3"][1] == "-" and rows["3"][5] == "DAMAGED: manifest.json is missing"
    assert "lm_prev2 points to step_00000009, which is gone" in result.out and ".step_00000050.tmp" in result.out
    report = load_strictly(tool(directory, "--json").out)
    assert report["report"] == "folder" and [len(one["damage"]) for one in report["checkpoints"]] == [0, 2, 1, 0]
    assert report["links"]["lm_current"] == "step_00000040"


def test_table_of_a_sound_run(tmp_path, tool):
    for step in (1, 2):
        write(tmp_path, step=step)
    assert tool(tmp_path).code == 0
    rewrite_manifest(tmp_path / "step_00000001", version=4)  # of a newer megaslm: the others are still of use
    result = tool(tmp_path)
    assert result.code == 1 and "format version 4, this megaslm reads 2 and 3" in result.out
    assert result.out.splitlines()[4].endswith("sound")


def test_a_run_deletes_one_meanwhile(tmp_path, monkeypatch):
    paths = [write(tmp_path, step=step) for step in (1, 2)]
    read = inspection.read_manifest

    def read_and_delete(path: Path) -> dict:
        manifest = read(path)
        if path == paths[0]:
            shutil.rmtree(path)
        return manifest

    monkeypatch.setattr(inspection, "read_manifest", read_and_delete)
    report = inspect_path(tmp_path)
    assert report.passed and [one.step for one in report.checkpoints] == [2]


def test_nothing_is_changed(tmp_path, tool):
    def state() -> dict:
        found = {}
        for path in sorted(tmp_path.rglob("*")):
            stat = path.lstat()
            found[path] = (stat.st_mtime_ns, stat.st_ino, path.read_bytes() if path.is_file() else None)
        return found

    for step in (1, 2):
        write(tmp_path, step=step)
    # What the next save, or the next start of the run, would put in order.
    (tmp_path / "step_00000002").rename(tmp_path / ".step_00000002.old")
    write(tmp_path / "else", step=3).rename(tmp_path / ".step_00000003.tmp")
    flip(tmp_path / "step_00000001" / "weights_00000.safetensors")
    before = state()
    for arguments in ([tmp_path], [tmp_path / "step_00000001", "--tensors"], [tmp_path / "step_00000001"] * 2):
        assert tool(*arguments).code == 1
    assert state() == before


def test_mistakes_are_one_message(tmp_path, tool):
    sound = write(tmp_path / "run" / "checkpoints")
    newer = write(tmp_path / "newer")
    rewrite_manifest(newer, version=4)
    for name in ("empty", "new/checkpoints", "cut/checkpoints/.step_00000001.tmp", "foreign"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "foreign" / "mp_rank_00_model_states.pt").write_text("x")
    (tmp_path / "gone").symlink_to("nowhere")
    run = tmp_path / "run"
    for arguments, message in [
        ([tmp_path / "nowhere"], "there is no checkpoint"),
        ([tmp_path / "gone"], "there is no checkpoint"),
        ([TOOL], "is a file"),
        ([tmp_path / "foreign"], "it looks like a DeepSpeed checkpoint"),
        ([tmp_path / "empty"], "empty holds no checkpoints"),
        ([tmp_path / "new"], "new holds no checkpoints"),
        ([tmp_path / "cut"], "no checkpoint under its name, only .step_00000001.tmp"),
        ([newer], "format version 4, this megaslm reads 2 and 3"),
        ([tmp_path / ("x" * 300)], "can't read"),
        ([sound, tmp_path / "foreign"], "it looks like a DeepSpeed checkpoint"),
        ([sound, run], f"holds checkpoints; to compare one, name it, such as {sound}"),
        ([run, "--tensors"], f"holds checkpoints; to list the tensors of one, name it, such as {sound}"),
        ([sound, sound, sound], "3 paths given"),
        ([sound, sound, "--tensors"], "--tensors is of one checkpoint"),
        ([sound, "--show", 3], "--show is of a comparison"),
        ([sound, sound, "--show", -1], "--show -1: give 0 or more"),
    ]:
        result = tool(*arguments)
        assert result.code == 2 and result.out == "", arguments
        assert result.err.startswith("error: ") and message in result.err and result.err.count("\n") == 1, result.err


@pytest.mark.parametrize("layout", ["one rank", "two ranks", "blocks"])
def test_equal_checkpoints(tmp_path, tool, layout):
    """What two runs of the same command differ in does not count, nor how the tensors are cut."""
    a = write(tmp_path / "a")
    if layout == "one rank":
        b = write(tmp_path / "b")
    else:
        b = write_by_two_ranks(tmp_path / "b" / "step_00000003", blocks=layout == "blocks")
        assert inspect_path(b).contents.ranks == 2
    progress = PROGRESS | {"seconds": 99.0}
    state = MANIFEST_VALUES["global_state"] | {"progress": progress}
    rewrite_manifest(b, written="2001-01-01T00:00:00.000000+00:00", code={"megaslm": "9"}, global_state=state)
    result = tool(a, b)
    assert result.code == 0 and result.out.endswith("\nequal\n")
    for kind in KINDS:
        assert f"{kind}: 4 of 4 tensors identical bit for bit" in result.out
    # Of the header, not of a tensor: equal, and damaged.
    file = b / "weights_00000.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"pt"', b'"tp"'))
    for damaged in (tool(a, b), tool(b, a)):
        assert damaged.code == 1 and damaged.out.count("\n  weights_00000.safetensors is not what was written") == 1
        assert damaged.out.endswith("\nequal\n")
    flip(file)
    assert "weights: 3 of 4 tensors identical" in tool(a, b).out


def test_one_bit_of_one_moment(tmp_path, tool):
    tensors = make_tensors()
    a = write(tmp_path / "a", tensors)
    before = tensors["exp_avg_sq"]["b.weight"][2, 5].item()
    tensors["exp_avg_sq"]["b.weight"].view(torch.int32)[2, 5] ^= 1
    change = abs(tensors["exp_avg_sq"]["b.weight"][2, 5].item() - before)
    b = write(tmp_path / "b", tensors)
    result = tool(a, b)
    assert result.code == 1 and result.out.endswith("\nA and B differ\n")
    assert result.out.count(": equal") == 7  # all of the manifest
    assert "weights: 4 of 4" in result.out and "exp_avg: 4 of 4" in result.out and "exp_avg_sq: 3 of 4" in result.out
    part = compare_checkpoints(a, b).tensors[2]
    norm = make_tensors()["exp_avg_sq"]["b.weight"].double().norm().item()
    assert part.largest == {"value": change, "name": "b.weight"} and change > 0
    assert part.relative["name"] == "b.weight" and part.relative["value"] == pytest.approx(change / norm, rel=1e-12)
    (one,) = part.differing
    assert (one.name, one.differing, one.elements) == ("b.weight", 1, 24)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("chunk", [2, 2**22])
@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # differing, largest, relative, non-finite in A, in B, differing non-finite ones
        ([0.0, 3.0], [-0.0, 3.0], (1, 0.0, 0.0, 0, 0, 0)),
        ([NAN, 1.0, INF], [NAN, 1.0, INF], (0, 0.0, 0.0, 2, 2, 0)),
        ([3.0, NAN, 4.0], [3.0, NAN, 5.0], (1, 1.0, 0.2, 1, 1, 0)),
        ([3.0, 4.0, NAN], [3.0, 4.0, 7.0], (1, 0.0, 0.0, 1, 0, 1)),
        ([INF, 3.0, 4.0, 0.0], [-INF, 3.0, 4.0, 0.0], (1, 0.0, 0.0, 1, 1, 1)),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 2.0], (1, 2.0, INF, 0, 0, 0)),
        ([3e38, 0.0], [-3e38, 0.0], (1, 6e38, 2.0, 0, 0, 0)),
    ],
    ids=["signed zero", "same NaN", "finite beside NaN", "NaN", "inf", "from zero", "over the range of fp32"],
)
def test_bits_and_numbers_that_are_not_finite(tmp_path, monkeypatch, a, b, expected, chunk):
    monkeypatch.setattr(comparison, "CHUNK", chunk)
    report = compare_checkpoints(write_weights(tmp_path / "a", w=a), write_weights(tmp_path / "b", w=b))
    part = report.tensors[0]
    differing, largest, relative, nonfinite_a, nonfinite_b, differing_nonfinite = expected
    assert report.equal == (differing == 0) == (part.identical == 1) == (part.differing == [])
    if differing:
        one = part.differing[0]
        assert (one.differing, one.differing_nonfinite) == (differing, differing_nonfinite)
        assert [one.largest, one.relative] == pytest.approx([largest, relative], rel=1e-6)
    shown = [{"name": "w", "a": nonfinite_a, "b": nonfinite_b}]
    assert part.nonfinite == (shown if nonfinite_a or nonfinite_b else [])


def test_those_that_differ_most_come_first(tmp_path, tool):
    weights = {"same": [1.0], "small": [1.0], "tenth": [10.0], "half": [2.0], "nan": [1.0], "far": [1000.0]}
    changed = weights | {"small": [1.0001], "tenth": [11.0], "half": [3.0], "nan": [NAN], "far": [1020.0]}
    a, b = write_weights(tmp_path / "a", **weights), write_weights(tmp_path / "b", **changed)
    part = compare_checkpoints(a, b).tensors[0]
    assert [one.name for one in part.differing] == ["nan", "half", "tenth", "far", "small"]
    assert part.largest == {"value": 20.0, "name": "far"} and part.relative == {"value": 0.5, "name": "half"}
    out = tool(a, b, "--show", 2).out
    listed = [line.split()[5] for line in out.splitlines() if " of 1 " in line]
    assert listed == ["nan", "half"] and "weights: 1 of 6 tensors identical" in out
    assert "non-finite values: 0 in A, 1 in B  nan" in out and "(1 of them not finite)" in out
    report = load_strictly(tool(a, b, "--show", 0, "--json").out)
    assert report["tensors"][0]["differing"] == [] and report["tensors"][0]["identical"] == 1
    assert report["passed"] is False


def test_weights_alone_against_all(tmp_path, tool):
    a = write(tmp_path / "a")
    b = write(tmp_path / "b", {"weights": make_tensors()["weights"]}, optimizer=None)
    result = tool(a, b)
    assert result.code == 1 and 'holds: "weights and optimizer" -> "weights"' in result.out
    assert "weights: 4 of 4" in result.out and "exp_avg" not in result.out
    assert 'holds: "weights" -> "weights and optimizer"' in tool(b, a).out


def test_differences_of_the_manifest(tmp_path, tool):
    a = write(tmp_path / "a", optimizer=OPTIMIZER | {"loss_scaler": {"cur_scale": 512.0}})
    changed = {
        "step": 4,
        "run_config": {"name": "tiny", "model": {"num_layers": 3, "rope": {}}, "new": [1]},
        "global_state": {"progress": PROGRESS | {"samples": 4096}, "identity": {"data.seed": 1}},
        "marks": {"validation_loss": 2.5, "epoch": None},
        "optimizer": OPTIMIZER
        | {
            "steps": {"a.weight": 4, "b.weight": 4, "norm": 4, "scale": 2},
            "weight_decay": OPTIMIZER["weight_decay"] | {"scale": 0.1},
            "loss_scaler": {"cur_scale": 256.0},
        },
    }
    b = write(tmp_path / "b", **changed)
    result = tool(a, b)
    assert result.code == 1
    sections = {}
    for line in result.out.split("\n\n")[1].splitlines():
        if not line.startswith("  "):
            lines = sections[line.partition(":")[0]] = []
        else:
            lines.append(line.strip())
    assert sections == {
        "step": ["step: 3 -> 4"],
        "run config": ["model.num_layers: 2 -> 3", "model.rope.theta: 10000.0 -> not set", "new: not set -> [1]"],
        "global state": ["progress.samples: 2048 -> 4096"],
        "marks": ["epoch: 4 -> null"],
        "optimizer": ["loss_scaler.cur_scale: 512.0 -> 256.0"],
        "optimizer steps": ["3 -> 4 for 3 tensors, such as a.weight"],
        "optimizer weight decay": ["scale: 0.0 -> 0.1"],
        "parameters": [],
    }
    values = compare_checkpoints(a, b).values
    assert values["run_config"][1:] == [{"name": "model.rope.theta", "a": 10000.0}, {"name": "new", "b": [1]}]


@pytest.mark.parametrize("section", ["step", "run_config", "global_state", "marks", "optimizer"])
def test_any_difference_counts(tmp_path, section):
    changed = {
        "step": 9,
        "run_config": MANIFEST_VALUES["run_config"] | {"name": "other"},
        "global_state": {"progress": PROGRESS},
        "marks": {},
        "optimizer": OPTIMIZER | {"steps": dict.fromkeys(SHAPES, 3)},
    }
    a, b = write(tmp_path / "a"), write(tmp_path / "b", **{section: changed[section]})
    report = compare_checkpoints(a, b)
    found = {name.partition(".")[0] for name, entries in report.values.items() if entries}
    assert found == {section} and not report.equal and not report.passed


@pytest.mark.parametrize(
    ("name", "shape", "line"),
    [("norm", None, "norm: only in A"), ("new", (2,), "new: only in B"), ("norm", (1, 7), "norm: [7] -> [1, 7]")],
)
def test_other_parameters(tmp_path, tool, name, shape, line):
    a, tensors = write(tmp_path / "a"), make_tensors()
    names = {*SHAPES, name} if shape else {*SHAPES} - {name}
    for part in tensors.values():
        part.pop(name, None)
        part |= {name: torch.ones(shape)} if shape else {}
    of_optimizer = {key: {n: OPTIMIZER[key].get(n, 9) for n in names} for key in ("steps", "weight_decay")}
    result = tool(a, write(tmp_path / "b", tensors, optimizer=OPTIMIZER | of_optimizer))
    assert result.code == 1 and f"parameters: 1 difference\n  {line}\n" in result.out
    assert result.out.count(": equal") == 7  # the step count and the decay of a parameter in one alone are no news
    common = 4 if name == "new" else 3
    assert f"weights: {common} of {common} tensors identical" in result.out


def test_statistics_of_tensors(tmp_path, tool, monkeypatch):
    monkeypatch.setattr(inspection, "CHUNK", 3)
    tensors = make_tensors()
    tensors["exp_avg"]["b.weight"][1, 2] = NAN
    tensors["exp_avg"]["b.weight"][3, :2] = -INF
    tensors["exp_avg"]["norm"][:] = NAN
    tensors["weights"]["norm"] += 1e4  # where a sum of squares would lose the deviation
    path = write(tmp_path, tensors)
    report = inspect_path(path, tensors=True)
    assert report.passed and [one.kind for one in report.tensors] == [kind for kind in KINDS for _ in SHAPES]
    for one in report.tensors:
        tensor = tensors[one.kind][one.name].double()
        finite = tensor[tensor.isfinite()]
        assert one.shape == list(SHAPES[one.name]) and one.pieces == 1
        assert (
            one.nonfinite
            == tensor.numel() - finite.numel()
            == {"b.weight": 3, "norm": 7}.get(one.name if one.kind == "exp_avg" else "", 0)
        )
        if finite.numel():
            expected = [finite.mean(), finite.std(correction=0), finite.min(), finite.max()]
            assert [one.mean, one.std, one.min, one.max] == pytest.approx([x.item() for x in expected], rel=1e-9)
        else:
            assert [one.mean, one.std, one.min, one.max] == [None] * 4
    out = tool(path, "--tensors").out
    assert re.search(r"exp_avg +norm +7 +1 +- +- +- +- +7\n", out) and re.search(r"weights +scale +scalar +1 ", out)
    assert len(load_strictly(tool(path, "--tensors", "--json").out)["tensors"]) == 12


@pytest.mark.parametrize("blocks", [False, True], ids=["flat", "blocks"])
def test_statistics_of_tensors_in_pieces(tmp_path, blocks):
    whole = inspect_path(write(tmp_path / "a"), tensors=True)
    cut = inspect_path(write_by_two_ranks(tmp_path / "step_00000003", blocks), tensors=True)
    assert {(one.name, one.pieces) for one in cut.tensors} == {(n, 1 if n == "scale" else 2) for n in SHAPES}
    for one, other in zip(whole.tensors, cut.tensors, strict=True):
        assert (one.kind, one.name, one.shape, one.min, one.max) == (*vars(other).values(),)[:3] + (
            other.min,
            other.max,
        )
        assert [one.mean, one.std] == pytest.approx([other.mean, other.std], rel=1e-12)


@pytest.mark.parametrize("fault", ["other shapes", "other type", "not safetensors", "missing"])
def test_files_that_cant_be_read(tmp_path, tool, fault):
    """The other tensors are looked at all the same; the hashes tell of it, and without them the reading does."""
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    file = b / "exp_avg_00000.safetensors"
    size = file.stat().st_size
    if fault == "other shapes":
        write_safetensors(file, {name: torch.zeros(2) for name in SHAPES if name != "scale"})
    elif fault == "other type":
        file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"'))
    elif fault == "not safetensors":
        file.write_bytes(b"x" * size)
    else:
        file.unlink()
    if file.exists():
        rewrite_manifest(b, files=read_manifest(b)["files"] | {file.name: {"bytes": file.stat().st_size, "sha256": ""}})
    for options in ([], ["--quick"]):
        result = tool(a, b, *options)
        assert result.code == 1 and result.err == "" and "weights: 4 of 4" in result.out
        assert "exp_avg: 0 of 0 tensors" in result.out and result.out.count("can't be read: ") == 4
        listed = tool(b, "--tensors", *options)
        assert listed.code == 1 and "exp_avg of norm can't be read" in listed.out
        assert len(re.findall(r"\n(?:weights|exp_avg_sq) ", listed.out)) == 8


def test_json_is_strict(tmp_path, tool):
    state = {"progress": PROGRESS | {"interval_loss": NAN, "best_loss": INF}}
    tensors = make_tensors()
    a = write(tmp_path / "a" / "checkpoints", tensors, global_state=state)
    tensors["weights"]["norm"][:] = NAN
    tensors["exp_avg"]["norm"][:] = 0
    b = write(tmp_path / "b", tensors, global_state={"progress": PROGRESS | {"interval_loss": -INF, "best_loss": INF}})
    assert load_strictly(tool(a, "--json").out)["contents"]["samples"] == 2048
    folder = load_strictly(tool(a.parent.parent, "--json").out)
    assert folder["passed"] is True and folder["checkpoints"][0]["contents"]["validation_loss"] == 2.5
    report = load_strictly(tool(b, a, "--json").out)
    assert report["report"] == "comparison" and report["equal"] is False
    assert report["values"]["global_state"] == [{"name": "progress.interval_loss", "a": "-Infinity", "b": "NaN"}]
    assert report["tensors"][1]["relative"] == {"value": "Infinity", "name": "norm"}
    assert load_strictly(report_json(inspect_path(b, tensors=True)))["tensors"][2]["mean"] is None
