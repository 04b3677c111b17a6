"""On every rank, started as `peers_worker.py OUTPUT`: the losses of the engine and of the peers, step for step.

Rank 0 writes {case: {"megaslm": losses, "hf": losses, "ddp": losses}, "reductions": messages of the DDP's steps}.
"""

import json
import sys
from pathlib import Path

import torch
from megaslm_kernels import REFERENCE
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from layout_engines import LayoutEngine, as_run, run_config  # noqa: E402

from megaslm.throughput.peers import build_ddp, build_transformers  # noqa: E402
from megaslm.training import MicroBatch, first_samples  # noqa: E402

MODELS = {
    "llama": {},
    "qwen3": {"qk_norm": True, "tie_embeddings": True},
    "gpt2": {
        "norm": "layernorm", "position": "learned", "feed_forward": "gelu_tanh", "num_kv_heads": 4, "bias": True,
        "tie_embeddings": True,
    },
    "gpt_neox": {
        "norm": "layernorm", "feed_forward": "gelu", "num_kv_heads": 4, "rope_fraction": 0.5, "bias": True,
        "parallel_residual": True,
    },
}  # fmt: skip
SIZES = {"num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "qk_norm": False, "tie_embeddings": False}
RATES = (0.005, 0.001, 0.003)
# Some of the steps are clipped and some are not; and eps as large as gradients lets their size show in the losses.
OPTIMIZER = {"gradient_clipping": 2.3, "eps": 1e-2}
TRAIN = {"global_batch_size": 4, "micro_batch_size": 1}


def losses(engine: LayoutEngine, step, documents: bool) -> list[float]:
    """The mean loss of each of three steps on the samples of `engine`."""
    found = []
    for number, lr in enumerate(RATES):
        firsts = first_samples(number * engine.run.train.global_batch_size, engine.plan.layout, engine.ranks)
        batches = [engine.batch(first, engine.plan.layout.micro_batch_size) for first in firsts]
        if not documents:
            batches = [MicroBatch(batch.tokens, batch.targets, None, None) for batch in batches]
        total, targets = engine.ranks.sum(step(batches, lr)).tolist()
        found.append(total / targets)
    return found


def compare(model: dict, peers: tuple[str, ...], masked: bool = False, documents: bool = False, z_loss: float = 0.0):
    run = as_run(run_config(SIZES | model, train=TRAIN | {"z_loss": z_loss}, optimizer=OPTIMIZER))
    engine = LayoutEngine(run, 1, masked=masked)
    found = {"megaslm": losses(engine, engine.engine.train_step, documents)}
    if "hf" in peers:
        found["hf"] = losses(engine, build_transformers(run, engine.ranks, "fp32", False, masked).step, documents)
    if "ddp" in peers:
        stepper = build_ddp(run, engine.ranks, REFERENCE, "fp32", 1, masked)
        found["ddp"] = losses(engine, stepper.step, documents)
    return found


def count_reductions() -> int:
    """Messages that DDP sends in three steps of two micro-batches."""
    run = as_run(run_config(SIZES, train=TRAIN))
    engine = LayoutEngine(run, 1)
    stepper = build_ddp(run, engine.ranks, REFERENCE, "fp32", 1, False)
    sent = []

    def counted(group, bucket):
        sent.append(bucket)
        return allreduce_hook(group, bucket)

    stepper._network.register_comm_hook(engine.ranks.data_parallel.process_group, counted)
    losses(engine, stepper.step, documents=False)
    return len(sent)


def main() -> None:
    both = ("hf", "ddp")
    found = {name: compare(model, both) for name, model in MODELS.items()}
    found["masked targets"] = compare({}, both, masked=True)
    found["documents, z-loss"] = compare(MODELS["qwen3"], ("ddp",), masked=True, documents=True, z_loss=0.01)
    if torch.distributed.get_world_size() > 1:
        found["reductions"] = count_reductions()
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
