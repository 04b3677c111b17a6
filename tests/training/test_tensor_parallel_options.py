"""What a run may choose, on two tensor-parallel ranks: every family of models, documents, recomputation, compilation,
bf16. And what the numbers are held against beside those of one rank: DeepSpeed's own tensor parallelism."""

import pytest
from layout_engines import run_config

from megaslm.config import list_presets, load_run_config

TWO_RANKS = {"tensor_parallel_size": 2}
SEQUENCE = TWO_RANKS | {"sequence_parallel": True}
ONE_LAYER = {"num_layers": 1}
FEW = {"max_steps": 3, "micro_batch_size": 2}


def families() -> dict[str, dict]:
    """The switches of every preset in a small network, by the first preset that has them."""
    found = {}
    for preset in list_presets():
        model = load_run_config(preset).model
        heads = {"num_heads": 4, "num_kv_heads": 4 if model.num_kv_heads == model.num_heads else 2, "head_dim": 8}
        sizes = {"vocab_size": 90, "context_length": 16, "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48}
        switches = model.model_dump() | heads | sizes | {"init_std": None}
        if switches not in found.values():
            found[preset] = switches
    return found


CASES = {
    **{
        name: {"run": run_config(switches, parallel=SEQUENCE, train=FEW), "stage": 1}
        for name, switches in families().items()
    },
    "documents and padding": {"run": run_config(parallel=SEQUENCE, train=FEW), "stage": 3, "masked": True},
    "recomputed": {
        "run": run_config(parallel=SEQUENCE, train=FEW | {"activation_checkpointing": True}), "stage": 3,
    },
    "compiled": {"run": run_config(ONE_LAYER, parallel=SEQUENCE, train=FEW | {"compile": True}), "stage": 1},
    "compiled and recomputed": {
        "run": run_config(
            ONE_LAYER, parallel=TWO_RANKS, train=FEW | {"compile": True, "activation_checkpointing": True}
        ),
        "stage": 2,
    },
    **{
        f"bf16, ZeRO-{stage}": {
            "run": run_config(parallel=parallel, train=FEW), "stage": stage, "precision": "bf16",
        }
        for stage, parallel in ((1, SEQUENCE), (2, TWO_RANKS), (3, SEQUENCE))
    },
    "untagged": {
        "run": run_config(parallel=TWO_RANKS, train=FEW), "stage": 1,
        "untag": "decoder.blocks.1.feed_forward.down.weight",
    },
    # The last: DeepSpeed keeps its groups in its module, from the first such engine on.
    "of DeepSpeed": {"run": run_config({"qk_norm": False}, parallel=TWO_RANKS, train=FEW), "stage": 1, "autotp": True},
}  # fmt: skip
EXACT = [name for name in CASES if not name.startswith("bf16") and name != "untagged"]


@pytest.fixture(scope="module")
def found(train_layouts) -> dict[str, dict]:
    return train_layouts(CASES, 2)


@pytest.fixture(scope="module")
def expected(train_layouts) -> dict[str, dict]:
    """The same models on one rank."""
    keys = ("stage", "precision", "masked")
    alone = {
        name: {key: case[key] for key in keys if key in case} | {"run": case["run"] | {"parallel": {}}}
        for name, case in CASES.items()
    }
    return train_layouts(alone, 1)


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_train_the_model_of_one(found, expected, name):
    for key in ("losses", "norms", "validation"):
        assert found[name][key] == pytest.approx(expected[name][key], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("compiled")])
def test_blocks_are_compiled_with_their_collectives(found, name):
    assert found[name]["compiled"] == "every block"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_as_near_as_its_rounding(found, expected, stage):
    name = f"bf16, ZeRO-{stage}"
    assert found[name]["losses"] == pytest.approx(expected[name]["losses"], rel=5e-3)
    assert found[name]["norms"][0] == pytest.approx(expected[name]["norms"][0], rel=1e-2)


def test_a_sliced_parameter_without_its_tag_is_refused_since_the_norm_would_be_wrong(found, expected):
    of_one = expected["untagged"]["norms"][0]
    assert abs(found["untagged"]["norms"][0] / of_one - 1) > 1e-3
    assert "decoder.blocks.1.feed_forward.down.weight" in found["untagged"]["refused"]
