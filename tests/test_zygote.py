"""fork_ranks, on which the tests of several ranks stand: what a rank is, and how one that fails or hangs is told."""

import json
import time

import pytest


@pytest.fixture
def script(tmp_path):
    """script(text) -> path of a file with it."""

    def write(text: str):
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


def test_a_rank_is_what_a_launcher_would_have_started(fork_ranks, script):
    told = script(
        "import json, os, sys\n"
        "from pathlib import Path\n"
        "keys = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR')\n"
        "print(json.dumps([__name__, sys.argv[1:], sys.path[0], *map(os.environ.get, keys)]))\n"
        "print('of', os.environ.get('RANK'), file=sys.stderr)\n"
    )
    folder = str(told.parent)
    finished = fork_ranks(told, [folder, 3], 2)
    common = ["__main__", [folder, "3"], folder]
    expected = [[*common, str(rank), str(rank), "2", "2", "127.0.0.1"] for rank in range(2)]
    assert finished.code == 0 and finished.err == "of 0\nof 1\n"
    assert [json.loads(line) for line in finished.out.splitlines()] == expected
    alone = fork_ranks(told, [folder, 3], None)
    assert json.loads(alone.out) == [*common, *[None] * 5]


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [("raise ValueError('no luck')", 1, "no luck"), ("sys.exit(7)", 7, ""), ("os.kill(os.getpid(), 9)", -9, "")],
)
def test_a_rank_that_fails_ends_the_others(fork_ranks, script, failure, code, words):
    start = time.monotonic()
    one_fails = f"import os, sys, time\nif os.environ['RANK'] == '1': {failure}\ntime.sleep(100)\n"
    finished = fork_ranks(script(one_fails), [], 2)
    assert finished.code == code and words in finished.err
    assert time.monotonic() - start < 60


def test_ranks_that_hang_say_where(fork_ranks, script):
    finished = fork_ranks(script("import time\ndef wait():\n    time.sleep(100)\nwait()\n"), [], 2, timeout=1)
    assert finished.code == 1 and "line 3 in wait" in finished.err
