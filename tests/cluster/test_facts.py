"""What a rank says of its machine, where the machine is made up."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from megaslm.cluster import facts
from megaslm.cluster.judging import FAULT, judge_code
from megaslm.config import load_run_config

VERSION = """NVRM version: NVIDIA UNIX {kind}  570.86.15  Release Build  (dvs-builder@U16)  Thu Jan 23 22:49:15 UTC 2025
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)
"""


@pytest.mark.parametrize("kind", ["x86_64 Kernel Module", "Open Kernel Module for x86_64"])
def test_the_version_of_the_driver(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(facts, "DRIVER", tmp_path / "version")
    assert facts.driver_version() is None
    (tmp_path / "version").write_text(VERSION.format(kind=kind))
    assert facts.driver_version() == "570.86.15"


def test_a_rank_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert facts.device_facts("cuda", 2)["fault"].startswith("2 GPUs are there, and this is local rank 2")


def test_a_gpu_is_named_by_its_number_on_the_machine(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H200", uuid="GPU-1", major=9, minor=0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in {
        "is_available": True, "device_count": 8, "mem_get_info": (100, 140), "get_device_properties": properties,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    found = facts.device_facts("cuda", 3)
    assert (found["index"], found["used"], found["architecture"]) == (3, 40, "sm_90")


def test_two_trees_that_differ_in_a_file(tmp_path):
    for name in ("one", "two"):
        for part in ("launch", "kernels"):
            shutil.copytree(facts.ROOT / part, tmp_path / name / part, ignore=shutil.ignore_patterns("__pycache__"))
    one, two = (facts.source_hashes(tmp_path / name) for name in ("one", "two"))
    assert one == two and one.items() <= facts.source_hashes().items()
    assert {"launch/pretrain.py", "kernels/megaslm_kernels/attention.py"} <= one.keys()
    with open(tmp_path / "two" / "launch" / "pretrain.py", "a") as file:
        file.write("# changed")
    two = facts.source_hashes(tmp_path / "two")
    finding = judge_code({name: {"code": code, "versions": {}} for name, code in (("one", one), ("two", two))})[0]
    assert finding.level == FAULT and finding.text.startswith("two and one differ in launch/pretrain.py;")


def test_the_files_of_a_run(preset, corpus, tmp_path):
    gone = str(tmp_path / "gone")
    found = facts.data_facts(load_run_config(preset), gone)
    assert found[corpus.tokenizer].endswith(" files")
    assert not found[corpus.prefix].startswith("missing: ")
    assert found[gone].startswith("missing: ")
    assert facts.data_facts(load_run_config(preset, [f"data.train={gone}"]))[gone].startswith("missing: ")
    of_text = facts.data_facts(load_run_config(preset, [f"data.input={corpus.text}", "data.train=[]"]))
    assert of_text[str(corpus.text)] == f"{corpus.text.stat().st_size} bytes"
