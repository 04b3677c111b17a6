"""Where ranks that share nothing yet meet: small messages through the store of rank 0, and who does not come.

`init_process_group` waits for all ranks and, where one is missing, cannot say which. Here rank 0 knows whom it waits
for. Needs nothing of the GPUs, so that they can be looked at first.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from megaslm.commands import SECONDS_FOR_THE_MESSAGE
from megaslm.errors import USER_ERROR_EXIT_CODE, UserError, first_line

POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0
"""How much longer than rank 0 the others wait for what it says: it has waited for the last of them by then."""


class Meeting:
    """This rank among all of them, as RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say.

    hosts: name of the machine of every rank, for messages.
    timeout: seconds that rank 0 waits for the slowest rank, from the start and at every message.
    """

    def __init__(self, hosts: Sequence[str], timeout: float):
        from torch.distributed import TCPStore

        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.hosts, self.timeout = hosts, timeout
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun's agent on the first node has a store at this port already, and its ranks use that.
        is_master = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            self.store = TCPStore(
                address,
                port,
                is_master=is_master,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=timedelta(seconds=timeout),
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"port {port} can't be opened on {hosts[0]}: take another --master_port ({first_line(error)})"
                if is_master
                else f"rank {self.rank} on {hosts[self.rank]} can't reach rank 0 at {address}:{port} within "
                f"{timeout:.0f} s: is {hosts[0]} started, is its name resolved here, is the port open in its firewall? "
                f"({first_line(error)})"
            ) from error

    def to_first(self, name: str, value: Any) -> list[Any] | None:
        """On rank 0 every rank's `value` (anything that JSON can hold), in the order of the ranks; None elsewhere.

        Raises UserError on rank 0: ranks that said nothing in time, with their machines.
        """
        self.store.set(f"{name}/{self.rank}", json.dumps(value))
        if self.rank:
            return None
        deadline = time.monotonic() + self.timeout
        missing = list(range(self.world_size))
        while missing:
            missing = [rank for rank in missing if not self.store.check([f"{name}/{rank}"])]
            if missing and time.monotonic() > deadline:
                raise UserError(f"{self._named(missing)} did not answer within {self.timeout:.0f} s ({name})")
            time.sleep(POLL_SECONDS if missing else 0)
        return [json.loads(self.store.get(f"{name}/{rank}")) for rank in range(self.world_size)]

    def from_first(self, name: str, value: Any = None) -> Any:
        """Rank 0's `value` on every rank.

        Raises UserError: rank 0 said nothing in time, or is gone.
        """
        if self.rank == 0:
            self.store.set(name, json.dumps(value))
            return value
        try:
            self.store.wait([name], timedelta(seconds=self.timeout + GRACE_SECONDS))
            return json.loads(self.store.get(name))
        except RuntimeError as error:
            raise UserError(
                f"rank 0 on {self.hosts[0]} is gone or hangs: its own message says why ({first_line(error)})"
            ) from error

    def leave(self) -> None:
        """Rank 0, whose store it is, stays until the others have left, or for a moment if one can't."""
        self.store.set(f"left/{self.rank}", "")
        deadline = time.monotonic() + GRACE_SECONDS
        if self.rank == 0:
            while time.monotonic() < deadline:
                if all(self.store.check([f"left/{rank}"]) for rank in range(self.world_size)):
                    return
                time.sleep(POLL_SECONDS)

    @contextmanager
    def deadline(self, name: str, seconds: float) -> Iterator[None]:
        """End this process, with a message that names who hangs, where the `with` takes longer than `seconds`: in a
        collective that a driver or a network does not finish, nothing else can."""
        self.store.set(f"entered {name}/{self.rank}", "")
        timer = threading.Timer(seconds, self._end, (name, seconds))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end(self, name: str, seconds: float) -> None:
        absent = [rank for rank in range(self.world_size) if not self._has(f"entered {name}/{rank}")]
        who = f"{self._named(absent)} never began it" if absent else "all ranks began it: the network is at fault"
        if os.environ.get("LOCAL_RANK", "0") == "0":
            message = f"error: {name} did not end within {seconds:.0f} s on {self.hosts[self.rank]}; {who}; "
            os.write(2, (message + "NCCL_DEBUG=INFO shows what NCCL waits for\n").encode())
        else:
            time.sleep(SECONDS_FOR_THE_MESSAGE)  # the launcher ends all ranks when the first is gone
        os._exit(USER_ERROR_EXIT_CODE)

    def _has(self, key: str) -> bool:
        try:
            return self.store.check([key])
        except RuntimeError:
            return False  # rank 0 is gone

    def _named(self, ranks: Sequence[int]) -> str:
        names = ", ".join(f"{rank} ({self.hosts[rank]})" for rank in ranks)
        return f"rank{'s' if len(ranks) > 1 else ''} {names}"
