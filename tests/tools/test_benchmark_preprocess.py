"""The measurements of tools/benchmark_preprocess.py, on a small file: both sides write the same ids."""

import json
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from megaslm.data import train_bpe
from megaslm.data.sources import source
from megaslm.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import benchmark_preprocess  # noqa: E402


@pytest.fixture
def small(tmp_path, monkeypatch):
    texts = [f"text {i} of a document <|endoftext|> that spells its end" for i in range(200)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_bpe(texts, 300).save(tmp_path / "tokenizer")
    monkeypatch.setattr(source, "UNIT_BYTES", 1000)
    return tmp_path


@pytest.fixture
def benchmark(small):
    """benchmark(*options) -> what the section found, by default on the small file and 1 MB for peak memory."""

    def run(*options):
        parser = ArgumentParser()
        benchmark_preprocess.add_arguments(parser)
        given = ["--jsonl", small / "x.jsonl", "--tokenizer", small / "tokenizer", "--memory_gigabytes", 0.001]
        return benchmark_preprocess.run(parser.parse_args(list(map(str, [*given, *options]))), small)

    return run


def test_both_give_the_same_ids(small):
    arguments = (small / "x.jsonl", str(small / "tokenizer"), small / "out")
    encoder, ours = (measure(*arguments) for measure in benchmark_preprocess.MEASURED.values())
    assert encoder["sha256"] == ours["sha256"]
    assert set(encoder["rates"]) == {"first", "warm"} and set(ours["rates"]) == {"whole"}
    assert min(*encoder["rates"].values(), *ours["rates"].values()) > 0


def test_the_table_has_medians_and_verdicts(benchmark, monkeypatch):
    encoder, ours, peak, digest = iter([90e6, 100e6, 300e6] * 3), [70e6, 74e6, 99e6], 2e8, "same"
    asked, times = [], iter(ours * 2)

    def measured(name, path, tokenizer, folder, sampled=False):
        asked.append((name, sampled))
        if sampled:
            return {"memory": {"pss": peak, "uss": peak, "processes": 4}}
        if name == "encoder":
            return {"rates": {"first": 50e6, "warm": next(encoder)}, "sha256": "same"}
        return {"rates": {"whole": next(times)}, "sha256": digest}

    monkeypatch.setattr(benchmark_preprocess, "in_process", measured)
    found = benchmark()["figures"]
    assert asked == [("encoder", False), ("preprocess", False)] * 3 + [("preprocess", True)]
    assert [row["met"] for row in found] == [None, None, None, False, None, None, True]
    assert [row["measured"] for row in found[:5]] == [
        "50 MB/s (50 to 50)", "100 MB/s (90 to 300)", "74 MB/s (70 to 99)", "74.0%", "148.0%"
    ]  # fmt: skip
    times, peak = iter([75e6] * 3), 1e9
    assert [row["met"] for row in benchmark()["figures"]] == [None, None, None, True, None, None, False]
    digest, times = "other", iter(ours)
    with pytest.raises(UserError, match="different ids"):
        benchmark()


def test_a_measurement_runs_in_a_process_of_its_own(small):
    arguments = ("preprocess", small / "x.jsonl", str(small / "tokenizer"), small)
    before = sorted(small.iterdir())
    found = benchmark_preprocess.in_process(*arguments, sampled=True)
    assert found["rates"]["whole"] > 0 and sorted(small.iterdir()) == before
    assert found["memory"]["processes"] >= 1 and found["memory"]["pss"] >= found["memory"]["uss"] > 1e7
    (small / "x.jsonl").write_text("no record\n")
    with pytest.raises(UserError, match=r"x\.jsonl:1"):
        benchmark_preprocess.in_process(*arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="proportional memory is Linux's")
def test_memory_of_child_processes_counts():
    held = "import time; held = bytes(range(256)) * 400_000; time.sleep(1)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {held!r}])"
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        peaks = benchmark_preprocess.sample_memory(process)
    assert peaks["processes"] == 2 and 1.02e8 < peaks["uss"] <= peaks["pss"] < 2e8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", 0], "above zero"),
        (["--jsonl", "no/such.jsonl"], "no/such.jsonl is not a file"),
        (["--memory_gigabytes", 40], "80 GB of disk .*10.0 GB free"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(benchmark, monkeypatch, options, message):
    monkeypatch.setattr(benchmark_preprocess.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10e9))
    with pytest.raises(UserError, match=message):
        benchmark(*options)


def test_memory_that_the_encoder_lacks_is_named(small, monkeypatch):
    memory = SimpleNamespace(available=9.9e9)
    monkeypatch.setattr(benchmark_preprocess.psutil, "virtual_memory", lambda: memory)
    parser = ArgumentParser()
    benchmark_preprocess.add_arguments(parser)
    arguments = parser.parse_args(["--memory_gigabytes", "0.001"])
    with pytest.raises(UserError, match=r"2 GB takes 10 GB of memory \(9.9 GB available\)"):
        benchmark_preprocess.run(arguments, small)
    memory.available = 10e9
    benchmark_preprocess.check_room(arguments, small)
