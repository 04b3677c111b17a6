"""What one machine finds of itself, and the processes it runs a check as."""

import os
import signal
import socket
import subprocess
import time

import pytest

from megaslm.cluster import local
from megaslm.cluster.local import is_here, run_check


def own_address() -> str:
    """Of the interface that leads outside, 127.0.0.1 where there is none. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def test_this_machine_by_its_names_and_addresses():
    for host in ("localhost", "127.0.0.1", socket.gethostname(), own_address()):
        assert is_here(host), host
    for host in ("192.0.2.1", "nowhere.invalid"):
        assert not is_here(host), host


@pytest.mark.parametrize(("trap", "seconds"), [("trap 'exit 0' TERM", 0), ("trap '' TERM", 0.5)])
def test_a_check_that_is_interrupted_is_told_and_then_killed(monkeypatch, tmp_path, trap, seconds):
    """With what it has started, whoever of them listens."""
    monkeypatch.setattr(local, "GRACE_SECONDS", 0.5)
    script = f"{trap}; echo $$ >'{tmp_path}/group'; kill -TERM $PPID; while :; do sleep 0.05; done"
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_check(["bash", "-c", script], os.environ)
    assert signal.signal(signal.SIGTERM, before) == signal.default_int_handler
    assert seconds <= time.monotonic() - started < seconds + 5
    group = (tmp_path / "group").read_text().strip()
    running = subprocess.run(["ps", "-o", "stat=", "-A", "-o", "pgid="], capture_output=True, text=True).stdout
    assert [line for line in running.splitlines() if line.split()[1] == group and line[0] != "Z"] == []
