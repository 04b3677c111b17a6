"""How the ranks of a run are started: the command and the environment, for one node, several nodes, and Slurm.

Nothing is started and nothing is looked at here. The same launcher starts the check of the ranks and the training.
"""

import base64
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megaslm.cluster.hostfile import Node
from megaslm.errors import UserError

DEVICES = ("cuda", "cpu")
PRETRAIN, CHECK = "launch/pretrain.py", "launch/check.py"
REMOTE, ELASTIC = "megaslm.cluster.remote", "megaslm.cluster.elastic"
# Names, separated by blanks: what launch/env_h200.sh has set, and what it found set already.
DEFAULTS, GIVEN = "MEGASLM_DEFAULTS", "MEGASLM_GIVEN"
# deepspeed's front end tells on every line what it is about to do.
DEEPSPEED = ("deepspeed", "--log_level", "error")
# Of a rank that fails the launcher says so in two lines more; in the checks the rank itself has said why.
SILENT = ("--log_level", "critical")


@dataclass(frozen=True)
class Launch:
    """One start of all ranks.

    nodes: the machines in the order of their ranks.
    port: where rank 0 listens.
    launcher: the command up to the script.
    environment: what is set on top of this process's own; an empty value: what is not passed on.
    here: which of the nodes this machine is; None: that is still to be found out.
    through_pdsh: the launcher starts the nodes by itself, through pdsh.
    silent: options of the launcher by which it leaves it to a rank to say why it failed.
    """

    nodes: tuple[Node, ...]
    device: str
    port: int
    launcher: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    here: int | None = None
    through_pdsh: bool = False
    silent: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return sum(node.slots for node in self.nodes)

    def command(self, script: str, arguments: Sequence[str], options: Sequence[str] = ()) -> list[str]:
        """The command that runs `script` on every rank. options: of the launcher, beside its own."""
        launcher = [*self.launcher, *options]
        if not self.through_pdsh:
            return [*launcher, script, *arguments]
        # DeepSpeed passes few variables on to other nodes, and words with a blank to a shell there.
        return [*launcher, "--module", "--no_local_rank", REMOTE, encode(self.environment, [script, *arguments])]

    def check_command(self, arguments: Sequence[str], timeout: float) -> list[str]:
        """The command that checks the ranks of a run with these arguments of launch/pretrain.py."""
        hosts = json.dumps({node.host: node.slots for node in self.nodes}, separators=(",", ":"))
        options = ["--device", self.device, "--hosts", hosts, "--timeout", f"{timeout:g}", "--"]
        return self.command(CHECK, [*options, *arguments], self.silent)


def encode(environment: Mapping[str, str], arguments: Sequence[str]) -> str:
    """For remote.py. arguments: of Python, the script first; environment: on top of the node's own, an empty value
    unsets."""
    return base64.urlsafe_b64encode(json.dumps([dict(environment), list(arguments)]).encode()).decode()


def hosts_of_ranks(hosts: str) -> list[str]:
    """What `check_command` gives as --hosts: '{"a":2,"b":2}' -> [a, a, b, b]."""
    return [host for host, slots in json.loads(hosts).items() for _ in range(slots)]


def decided_environment(device: str) -> dict[str, str]:
    """What launch/env_h200.sh is about, of this process's environment: for GPU ranks all of it, for CPU ranks (and
    that they are some) what the user has set himself. Its defaults for GPUs end here."""
    names = os.environ.pop(GIVEN, "").split()
    defaults = os.environ.pop(DEFAULTS, "").split()
    if device == "cuda":
        return {name: os.environ[name] for name in [*names, *defaults]}
    for name in defaults:
        del os.environ[name]
    return {name: os.environ[name] for name in names} | {"DS_ACCELERATOR": "cpu"}


def launch_on_node(ranks: int, device: str, port: int, visible: str | None, environment: dict[str, str]) -> Launch:
    """`ranks` on this machine.

    Args:
        visible: CUDA_VISIBLE_DEVICES, of which the first are taken. DeepSpeed ignores it where it is given a number.

    Raises UserError: `visible` is not a list of as many numbers.
    """
    count = ("--num_gpus" if device == "cuda" else "--num_accelerators", str(ranks))
    if device == "cuda" and visible:
        devices = [name.strip() for name in visible.split(",")][:ranks]
        if not all(name.isdigit() for name in devices):
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={visible}: deepspeed takes the numbers of GPUs alone; give those that "
                "nvidia-smi -L has for these names (a part of a GPU, MIG, has none: use one rank, without a launcher)"
            )
        count = ("--include", "localhost:" + ",".join(devices))
        environment = environment | {"CUDA_VISIBLE_DEVICES": ""}
    # No hostfile: deepspeed would take /job/hostfile where there is one.
    launcher = (*DEEPSPEED, "--hostfile", os.devnull, *count, "--master_port", str(port))
    return Launch((Node("localhost", ranks),), device, port, launcher, environment, here=0, silent=SILENT)


def launch_on_hosts(
    hostfile: str,
    nodes: Sequence[Node],
    device: str,
    address: str,
    port: int,
    node_rank: int | None,
    visible: str | None,
    environment: dict[str, str],
) -> Launch:
    """The nodes of a hostfile.

    Args:
        address: of the first node.
        node_rank: this machine's place in it, where the same command is given on every node; None: this machine
            starts all of them, through ssh.
        visible: CUDA_VISIBLE_DEVICES here.

    Raises UserError: there is no such node; `visible` asks for other GPUs than the ranks get.
    """
    if node_rank is not None and not 0 <= node_rank < len(nodes):
        raise UserError(f"--node_rank {node_rank}: {hostfile} has {len(nodes)} nodes, from 0 to {len(nodes) - 1}")
    slots = nodes[0].slots
    if device == "cuda" and visible and visible.replace(" ", "").split(",")[:slots] != list(map(str, range(slots))):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} would be ignored: deepspeed gives the ranks of a node its GPUs from 0 to "
            f"slots - 1. Unset it; the slots in {hostfile} say how many are used, and for others start "
            "launch/pretrain.py by `deepspeed --hostfile FILE --include HOST:4,5,6,7@...`"
        )
    where = ("--hostfile", hostfile, "--master_addr", address, "--master_port", str(port))
    how = ("--launcher", "pdsh", "--no_ssh_check") if node_rank is None else ("--no_ssh", "--node_rank", str(node_rank))
    several = node_rank is None and len(nodes) > 1  # on a single one it starts the ranks itself
    launcher = (*DEEPSPEED, *where, *how)
    return Launch(tuple(nodes), device, port, launcher, environment, node_rank, several, SILENT)


def launch_in_slurm(hosts: Sequence[str], ranks: int, device: str, port: int, environment: dict[str, str]) -> Launch:
    """A task of srun on every node of the allocation, which is torchrun (by elastic.py), which starts `ranks`.

    The rank of a node is that of its task: rank 0 is on the first host. A task that fails ends the step.
    """
    # --cpu-bind=none: else the one task of a node, with all its ranks, may be bound to a single core.
    srun = ("srun", f"--nodes={len(hosts)}", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1")
    torchrun = (sys.executable, "-m", ELASTIC)
    size = ("--nnodes", str(len(hosts)), "--nproc_per_node", str(ranks))
    address = ("--master_addr", hosts[0], "--master_port", str(port))
    # Seconds that torchrun, told to end, leaves the ranks for their last checkpoint; before torch 2.12 (pytorch pull
    # request 172596) always 30, of which elastic.py warns.
    patience = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    environment = environment | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": patience}
    nodes = tuple(Node(host, ranks) for host in hosts)
    return Launch(nodes, device, port, (*srun, *torchrun, *size, *address), environment, here=0)


def describe(environment: dict[str, str]) -> list[str]:
    """Lines for a shell that sets it."""
    return [f"export {name}={shlex.quote(value)}" if value else f"unset {name}" for name, value in environment.items()]
