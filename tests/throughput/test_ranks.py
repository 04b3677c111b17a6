"""Ranks that a command starts by itself: what comes back from them."""

import json
from pathlib import Path


def test_what_comes_back_from_ranks(fork_ranks):
    """The first rank's result; what a user can mend, and full devices, as they were raised on any rank, at once; other
    failures with their traceback."""
    finished = fork_ranks(Path(__file__).with_name("ranks_worker.py"), [], None)
    assert finished.code == 0, finished.err
    found = json.loads(finished.out.splitlines()[-1])
    assert found["result"] == [5, 5, 6]
    mistake, *memory, fault = found["raised"]
    assert mistake[:2] == ["UserError", "no data"]
    texts = ["no memory", "CUDA error: out of memory", "it was killed"]
    assert [one[:2] for one in memory] == [["OutOfMemoryError", text] for text in texts]
    assert fault[0] == "ProcessRaisedException" and "fail_on_rank_1" in fault[1] and "a fault of ours" in fault[1]
    assert all(seconds < 30 for *_, seconds in found["raised"])
