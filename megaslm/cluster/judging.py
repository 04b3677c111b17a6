"""From what the ranks said of themselves to findings: what is as it should be, what is not, and what to do about it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaslm.errors import UserError

OK, WARNING, FAULT = "ok", "warning", "fault"
BUSY_BYTES = 2 * 2**30
"""Of a GPU's memory, what may be in use before the run: this check's own context and a little more."""
BUSY_SHARE = 0.1
"""Of a GPU's memory, what may be in use before the run without spoiling it: a display or a monitor's context."""
MEMORY_TOLERANCE = 0.03
"""Share by which the memory of equal GPUs differs: rows that were retired, what the driver keeps for itself."""
NAMED = 3  # files, ranks or nodes that a message names


@dataclass(frozen=True)
class Finding:
    """One line. level: OK, WARNING (the run may go on) or FAULT (it would fail, or train something else)."""

    level: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"  {self.level:<8} {self.name:<14} {self.text}"


def raise_faults(findings: Sequence[Finding]) -> None:
    """Raise one UserError for all faults."""
    faults = [f"{finding.name}: {finding.text}" for finding in findings if finding.level == FAULT]
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        raise UserError(f"{len(faults)} checks failed: " + "; ".join(faults))


def judge_devices(hosts: Sequence[str], facts: Sequence[Mapping[str, Any]], drivers: Mapping[str, str | None]):
    """Findings on the GPUs of all ranks. hosts, facts: by rank. drivers: the driver's version by host."""
    faulty = [(host, fact["fault"]) for host, fact in zip(hosts, facts, strict=True) if "fault" in fact]
    if faulty:
        return [Finding(FAULT, "GPUs", _first(f"{host}: {text}" for host, text in faulty))]
    owners: dict[str, int] = {}
    for rank, fact in enumerate(facts):
        other = owners.setdefault(fact["uuid"], rank)
        if other != rank:
            text = f"rank {other} on {hosts[other]} and rank {rank} on {hosts[rank]} have the same one"
            return [Finding(FAULT, "GPUs", f"{text}: name every machine once, and give each rank a GPU")]
    findings = [_judge_equal_gpus(hosts, facts)]
    findings.append(
        _alike("CUDA", hosts, [(fact["architecture"], fact["cuda"]) for fact in facts], "{0}, CUDA {1} of torch".format)
    )
    unbuilt = sorted({fact["architecture"] for fact in facts if not _runs_on(fact)})
    if unbuilt:
        text = f"torch is built for {', '.join(facts[0]['architectures'])}, not for {', '.join(unbuilt)}"
        findings.append(Finding(FAULT, "CUDA", f"{text}; install another build of it"))
    if len(set(drivers.values())) > 1:
        each = ", ".join(f"{host} {version}" for host, version in drivers.items())
        findings.append(Finding(WARNING, "driver", f"nodes have different drivers: {each}"))
    findings.append(_judge_gpu_memory(hosts, facts))
    return findings


def _judge_equal_gpus(hosts: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> Finding:
    finding = _alike("GPUs", hosts, [(fact["name"],) for fact in facts], str)
    if finding.level != OK:
        return finding
    least, most = (choose(range(len(facts)), key=lambda rank: facts[rank]["bytes"]) for choose in (min, max))
    sizes = [_gib(facts[rank]["bytes"]) for rank in (least, most)]
    if facts[least]["bytes"] < (1 - MEMORY_TOLERANCE) * facts[most]["bytes"]:
        text = f"not alike: {sizes[0]} on {hosts[least]} and {sizes[1]} on {hosts[most]}; use nodes that are"
        return Finding(FAULT, "GPUs", text)
    return Finding(OK, "GPUs", f"{len(facts)} x {facts[0]['name']}, {sizes[0]}")


def _judge_gpu_memory(hosts: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> Finding:
    used = [(fact["used"], BUSY_SHARE * fact["bytes"]) for fact in facts]
    level = FAULT if any(used > max(limit, BUSY_BYTES) for used, limit in used) else WARNING
    busy = [
        f"{_gib(fact['used'])} of GPU {fact['index']} on {host} are in use"
        for host, fact in zip(hosts, facts, strict=True)
        if fact["used"] > BUSY_BYTES
    ]
    if not busy:
        return Finding(OK, "GPU memory", "free")
    text = f"{_first(busy)}: nvidia-smi names the process that has them"
    return Finding(level, "GPU memory", f"{text}; end it, or start with --skip_checks" if level == FAULT else text)


def _runs_on(fact: Mapping[str, Any]) -> bool:
    """Whether torch has machine code of the same major architecture, or intermediate code that can be compiled."""
    major = fact["architecture"][:-1]
    return any(name[:-1] == major or name.startswith("compute_") for name in fact["architectures"])


def judge_settings(nodes: Mapping[str, Mapping[str, Any]]) -> Finding:
    """nodes: facts by host, that of rank 0 first."""
    (first, reference), *others = ((host, facts["settings"]) for host, facts in nodes.items())
    for host, settings in others:
        names = [*reference, *(name for name in settings if name not in reference)]
        for name in names:
            mine, theirs = (json.dumps(one[name]) if name in one else "nothing" for one in (reference, settings))
            if mine != theirs:
                text = f"the commands differ in {name}: {mine} on {first}, {theirs} on {host}"
                return Finding(FAULT, "settings", f"{text}; start all nodes with the same arguments and configs")
    return Finding(OK, "settings", f"{len(reference)} values{_on_all(nodes)}")


def judge_code(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """nodes: facts by host, that of rank 0 first."""
    (first, reference), *others = nodes.items()
    findings = []
    for host, facts in others:
        paths = reference["code"].keys() | facts["code"].keys()
        changed = sorted(path for path in paths if reference["code"].get(path) != facts["code"].get(path))
        if changed:
            text = f"{host} and {first} differ in {_first(changed, ' and {} more files')}"
            findings.append(Finding(FAULT, "code", f"{text}; bring both to the same commit"))
            break
    else:
        findings.append(Finding(OK, "code", f"{len(reference['code'])} source files{_on_all(nodes)}"))
    versions = _alike(
        "versions",
        list(nodes),
        [tuple(f"{name} {version}" for name, version in facts["versions"].items()) for facts in nodes.values()],
        lambda *versions: ", ".join(versions),
    )
    return [*findings, versions]


def judge_data(nodes: Mapping[str, Mapping[str, Any]]) -> Finding:
    """nodes: facts by host, that of rank 0 first; of the same settings, and so with the same files."""
    (first, reference), *others = nodes.items()
    for host, facts in nodes.items():
        for path, content in facts["data"].items():
            if content.startswith("missing: "):
                return Finding(FAULT, "data", f"{host}: {path}: {content.removeprefix('missing: ')}")
    for host, facts in others:
        for path in facts["data"].keys() | reference["data"].keys():
            if reference["data"].get(path) != facts["data"].get(path):
                return Finding(FAULT, "data", f"{path} has another content on {host} than on {first}; copy it again")
    count = len(reference["data"])
    return Finding(
        OK, "data", f"{count} file{'s' if count != 1 else ''}{_on_all(nodes)}" if count else "built at start"
    )


def judge_storage(
    checkpoint: int | None, planned: int, free: int, taken: int, where: str, uncounted: Sequence[str] = ()
) -> Finding:
    """checkpoint: bytes of one. free, taken: bytes where the run folder is, and of the checkpoints it has already.
    uncounted: settings that keep more than are planned."""
    if checkpoint is None:
        return Finding(WARNING, "disk", f"{_gb(free)} free; the checkpoints' size is known once there is a vocabulary")
    needed = max(planned * checkpoint - taken, 0)
    plan = f"{planned} checkpoint{'s' if planned > 1 else ''} of {_gb(checkpoint)} planned"
    if uncounted:
        plan += f" (without those of {' and '.join(uncounted)})"
    if needed > free:
        text = f"{_gb(free)} free in {where}, and {plan}, for which {_gb(needed)} more are needed"
        return Finding(FAULT, "disk", f"{text}; make room, lower checkpoint.keep_last, or choose another --run_dir")
    return Finding(OK, "disk", f"{_gb(free)} free, {plan}")


def judge_memory(copy: int | None, nodes: Mapping[str, Mapping[str, Any]]) -> Finding:
    """Without room for it training waits for the saves instead.

    copy: bytes of a background save's copy on a node; None where nothing, or nothing known, is copied.
    """
    host, facts = min(nodes.items(), key=lambda item: item[1]["free_memory"])
    free = facts["free_memory"]
    if copy is not None and copy > free:
        text = f"{_gb(free)} free on {host}, and the copy for a background save takes {_gb(copy)}"
        return Finding(WARNING, "host memory", f"{text}: training will wait for its saves")
    return Finding(OK, "host memory", f"{_gb(free)} free{f' on {host}, the least' if len(nodes) > 1 else ''}")


def judge_bandwidth(name: str, measured: float, expected: float | None, condition: str = "") -> Finding:
    """measured, expected: bus bandwidth in bytes/s (of nccl-tests); expected None: not known for this hardware.
    condition: under which so much is expected, in words."""
    text = f"{measured / 1e9:,.2f} GB/s of bus bandwidth {name}"
    if expected is None:
        return Finding(OK, "all-reduce", text)
    text += f", of some {expected / 1e9:,.0f} expected" + (f" {condition}" if condition else "")
    if measured < WEAK * expected:
        return Finding(WARNING, "all-reduce", f"{text}; NCCL_DEBUG=INFO shows which links NCCL uses")
    return Finding(OK, "all-reduce", text)


WEAK = 0.7
"""Share of the expected bandwidth below which a link or a setting is probably at fault."""


def _alike(name: str, hosts: Sequence[str], values: Sequence[tuple[str, ...]], text) -> Finding:
    """Whether all `values` (of ranks or of nodes) are the first's."""
    for host, value in zip(hosts, values, strict=True):
        if value != values[0]:
            differ = [(theirs, mine) for theirs, mine in zip(value, values[0], strict=True) if theirs != mine]
            what = ", ".join(f"{theirs} on {host} and {mine} on {hosts[0]}" for theirs, mine in differ)
            return Finding(FAULT, name, f"not alike: {what}; use nodes that are")
    return Finding(OK, name, text(*values[0]))


def _first(items, more: str = "; and {} more") -> str:
    """The first few of `items`, and how many more there are."""
    items = list(items)
    rest = len(items) - NAMED
    return ("; " if more.startswith(";") else ", ").join(items[:NAMED]) + (more.format(rest) if rest > 0 else "")


def _on_all(nodes: Mapping) -> str:
    return f", alike on {len(nodes)} nodes" if len(nodes) > 1 else ""


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"


def _gb(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
