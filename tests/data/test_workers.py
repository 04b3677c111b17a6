"""Worker processes: how they end, and that nothing is left of them; any number of faults; how many cores there are."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest

from megaslm.data import Assembly, BuildOptions, TextSource, TokenFile, preprocess, workers
from megaslm.data.sources import LISTED_FAULTS
from megaslm.data.unit_encoder import UnitRules
from megaslm.data.workers import WorkerProcesses
from megaslm.errors import UserError

RULES = UnitRules(eod_id=0, dtype=np.dtype("<u2"))


@pytest.fixture
def source(tmp_path):
    """One unit."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(3)))
    return TextSource([path])


class Waits:
    """Stands for rules; a worker that loads it does no more than wait."""

    def __reduce__(self):
        return time.sleep, (1000,)


class Ends:
    """The same, and the worker ends with this exit code."""

    def __reduce__(self):
        return os._exit, (9,)


def test_killed_workers_and_their_files(source, bpe, tmp_path):
    with WorkerProcesses(1, source, bpe, RULES) as processes:
        results = processes.encode(iter([*source.units()] * 4), "huggingface", tmp_path)
        _, facts, _ = next(results)
        assert facts.documents == 3
        worker = processes._workers[0]._process
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(worker.pid, number)
        next(results)  # they are for the process that waits
        worker.kill()
        with pytest.raises(UserError, match="was killed, most likely because memory ran out: .*fewer --workers"):
            list(results)
    assert not worker.is_alive() and not list(tmp_path.glob("*.unit"))


def test_a_worker_that_does_not_start(source, bpe, tmp_path):
    with WorkerProcesses(1, source, bpe, Ends()) as processes:
        with pytest.raises(UserError, match=r"ended before it could start \(exit code 9\).*guard `if __name__ == "):
            list(processes.encode(source.units(), "huggingface", tmp_path))


def test_interrupts_while_workers_are_stopped(source, bpe, tmp_path, monkeypatch):
    """A second one comes once they are gone."""
    right = workers._Worker.kill

    def interrupted(self):
        signal.raise_signal(signal.SIGINT)
        right(self)

    monkeypatch.setattr(workers._Worker, "kill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with WorkerProcesses(2, source, bpe, Waits()) as processes:
            started = time.monotonic()
            threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
            list(processes.encode(source.units(), "huggingface", tmp_path))
    assert time.monotonic() - started < 5
    assert not any(worker._process.is_alive() for worker in processes._workers)
    assert not any(thread.is_alive() for thread in processes._threads._threads)


def test_more_faults_than_are_listed(bpe, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n' + "1\n" * (LISTED_FAULTS + 50) + '{"text": ""}\n')
    source = TextSource([path])
    (unit,) = source.units()
    assert len(source.read(unit[0]).faults) == LISTED_FAULTS + 1
    assert source.read(unit[0], stop_at_fault=True).num_faults == 1
    with pytest.raises(UserError, match="x.jsonl:2: the record is a JSON int"):
        preprocess(source, bpe, tmp_path / "x", workers=0)
    manifest = preprocess(source, bpe, tmp_path / "x", workers=0, on_error="skip")[str(tmp_path / "x")]
    assert manifest["skipped"] == {"records": LISTED_FAULTS + 51, "empty": 1}
    lines = (tmp_path / "x.skipped.jsonl").read_text().splitlines()
    assert len(lines) == LISTED_FAULTS + 1
    assert json.loads(lines[-1])["reason"] == "51 more of the records 1 to 10,052, which are not listed"


def test_arrays_with_and_without_the_end_are_duplicates(bpe, tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([5, 6, bpe.eod_id]), b=np.array([5, 6], np.uint16), c=np.array([6]))
    options = BuildOptions(assembly=Assembly(dedup=True))
    preprocess(TextSource([tmp_path / "x.npz"]), bpe, tmp_path / "x", options, workers=0)
    assert TokenFile(tmp_path / "x").num_documents == 2
