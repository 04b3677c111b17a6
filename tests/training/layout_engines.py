"""An engine in any layout, on samples that every rank can make by itself: training without data, folder and loop."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from megaslm_kernels import REFERENCE

from megaslm.config import RunConfig, load_engine_config, resolve_batch, resolve_engine_config
from megaslm.data import IGNORED_TARGET
from megaslm.parallel import Ranks, init_distributed
from megaslm.training import MicroBatch, Options, first_samples
from megaslm.training.preparation import Plan
from megaslm.training.run import engine_of

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
VOCAB_SIZE = 90  # padded to 128: of four ranks the last has no true token


def run_config(model: dict | None = None, **sections: dict) -> dict:
    """A run config as a dictionary: two layers, key/value heads for two ranks and not for four, clipping, accumulation
    2 on two data-parallel ranks. `sections` change it key by key.

    eps: Adam divides a gradient by its own size, so that one which is zero but for rounding moves its weight by lr in a
    direction that the rounding decides. Far above the rounding of the gradients (some 1e-8), eps keeps it where it is.
    """
    base = {
        "name": "layout",
        "model": {
            "vocab_size": VOCAB_SIZE, "context_length": 16, "num_layers": 2, "hidden_size": 32, "num_heads": 8,
            "head_dim": 8, "num_kv_heads": 2, "ffn_hidden_size": 64, "qk_norm": True, "tie_embeddings": True,
        },
        "train": {"global_batch_size": 4, "micro_batch_size": 1, "max_steps": 10, "z_loss": 0.01},
        "optimizer": {"lr": 0.005, "eps": 1e-5, "gradient_clipping": 0.3},
        "parallel": {},
    }  # fmt: skip
    changes = {"model": model or {}, **sections}
    return base | {name: base.get(name, {}) | values for name, values in changes.items()}


class LayoutEngine:
    """The engine of `run` on this rank under ds_configs/zero{stage}.json, and the samples that it trains on.

    masked: the samples have documents, which are kept apart, and some have targets that do not count.
    zero: goes into zero_optimization of the engine config.
    """

    def __init__(
        self, run: RunConfig, stage: int, precision: str = "fp32", masked: bool = False, zero: dict | None = None
    ):
        self.run, self.masked, self.samples = run, masked, 0
        self.ranks = init_distributed(run.parallel.tensor_parallel_size)
        self.plan = make_plan(run, stage, self.ranks, precision, masked)
        self.plan.engine_config["zero_optimization"] |= zero or {}
        self.engine, self.compiled = engine_of(self.plan)

    def step(self) -> tuple[float, float]:
        """The mean loss of one optimizer step and its gradient norm, which are those of all ranks."""
        firsts = first_samples(self.samples, self.plan.layout, self.ranks)
        batches = [self.batch(first, self.plan.layout.micro_batch_size) for first in firsts]
        losses, targets = self.ranks.sum(self.engine.train_step(batches, self.run.optimizer.lr)).tolist()
        self.samples += self.run.train.global_batch_size
        return losses / targets, self.engine.grad_norm

    def batch(self, first: int, count: int, length: int | None = None) -> MicroBatch:
        """Arithmetic sequences of token ids, which a model can learn, with some noise, which it can't."""
        length = length or self.run.seq_length
        rows = []
        for sample in range(first, first + count):
            random = np.random.default_rng(sample)
            row = random.integers(VOCAB_SIZE) + random.integers(1, 4) * np.arange(length + 1)
            noise = random.integers(VOCAB_SIZE, size=length + 1) * (random.random(length + 1) < 0.1)
            rows.append((row + noise) % VOCAB_SIZE)
        tokens = torch.from_numpy(np.array(rows))
        targets, positions, documents = tokens[:, 1:].clone(), None, None
        if self.masked:
            for row in range(count):
                targets[row, : (first + row) % 7] = IGNORED_TARGET
            positions = (torch.arange(length, dtype=torch.int32) % 6).repeat(count, 1)
            documents = int((positions == 0).sum())
        return MicroBatch(tokens[:, :-1].contiguous(), targets, positions, documents)


def make_plan(run: RunConfig, stage: int, ranks: Ranks, precision: str, masked: bool) -> Plan:
    layout = resolve_batch(run.train.global_batch_size, run.train.micro_batch_size, ranks.data_parallel_size)
    engine_config = resolve_engine_config(
        load_engine_config(DS_CONFIGS / f"zero{stage}.json"),
        precision=precision, run=run, batch=layout, data_parallel_size=ranks.data_parallel_size,
    )  # fmt: skip
    if stage == 3:  # the weights are small: without this none of them is taken apart
        engine_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    data = SimpleNamespace(training=SimpleNamespace(ignore_repeated_eod=0 if masked else None))
    return Plan(
        run, engine_config, Options(Path()), ranks, data, layout, precision, REFERENCE, run.train.max_steps, print
    )


def as_run(values: dict) -> RunConfig:
    """Of what `run_config` made and JSON may have carried."""
    return RunConfig.model_validate(json.loads(json.dumps(values)))
