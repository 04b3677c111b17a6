"""A packed token file, as tools/preprocess_data.py makes them, and a run in this process that is told to stop."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megaslm.data import TokenFile, TokenFileWriter, load_tokenizer
from megaslm.parallel import ALONE, Ranks
from megaslm.training import TrainingEngine

sys.path.insert(0, str(Path(__file__).parent))  # for layout_engines.py

LAYOUTS_WORKER = Path(__file__).with_name("layouts_worker.py")
PADDING = 1  # stands for the end-of-document token, which a character tokenizer has none of


@pytest.fixture(scope="session")
def packed(corpus, tmp_path_factory) -> str:
    """PREFIX of 96 bins of 33 tokens, two documents and from none to 24 tokens of padding in each."""
    prefix = str(tmp_path_factory.mktemp("packed") / "tokens")
    tokens, tokenizer = TokenFile(corpus.prefix).tokens, load_tokenizer(corpus.tokenizer)
    with TokenFileWriter(prefix, tokenizer.vocab_size, tokenizer.fingerprint, boundaries=True) as writer:
        padding = 0
        for number in range(96):
            first, second, fill = 4, 29 - number % 25, number % 25
            document = np.array(tokens[33 * number : 33 * number + first + second])
            document[[first - 1, -1]] = PADDING
            writer.add_tokens(np.append(document, np.full(fill, PADDING, document.dtype)))
            pieces = [first, second, *([fill] if fill else [])]
            writer.add_sequences(np.array(pieces))
            writer.add_documents(np.array([len(pieces)]))
            padding += fill
        packing = {"length": 33, "bins": 96, "padding": padding, "eod_id": PADDING}
        writer.finish(packing=packing)
    return prefix


@pytest.fixture(scope="session")
def train_layouts(fork_ranks, tmp_path_factory):
    """train_layouts(cases, world_size) -> {name: what the ranks agree that they saw}; see layouts_worker.py."""

    def train(cases: dict[str, dict], world_size: int) -> dict[str, dict]:
        folder = tmp_path_factory.mktemp("layouts")
        (folder / "cases.json").write_text(json.dumps(cases))
        finished = fork_ranks(LAYOUTS_WORKER, [folder / "cases.json", folder / "results.json"], world_size)
        assert finished.code == 0, f"{finished.out}\n{finished.err}"
        return json.loads((folder / "results.json").read_text())

    return train


@pytest.fixture
def ranks_of():
    """ranks_of(world_size=8, ...) -> the `Ranks` of a first rank, of one if nothing is said; it talks to nobody."""

    def make(**changes) -> Ranks:
        alone = {
            "rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1, "device": torch.device("cpu"),
            "num_threads": 1, "host_group": None, "launched": False, "tensor_parallel": ALONE, "data_parallel": ALONE,
        }  # fmt: skip
        return Ranks(**alone | changes)

    return make


@pytest.fixture
def stopped_at_step(monkeypatch):
    """`with stopped_at_step(5): ...`: SIGTERM to this process as its fifth step begins."""

    @contextlib.contextmanager
    def stopped(step: int):
        train_step, seen = TrainingEngine.train_step, []

        def counted(engine, *batch):
            seen.append(engine)
            if len(seen) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(engine, *batch)

        with monkeypatch.context() as patch:
            patch.setattr(TrainingEngine, "train_step", counted)
            yield

    return stopped
