"""What a run may choose, on two tensor-parallel ranks: every family of models, documents, recomputation, compilation,
half precision, and steps that are left out."""

import math

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
    # What users get. A compiler takes a second for each kernel: no more of them than the layers between ranks need.
    "compiled": {
        "run": run_config(
            ONE_LAYER | {"qk_norm": False}, parallel=SEQUENCE, train=FEW | {"compile": True, "max_steps": 2}
        ),
        "stage": 1,
        "backend": "inductor",
    },
    "without a compiler on one rank": {
        "run": run_config(ONE_LAYER, parallel=SEQUENCE, train=FEW | {"compile": True}), "stage": 1,
        "without_compiler": True,
    },
    # Without what Inductor makes of the graphs.
    "compiled and recomputed": {
        "run": run_config(
            ONE_LAYER, parallel=TWO_RANKS, train=FEW | {"compile": True, "activation_checkpointing": True}
        ),
        "stage": 2,
    },
    **{
        f"bf16, ZeRO-{stage}": {
            "run": run_config({"num_kv_heads": kv_heads}, parallel=parallel, train=FEW), "stage": stage,
            "precision": "bf16", "spoil": "decoder.norm.weight",
        }
        for stage, parallel, kv_heads in ((1, SEQUENCE, 2), (2, TWO_RANKS, 2), (3, SEQUENCE, 1))
    },
    **{
        f"infinite, {precision}, ZeRO-{stage}": {
            "run": run_config(ONE_LAYER, parallel=SEQUENCE, train=FEW), "stage": stage, "precision": precision,
            "poison": "decoder.blocks.0.feed_forward.down.weight",
        }
        for stage, precision in ((0, "fp32"), (1, "fp32"), (3, "fp32"), (1, "fp16"))
    },
    # The data-parallel ranks share the optimizer's state: the infinite gradient lies in the part of one.
    **{
        f"infinite, {precision}, ZeRO-{stage}, data parallel": {
            "run": run_config(ONE_LAYER, train=FEW), "stage": stage, "precision": precision,
            "poison": "decoder.norm.weight",
        }
        for stage, precision in ((1, "bf16"), (2, "fp32"), (3, "fp32"))
    },
    "untagged": {
        "run": run_config(parallel=TWO_RANKS, train=FEW), "stage": 1,
        "untag": "decoder.blocks.1.feed_forward.down.weight",
    },
}  # fmt: skip
INFINITE = [name for name in CASES if name.startswith("infinite")]
EXACT = [name for name in CASES if CASES[name].get("precision") is None and name != "untagged"]


@pytest.fixture(scope="module")
def found(train_layouts) -> dict[str, dict]:
    return train_layouts(CASES, 2)


@pytest.fixture(scope="module")
def expected(train_layouts) -> dict[str, dict]:
    """The same models on one rank, and not compiled."""
    keys = ("stage", "precision", "masked", "poison")
    alone = {}
    for name, case in CASES.items():
        run = case["run"] | {"parallel": {}, "train": case["run"]["train"] | {"compile": False}}
        alone[name] = {key: case[key] for key in keys if key in case} | {"run": run}
    return train_layouts(alone, 1)


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_train_the_model_of_one(found, expected, name):
    for key in ("losses", "norms", "validation"):
        assert found[name][key] == pytest.approx(expected[name][key], rel=1e-5)


@pytest.mark.parametrize("name", INFINITE)
def test_a_step_in_which_one_rank_has_an_infinite_gradient_is_left_out_by_all(found, expected, name):
    """It stands in a weight, or a part of one, that the other rank does not update, and is no part of its own norm."""
    assert found[name]["skipped"] == expected[name]["skipped"] == 1
    assert not math.isfinite(found[name]["norms"][1])
    half = CASES[name]["precision"] != "fp32"
    for key in ("losses", "validation"):
        assert found[name][key] == pytest.approx(expected[name][key], rel=5e-3 if half else 1e-5)
    norms = found[name]["norms"][2], expected[name]["norms"][2]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2 if half else 1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("compiled")])
def test_blocks_are_compiled_with_their_collectives(found, name):
    assert found[name]["compiled"] == "every block"


def test_a_rank_without_a_compiler_lets_all_of_them_go_without(found):
    """And does not leave them waiting in the collectives of the block that is tried."""
    assert found["without a compiler on one rank"]["compiled"] == "fell back to eager: RuntimeError: no compiler here"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_replicated_weight_that_one_rank_has_otherwise_is_found(found, stage):
    name = f"bf16, ZeRO-{stage}"
    assert found[name]["differing"] == []
    assert found[name]["spoiled"] == ["decoder.norm.weight"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_as_near_as_its_rounding(found, expected, stage):
    name = f"bf16, ZeRO-{stage}"
    assert found[name]["losses"] == pytest.approx(expected[name]["losses"], rel=5e-3)
    assert found[name]["norms"] == pytest.approx(expected[name]["norms"], rel=1e-2)


def test_a_sliced_parameter_without_its_tag_is_refused_since_the_norm_would_be_wrong(found, expected):
    of_one = expected["untagged"]["norms"][0]
    assert abs(found["untagged"]["norms"][0] / of_one - 1) > 1e-3
    assert "decoder.blocks.1.feed_forward.down.weight" in found["untagged"]["refused"]
