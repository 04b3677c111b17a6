"""The hostfile of DeepSpeed and MPI: a line `HOST slots=N` for each node, the first of which is the master.

Read by us first: DeepSpeed's own parser gives a traceback without a line number, and takes what it should not.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from megaslm.errors import UserError

# Names and IPv4 addresses: DeepSpeed, pdsh and MPI each give other characters meanings of their own.
ENTRY = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s+slots=(\d+)")


@dataclass(frozen=True)
class Node:
    """One machine. slots: its ranks, one for each GPU that is used."""

    host: str
    slots: int


def read_hostfile(path: str | Path) -> list[Node]:
    """The nodes of a hostfile, in its order; `#` begins a comment.

    Raises:
        UserError: it can't be read, or has no node; with its line: an entry of another form, a host that stands there
            twice, no slots, or others than the first node's.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(
            f"cannot read the hostfile {path}: {reason}; give one with a line `HOST slots=N` a node"
        ) from error
    nodes: list[Node] = []
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        entry = ENTRY.fullmatch(text)
        if entry is None:
            raise UserError(f"{path}:{number}: {text!r} is not `HOST slots=N`, with a name or an IPv4 address")
        node = Node(entry[1], int(entry[2]))
        if node.host in line_of:
            raise UserError(
                f"{path}:{number}: {node.host} stands in line {line_of[node.host]} already; give it all its slots there"
            )
        if node.slots == 0:
            raise UserError(f"{path}:{number}: {node.host} has no slots; leave it out, or give the number of its GPUs")
        if nodes and node.slots != nodes[0].slots:
            raise UserError(
                f"{path}:{number}: {node.host} has {node.slots} slots and {nodes[0].host} has {nodes[0].slots}; "
                "use as many GPUs on every node"
            )
        line_of[node.host] = number
        nodes.append(node)
    if not nodes:
        raise UserError(f"the hostfile {path} names no node; it has a line `HOST slots=N` for each")
    return nodes
