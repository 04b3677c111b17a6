"""The formula of memory, moment by moment, against what real steps allocate on two ranks (moments_worker.py)."""

import json
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("moments_worker.py")
WEIGHTS = {
    "vocab_size": 2000, "context_length": 32, "num_layers": 3, "hidden_size": 128, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 32, "ffn_hidden_size": 320, "tie_embeddings": False,
}  # fmt: skip
SMALL_HEAD = WEIGHTS | {"vocab_size": 128, "num_layers": 6}
ACTIVATIONS = {
    "vocab_size": 300, "context_length": 256, "num_layers": 3, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 16, "ffn_hidden_size": 192,
}  # fmt: skip
GELU = ACTIVATIONS | {"norm": "layernorm", "feed_forward": "gelu", "num_kv_heads": 4, "num_layers": 1}
PRODUCTS = {  # so little else that a part of one moment shows
    "vocab_size": 128, "context_length": 256, "num_layers": 1, "hidden_size": 16, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 8, "ffn_hidden_size": 512,
}  # fmt: skip


def case(model: dict, stage: int, precision: str, bucket: int = 0, train: dict | None = None, **options) -> dict:
    run = {
        "name": "moments", "model": model, "data": {"mask_documents": options.get("masked", False)},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 2, **(train or {})},
    }  # fmt: skip
    zero = {"zero": {"reduce_bucket_size": bucket}} if bucket else {}
    return {"run": run, "stage": stage, "precision": precision, **zero, **options}


ONE = {"micro_batch_size": 4}
# Layout, and the moments that are compared: not the optimizer's, at which gloo still has copies of its own, until a
# thread of it lets them go (test_memory.py has it by hand).
CASES = {
    "ZeRO-0": (case(WEIGHTS, 0, "fp32"), "loss backward blocks reduction"),
    "ZeRO-1, fp32": (case(WEIGHTS, 1, "fp32", 300_000), "loss backward blocks reduction"),
    "ZeRO-1, bf16": (case(WEIGHTS, 1, "bf16"), "loss backward blocks reduction"),
    "ZeRO-1, bf16, large": (case(WEIGHTS, 1, "bf16", joined=500_000), "loss backward reduction"),
    "ZeRO-2, large head": (case(WEIGHTS, 2, "bf16", 100_000), "loss backward"),
    "ZeRO-3": (case(SMALL_HEAD, 3, "bf16", 300_000), "forward loss backward blocks"),
    "activations, fp32": (case(ACTIVATIONS, 1, "fp32", 100_000, ONE), "loss backward blocks"),
    "recomputed": (
        case(ACTIVATIONS, 1, "bf16", train=ONE | {"activation_checkpointing": True}),
        "loss blocks",
    ),
    "documents": (case(GELU, 1, "bf16", train=ONE, masked=True), "loss"),
    "swiglu": (case(PRODUCTS, 1, "bf16", train=ONE), "blocks"),
    "gelu": (case(PRODUCTS | {"feed_forward": "gelu"}, 1, "bf16", train=ONE), "blocks"),
}
TOLERANCE = 0.05


@pytest.fixture(scope="module")
def results(fork_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moments")
    (folder / "cases.json").write_text(json.dumps({name: one for name, (one, _) in CASES.items()}))
    finished = fork_ranks(WORKER, [folder / "cases.json", folder / "results.json"], 2)
    assert finished.code == 0, finished.err
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_every_moment_of_a_step(results, name):
    found, stage = results[name], CASES[name][0]["stage"]
    measured, moments = found["measured"], found["moments"]
    at_once = ["blocks", "arrival"] + ["reduction"] * (stage > 1)  # stages 2 and 3 reduce within the backward pass
    estimates = moments | {"blocks": max(moments[moment] for moment in at_once)}
    wrong = {}
    for moment in CASES[name][1].split():
        taken = found["held"] + measured[moment]
        if estimates[moment] != pytest.approx(taken, rel=TOLERANCE):
            wrong[moment] = f"{estimates[moment]:,.0f} is not {taken:,}"
    assert not wrong
