"""Sharded models compute what the whole one does, in every family, on 2 and 4 ranks over gloo (sharded_worker.py)."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from megaslm.config import ModelConfig, list_presets
from megaslm.errors import UserError
from megaslm.model import LanguageModel
from megaslm.parallel import ALONE, PLAN, check_sizes, check_tags, placement_of, shard_model
from megaslm.parallel.groups import Group

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, switches

WORKER = Path(__file__).with_name("sharded_worker.py")
PRESETS = Path(__file__).parents[2] / "megaslm" / "config" / "presets"
MODES = {
    "megaslm_125m": "eager",
    "megaslm_1.2b": "checkpointing",
    "slm_large": "documents",
    "slm_small": "eager",
    "mvlm_gpt2": "checkpointing",
    "neox_1.2b": "documents",
    "sab_3b": "eager",
    "shakespeare_char": "documents",
}
COMPARED = {
    2: [("compare", family, True, mode) for family, mode in MODES.items()],
    4: [("compare", family, splits, mode) for family, mode in MODES.items() for splits in (False, True)],
}
COMPARED[2] += [("compare", "megaslm_125m", splits, "compiled") for splits in (False, True)]
UNDER_ZERO = [
    ("compare_under_zero", "megaslm_1.2b", stage, precision)
    for stage, precision in ((1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
]


@pytest.fixture(scope="module")
def found(fork_ranks, tmp_path_factory) -> dict:
    """Of 2 and of 4 ranks: what rank 0 found, by task."""
    folder, found = tmp_path_factory.mktemp("sharded"), {}
    for ranks, tasks in (
        (2, COMPARED[2] + UNDER_ZERO + [("drop_a_tag",)]),
        (4, COMPARED[4] + [("compare_collectives",), ("sum_parts",), ("keep",), ("model_parallel_unit",)]),
    ):
        job, output = folder / f"job{ranks}.json", folder / f"{ranks}.json"
        job.write_text(json.dumps({"output": str(output), "tasks": tasks}))
        finished = fork_ranks(WORKER, [job], ranks)
        assert finished.code == 0, finished.err
        found[ranks] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize(("ranks", "task"), [(n, task) for n, tasks in COMPARED.items() for task in tasks], ids=str)
def test_a_sharded_model_computes_what_the_whole_one_does(found, ranks, task):
    result = found[ranks][" ".join(map(str, task))]
    assert result["weights are equal"] and result["ranks are equal"]
    assert result["losses"] < 1e-6 and result["logits"] < 3e-6 and result["norms"] < 1e-6
    # Relative to the largest element; those of the norms of queries and keys are small sums of large terms.
    assert max(result["gradients"].values()) < 1e-5, result["gradients"]
    assert result["clipped"] == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("task", UNDER_ZERO, ids=str)
def test_deepspeed_gets_the_gradient_of_every_weight(found, task):
    """Those that ranks have parts of too, summed before it sees them; 8 bits of bf16 are several per cent here."""
    result = found[2][" ".join(map(str, task))]
    assert max(result.values()) < (1e-5 if task[-1] == "fp32" else 0.1), result


def test_collectives_and_their_gradients(found):
    result = found[4]["compare_collectives"]
    assert len(result) == 6
    for name, (value, gradient, bypassed, in_place) in result.items():
        assert value < 1e-14 and gradient < 1e-14 and bypassed, name
        assert in_place == (name in ("all_reduce_", "all_reduce_gradient")), name


def test_parts_of_a_gradient_are_summed_in_fp32_and_rounded_once(found):
    assert found[4]["sum_parts"] == {"torch.bfloat16": [[260.0], True, True], "torch.float32": [[259.0], True, True]}


def test_a_column_parallel_layer_keeps_no_gathered_tokens_and_no_packed_weights(found):
    kept = {"kept": 3, "others": 0}  # x, queries' weight, that of keys and values
    assert found[4]["keep"] == {
        "x": kept | {"reduce_scatter": 1},
        "weights": kept | {"all_gather": 1},
        "both": kept | {"all_gather": 1, "reduce_scatter": 1},
    }


def test_deepspeed_is_told_who_shares_what(found):
    """Ranks 0, 1 and 2, 3 hold one model each; 0, 2 and 1, 3 the same part. Beside a group's ranks is their sum."""
    for rank, answers in enumerate(found[4]["model_parallel_unit"]):
        first, other = rank // 2 * 2, rank % 2
        tensor, data = [first, first + 1], [other, other + 2]
        assert answers.pop("sequence") == []  # DeepSpeed would take a group of such a name for one of Ulysses
        assert answers == {
            "get_tensor_model_parallel_rank": rank % 2,
            "get_tensor_model_parallel_world_size": 2,
            "get_tensor_model_parallel_group": [*tensor, sum(tensor)],
            "get_tensor_model_parallel_src_rank": first,
            "get_model_parallel_rank": rank % 2,
            "get_model_parallel_world_size": 2,
            "get_model_parallel_group": [*tensor, sum(tensor)],
            "get_data_parallel_rank": rank // 2,
            "get_data_parallel_world_size": 2,
            "get_data_parallel_group": [*data, sum(data)],
            "get_data_parallel_group_ranks": data,
            "get_pipeline_model_parallel_rank": 0,
            "get_pipeline_model_parallel_world_size": 1,
        }


def test_a_wrong_tag_is_found_and_makes_the_norm_wrong(found):
    result = found[2]["drop_a_tag"]
    sliced, whole = result["decoder.blocks.1.feed_forward.down.weight"], result["decoder.norm.weight"]
    assert "is not tagged" in sliced["messages"][0]
    assert "would count 192 elements" in sliced["messages"][1] and "which has 384" in sliced["messages"][1]
    assert "is tagged" in whole["messages"][0]
    assert sliced["norm"] > 1e-4 and whole["norm"] > 1e-4


def config(**switches) -> ModelConfig:
    sizes = {"vocab_size": 300, "context_length": 8, "num_layers": 1, "hidden_size": 24, "num_heads": 12}
    return ModelConfig(**{**sizes, "num_kv_heads": 4, "ffn_hidden_size": 48, **switches})


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.json")), ids=lambda path: path.stem)
def test_the_plan_has_one_rule_for_every_module_of_every_preset(preset):
    switches = json.loads(preset.read_text())["model"]
    with torch.device("meta"):
        model = LanguageModel(ModelConfig(**{**switches, "vocab_size": 50_000, "num_layers": 2}))
    for name, module in model.named_modules():
        rules = [rule for pattern, rule in PLAN if re.fullmatch(pattern, name)]
        assert len(rules) == 1 or not (rules or any(True for _ in module.parameters(recurse=False))), name


def test_every_preset_is_of_a_family_that_is_compared():
    families = [switches(name) for name in FAMILIES]
    for preset in list_presets():
        assert switches(preset) in families, preset
    assert MODES.keys() == FAMILIES.keys()


def test_a_module_without_a_rule_is_no_part_of_a_plan():
    model = LanguageModel(config())
    model.decoder.adapter = torch.nn.Linear(24, 24)
    with pytest.raises(AssertionError, match="0 rules of the plan are for decoder.adapter"):
        shard_model(model, Group(0, (0, 1), None))


def test_in_a_group_of_one_nothing_changes():
    model = LanguageModel(config(tie_embeddings=True))
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    shard_model(model, ALONE, sequence_parallel=True)
    check_tags(model, ALONE)
    assert dict(model.named_modules()) == modules
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and not placement_of(name, parameter).sliced


def sharded(group: Group, sequence_parallel: bool = True) -> LanguageModel:
    model = LanguageModel(config(num_kv_heads=1, qk_norm=True, bias=True))
    shard_model(model, group, sequence_parallel)
    return model


def make_anew(model: LanguageModel, name: str) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, torch.nn.Parameter(model.get_parameter(name).detach()))


SHARED = ("attention.qkv.kv_weight", "attention.qkv.kv_bias", "attention.qk_norm.q_weight", "feed_forward.down.bias")


@pytest.mark.parametrize("name", ["decoder.norm.weight", *(f"decoder.blocks.0.{name}" for name in SHARED)])
def test_a_parameter_that_lost_its_hook_is_found(name):
    first = Group(0, (0, 1), None)
    model = sharded(first)
    check_tags(model, first, sequence_parallel=True)
    parameter = model.get_parameter(name)
    placement = placement_of(name, parameter)
    make_anew(model, name)
    model.get_parameter(name).placement = placement
    with pytest.raises(AssertionError, match=f"the gradient of {name} is not summed"):
        check_tags(model, first, sequence_parallel=True)


def test_a_model_that_is_not_this_rank_s_is_found():
    first, second = Group(0, (0, 1), None), Group(1, (0, 1), None)
    for model, message in (
        (LanguageModel(config()), "and rank 1 of 2 has"),
        (LanguageModel(config(num_kv_heads=1)), "attention.qkv.weight is no parameter"),
        (sharded(first), "and rank 1 of 2 has"),
        (copy.deepcopy(sharded(second)), "the norm would count"),
        (sharded(second, sequence_parallel=False), "is not summed over the ranks"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_tags(model, second, sequence_parallel=True)
    model = sharded(second)
    out = model.decoder.blocks[0].attention.out
    out.weight.data = out.weight.data.t().contiguous()  # as many elements
    with pytest.raises(AssertionError, match=r"attention.out.weight is \(12, 24\), and its placement \(24, 12\)"):
        check_tags(model, second, sequence_parallel=True)


def test_frozen_parameters_and_the_mode_stay():
    group, model = Group(0, (0, 1), None), LanguageModel(config(num_kv_heads=1, qk_norm=True, bias=True))
    model.requires_grad_(False).eval()
    shard_model(model, group, sequence_parallel=True)
    check_tags(model, group, sequence_parallel=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_placements_of_packed_rows():
    """Rank 1 of 2 has [its queries, its keys, its values]; of 8 ranks, each its queries, and all keys and values."""
    model = LanguageModel(config(bias=True))
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    shard_model(model, Group(1, (0, 1), None))
    for kind in ("weight", "bias"):
        name = f"decoder.blocks.0.attention.qkv.{kind}"
        q, k, v = whole[name].split((24, 8, 8))
        assert torch.equal(model.get_parameter(name), torch.cat([q[12:], k[4:], v[4:]]))
    model = LanguageModel(config(num_heads=8, num_kv_heads=2, head_dim=4, ffn_hidden_size=64))
    whole = model.decoder.blocks[0].attention.qkv.weight.detach().clone()
    shard_model(model, Group(5, tuple(range(8)), None))
    qkv = model.decoder.blocks[0].attention.qkv
    assert torch.equal(qkv.q_weight, whole[20:24]) and torch.equal(qkv.kv_weight, whole[32:])
    assert qkv.kv_head == 1 and not hasattr(qkv.kv_weight, "tensor_model_parallel")
    assert {placement_of("", p).name for p in qkv.parameters()} == {"decoder.blocks.0.attention.qkv.weight"}
    check_tags(model, Group(5, tuple(range(8)), None))


def test_sizes_that_do_not_divide_are_refused_with_those_that_do():
    for size in (1, 2, 4, 12):  # 12: three ranks to a key/value head
        check_sizes(config(), size)
    with pytest.raises(UserError) as refusal:
        check_sizes(config(), 8)
    assert str(refusal.value) == (
        "the model does not divide among 8 tensor-parallel ranks (parallel.tensor_parallel_size): attention heads 12; "
        "sizes among which it does: 1, 2, 4, 12"
    )
    for changes, size, words in (
        ({}, 3, ": key/value heads 4; "),
        ({"ffn_hidden_size": 50}, 4, ": feed-forward width 50; "),
        ({"num_kv_heads": 12}, 5, ": attention heads 12, key/value heads 12, feed-forward width 48, padded"),
        ({"vocab_size": 128}, 6, ": key/value heads 4, padded vocabulary 128; "),
    ):
        with pytest.raises(UserError, match=words):
            check_sizes(config(**changes), size)
