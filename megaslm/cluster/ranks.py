"""What is checked by the ranks themselves, in the layout of the training: all of them meet, compare, and all-reduce."""

import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megaslm.cluster.facts import device_facts, node_facts
from megaslm.cluster.judging import (
    FAULT,
    OK,
    Finding,
    judge_code,
    judge_data,
    judge_devices,
    judge_memory,
    judge_settings,
    judge_storage,
    raise_faults,
)
from megaslm.cluster.meeting import Meeting
from megaslm.cluster.network import check_network
from megaslm.cluster.storage import existing_parent, free_for_run, model_of, uncounted_settings
from megaslm.config import RunConfig

SEEN_WITHIN_SECONDS = 10.0
"""A network file system may show a new file to other machines a little later."""


def check_ranks(
    run: RunConfig,
    engine_file: dict,
    options: dict[str, Any],
    device: str,
    hosts: Sequence[str],
    timeout: float,
    say: Callable[[str], None],
) -> None:
    """Check commands, machines, data, code, storage and network of all ranks; rank 0 says one line for each.
    Collective.

    Args:
        options: those of launch/pretrain.py beside the configs, by name; "--run_dir" is the folder of the run.
        device: "cuda" or "cpu".
        hosts: machine of every rank.
        timeout: seconds for any step of it.

    Raises UserError on all ranks: faults, a rank that does not come. A rank that hangs later ends all of them.
    """
    meeting = Meeting(hosts, timeout)
    run_dir = Path(options["--run_dir"])
    local_rank = int(os.environ["LOCAL_RANK"])
    # The first rank of a machine speaks for it.
    of_node = hosts.index(hosts[meeting.rank]) == meeting.rank
    with meeting.deadline("looking at the machine", timeout):
        facts = {
            "node": node_facts(run, engine_file, options) if of_node else None,
            "device": device_facts(device, local_rank),
        }
    of_ranks = meeting.to_first("facts", facts)
    shared = _check_shared(meeting, run_dir, of_node)
    findings = [] if meeting.rank else _judge(run, run_dir, device, hosts, of_ranks, shared)
    _tell(meeting, "findings", say, findings)
    if meeting.world_size > 1:
        with meeting.deadline("the all-reduce", timeout):
            findings = check_network(
                meeting, device, local_rank, of_ranks[0]["device"].get("name") if of_ranks else None
            )
        _tell(meeting, "network", say, findings)
    meeting.leave()


def _tell(meeting: Meeting, name: str, say: Callable[[str], None], findings: Sequence[Finding]) -> None:
    """Rank 0's findings on all ranks: it says them, and all raise the faults among them."""
    told = meeting.from_first(name, [[finding.level, finding.name, finding.text] for finding in findings])
    if meeting.rank == 0:
        for finding in findings:
            say(str(finding))
    raise_faults([Finding(*one) for one in told])


def _judge(
    run: RunConfig, run_dir: Path, device: str, hosts: Sequence[str], of_ranks: Sequence[dict], shared: Finding
) -> list[Finding]:
    nodes = {host: facts["node"] for host, facts in zip(hosts, of_ranks, strict=True) if facts["node"] is not None}
    drivers = {host: facts["driver"] for host, facts in nodes.items()}
    findings = []
    if device == "cuda":
        findings += judge_devices(hosts, [facts["device"] for facts in of_ranks], drivers)
    settings = judge_settings(nodes)
    findings += [settings, *judge_code(nodes)]
    if settings.level == FAULT:  # which of them is meant, nobody knows
        return findings
    data = judge_data(nodes)
    findings += [data, shared]
    if FAULT not in (data.level, shared.level):  # the vocabulary is in the data
        findings += _judge_room(run, run_dir, hosts, nodes)
    return findings


def _judge_room(run: RunConfig, run_dir: Path, hosts: Sequence[str], nodes: dict[str, dict]) -> list[Finding]:
    """On the disk and in the memory of the hosts, for the checkpoints."""
    from megaslm.planning import checkpoint_bytes, checkpoints_kept, host_copy_bytes

    model = model_of(run)
    size = copy = None
    if model is not None:
        size, copy = checkpoint_bytes(model), host_copy_bytes(model, hosts.count(hosts[0]), len(hosts))
    free, taken = free_for_run(run_dir)
    planned = checkpoints_kept(run, run.step_limit)
    disk = judge_storage(size, planned, free, taken, str(run_dir), uncounted_settings(run))
    return [disk, judge_memory(copy if run.checkpoint.background else None, nodes)]


def _check_shared(meeting: Meeting, run_dir: Path, of_node: bool) -> Finding | None:
    """Whether all nodes see what rank 0 writes where the run folder is or will be: a finding on rank 0. Collective."""
    path, fault = None, None
    if meeting.rank == 0:
        path = existing_parent(run_dir) / f".check_{uuid.uuid4().hex}"
        try:
            path.touch()
        except NotADirectoryError:
            fault = f"{path.parent} is a file; choose another --run_dir"
        except OSError as error:
            fault = f"{path.parent} can't be written: {error.strerror}; choose another --run_dir"
    try:
        probe = meeting.from_first("probe", None if path is None or fault else str(path))
        answers = meeting.to_first("probe seen", probe is None or not of_node or _appears(Path(probe)))
    finally:
        if path is not None and not fault:
            path.unlink(missing_ok=True)
    if meeting.rank:
        return None
    if fault:
        return Finding(FAULT, "run folder", fault)
    blind = [meeting.hosts[rank] for rank, sees in enumerate(answers) if not sees]
    if blind:
        text = f"{path.parent} on {meeting.hosts[0]} is not what {', '.join(blind)} sees"
        return Finding(FAULT, "run folder", f"{text}; choose a --run_dir on a file system that all nodes share")
    nodes = len(set(meeting.hosts))
    return Finding(OK, "run folder", f"{run_dir}" + (f", which {nodes} nodes share" if nodes > 1 else ""))


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
