"""From facts to findings: every fault is found, named with its host, and says what to do; a sound cluster has none."""

import copy

import pytest

from megaslm.cluster.judging import (
    FAULT,
    OK,
    WARNING,
    Finding,
    judge_bandwidth,
    judge_code,
    judge_data,
    judge_devices,
    judge_memory,
    judge_settings,
    judge_storage,
    raise_faults,
)
from megaslm.cluster.network import bus_bandwidth, expected_bandwidth, judge_network
from megaslm.errors import UserError

GIB = 2**30
GPU = {
    "name": "NVIDIA H200",
    "architecture": "sm_90",
    "architectures": ["sm_80", "sm_90", "sm_100"],
    "bytes": 140 * GIB,
    "used": GIB // 2,
    "cuda": "12.8",
}
NODE = {
    "settings": {"--resume": "auto", "--ds_config zero_optimization.stage": 1, "train.max_steps": 5},
    "code": {"megaslm/a.py": "1", "megaslm/b.py": "2"},
    "versions": {"python": "3.12.3", "torch": "2.13.0"},
    "data": {"corpus/tokens": "f00d"},
    "free_memory": 500e9,
}
HOSTS = ["one", "one", "two", "two"]
GPUS = [GPU | {"uuid": f"GPU-{rank}", "index": rank % 2} for rank in range(4)]
DRIVERS = {"one": "570.86", "two": "570.86"}


def levels(findings) -> dict[str, str]:
    return {finding.name: finding.level for finding in findings}


def text(findings, name: str) -> str:
    return next(finding.text for finding in findings if finding.name == name and finding.level != OK)


def test_equal_gpus_are_ok():
    findings = judge_devices(HOSTS, GPUS, DRIVERS)
    assert levels(findings) == {"GPUs": OK, "CUDA": OK, "GPU memory": OK}
    assert findings[0].text == "4 x NVIDIA H200, 140.0 GiB"


@pytest.mark.parametrize(
    ("rank", "change", "name", "words"),
    [
        (2, {"name": "NVIDIA H100 80GB HBM3"}, "GPUs", ["NVIDIA H100 80GB HBM3 on two", "NVIDIA H200 on one"]),
        (3, {"bytes": 70 * GIB}, "GPUs", ["70.0 GiB on two", "140.0 GiB on one"]),
        (3, {"cuda": "12.6"}, "CUDA", ["12.6 on two", "12.8 on one"]),
        (3, {"used": 60 * GIB}, "GPU memory", ["60.0 GiB of GPU 1 on two", "nvidia-smi", "--skip_checks"]),
        (0, {"fault": "no driver"}, "GPUs", ["one: no driver"]),
        (3, {"uuid": "GPU-1"}, "GPUs", ["rank 1 on one and rank 3 on two have the same one"]),
    ],
)
def test_what_is_wrong_with_a_gpu(rank, change, name, words):
    facts = list(GPUS)
    facts[rank] = {"fault": change["fault"]} if "fault" in change else GPUS[rank] | change
    findings = judge_devices(HOSTS, facts, DRIVERS)
    assert levels(findings)[name] == FAULT
    assert [word for word in words if word not in text(findings, name)] == []


def test_a_little_less_memory_is_no_other_gpu():
    facts = [*GPUS[:3], GPUS[3] | {"bytes": 139 * GIB}]
    assert str(judge_devices(HOSTS, facts, DRIVERS)[0]).endswith("4 x NVIDIA H200, 139.0 GiB")


@pytest.mark.parametrize(("used", "level"), [(1.9, OK), (3, WARNING), (13, WARNING), (15, FAULT)])
def test_memory_of_a_gpu_that_is_in_use(used, level):
    facts = [*GPUS[:3], GPUS[3] | {"used": used * GIB}]
    assert levels(judge_devices(HOSTS, facts, DRIVERS))["GPU memory"] == level


@pytest.mark.parametrize(
    ("architecture", "built_for", "runs"),
    [
        ("sm_90", ["sm_80", "sm_90"], True),
        ("sm_89", ["sm_80", "sm_90"], True),  # code of 8.0 runs on 8.9
        ("sm_120", ["sm_80", "sm_90"], False),
        ("sm_120", ["sm_90", "compute_90"], True),  # compiled when it is loaded
    ],
)
def test_a_build_of_torch_for_other_gpus(architecture, built_for, runs):
    facts = [GPUS[0] | {"architecture": architecture, "architectures": built_for}]
    findings = judge_devices(["one"], facts, {"one": "570.86"})
    assert (FAULT in levels(findings).values()) == (not runs)


def test_different_drivers_are_a_warning():
    findings = judge_devices(HOSTS, GPUS, DRIVERS | {"two": "550.54"})
    assert levels(findings)["driver"] == WARNING
    assert text(findings, "driver") == "nodes have different drivers: one 570.86, two 550.54"


def changed(path: list[str], value) -> dict:
    """Two nodes, the second of which differs there."""
    other = copy.deepcopy(NODE)
    inner = other
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return {"one": NODE, "two": other}


def test_equal_nodes_are_ok():
    nodes = changed(["free_memory"], 400e9)
    assert levels([*judge_code(nodes), judge_data(nodes)]) == {"code": OK, "versions": OK, "data": OK}
    assert judge_data(nodes).text == "1 file, alike on 2 nodes"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("train.max_steps", 7, "the commands differ in train.max_steps: 5 on one, 7 on two; "),
        ("train.max_steps", None, "the commands differ in train.max_steps: 5 on one, nothing on two; "),
        ("--from", "x", 'the commands differ in --from: nothing on one, "x" on two; '),
        ("--ds_config zero_optimization.stage", 2, "zero_optimization.stage: 1 on one, 2 on two; "),
    ],
)
def test_other_arguments_on_a_node(name, value, words):
    finding = judge_settings(changed(["settings", name], value))
    assert finding.level == FAULT and words in finding.text
    assert judge_settings(changed(["free_memory"], 1)).level == OK


@pytest.mark.parametrize("value", ["3", None])
def test_another_source_file_on_a_node(value):
    findings = judge_code(changed(["code", "megaslm/b.py"], value))
    assert levels(findings) == {"code": FAULT, "versions": OK}
    assert text(findings, "code").startswith("two and one differ in megaslm/b.py; ")


def test_many_other_source_files_are_counted():
    node = copy.deepcopy(NODE)
    node["code"] = {f"megaslm/{i}.py": "x" for i in range(9)}
    assert "and 8 more files" in text(judge_code({"one": NODE, "two": node}), "code")


def test_another_version_on_a_node():
    findings = judge_code(changed(["versions", "torch"], "2.12.0"))
    assert levels(findings) == {"code": OK, "versions": FAULT}
    assert text(findings, "versions").startswith("not alike: torch 2.12.0 on two and torch 2.13.0 on one")


def test_data_that_a_node_does_not_have_or_has_otherwise():
    finding = judge_data(changed(["data", "corpus/tokens"], "missing: no such file"))
    assert (finding.level, finding.text) == (FAULT, "two: corpus/tokens: no such file")
    finding = judge_data(changed(["data", "corpus/tokens"], "beef"))
    assert finding.level == FAULT
    assert finding.text.startswith("corpus/tokens has another content on two than on one")
    for path, value in (("corpus/tokens", None), ("more", "beef")):  # known to one of them alone
        assert judge_data(changed(["data", path], value)).level == FAULT


def test_the_disk():
    finding = judge_storage(12e9, 6, 70e9, 0, "runs/x")
    assert finding.level == FAULT
    for word in ("70.0 GB free in runs/x", "6 checkpoints of 12.0 GB", "72.0 GB more", "--run_dir"):
        assert word in finding.text
    assert judge_storage(12e9, 6, 73e9, 0, "runs/x").level == OK
    # What the run has saved before it was stopped is not needed again.
    assert judge_storage(12e9, 6, 70e9, 24e9, "runs/x").level == OK
    assert judge_storage(None, 6, 1e6, 0, "runs/x").level == WARNING
    uncounted = judge_storage(12e9, 6, 73e9, 0, "runs/x", ["checkpoint.keep_every"]).text
    assert uncounted.endswith("6 checkpoints of 12.0 GB planned (without those of checkpoint.keep_every)")


def test_host_memory_too_small_for_a_background_save_is_a_warning():
    nodes = changed(["free_memory"], 20e9)
    assert judge_memory(36e9, nodes).level == WARNING
    assert "20.0 GB free on two" in judge_memory(36e9, nodes).text
    assert judge_memory(12e9, nodes).level == OK
    assert judge_memory(None, nodes).level == OK


def test_a_slow_network_is_a_warning_never_a_fault():
    assert judge_bandwidth("within a node", 360e9, 370e9).level == OK
    assert judge_bandwidth("within a node", 90e9, 370e9).level == WARNING
    assert judge_bandwidth("across nodes", 1e9, None).level == OK


def test_what_is_expected_of_a_network():
    """An H200: 450 GB/s by NVLink, of which NCCL gets less; nothing is known of a CPU."""
    expected = expected_bandwidth("NVIDIA H200", 8)
    assert 300e9 < expected["within a node"] < 450e9
    assert expected["across nodes"] <= expected["within a node"]
    assert expected_bandwidth("NVIDIA H200", 1)["across nodes"] < expected["across nodes"]
    assert expected_bandwidth("a GPU of another maker", 8) == expected_bandwidth(None, 2) == {}
    assert expected_bandwidth("NVIDIA L40S", 8) == {}, "over PCIe"


def test_the_slowest_rank_is_judged_and_wrong_sums_are_a_fault():
    measured = [{"within a node": (speed, True), "across nodes": (speed, True)} for speed in (300e9, 90e9)]
    within, across = judge_network(["one", "two"], measured, {"within a node": 300e9, "across nodes": 300e9})
    assert within.level == across.level == WARNING and "90.00 GB/s" in within.text
    assert "of some 300 expected; " in within.text
    assert "of some 300 expected if each GPU has an NDR port; " in across.text
    measured[1] = {"across nodes": (300e9, False)}
    (finding,) = judge_network(["one", "two"], measured, {})
    assert finding.level == FAULT and "wrong sums on two" in finding.text


def test_the_bus_bandwidth_is_that_of_nccl_tests():
    """8 ranks, 1 GB in 5 ms: an algorithm's bandwidth of 200 GB/s, times 2 x 7/8."""
    assert bus_bandwidth(10**9, 0.005, 8) == pytest.approx(350e9)


def test_all_faults_are_told_at_once():
    raise_faults([Finding(OK, "a", "fine"), Finding(WARNING, "b", "slow")])
    with pytest.raises(UserError, match=r"^disk: full$"):
        raise_faults([Finding(WARNING, "b", "slow"), Finding(FAULT, "disk", "full")])
    with pytest.raises(UserError, match=r"^2 checks failed: code: old; disk: full$"):
        raise_faults([Finding(FAULT, "code", "old"), Finding(FAULT, "disk", "full")])
