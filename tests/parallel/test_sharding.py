"""Sharded models compute what the whole one does, in every family, on 2 and 4 ranks over gloo (sharded_worker.py)."""

import json
import re
from pathlib import Path

import pytest
import torch

from megaslm.config import ModelConfig
from megaslm.errors import UserError
from megaslm.model import LanguageModel
from megaslm.parallel import ALONE, PLAN, check_sizes, check_tags, placement_of, shard_model
from megaslm.parallel.groups import Group

WORKER = Path(__file__).with_name("sharded_worker.py")
PRESETS = Path(__file__).parents[2] / "megaslm" / "config" / "presets"
MODES = {
    "megaslm": "eager",
    "megaslm_untied": "checkpointing",
    "slm": "documents",
    "gpt2": "checkpointing",
    "neox": "documents",
    "sab": "eager",
    "shakespeare": "documents",
}
COMPARED = {
    ranks: [("compare", family, rows, MODES[family]) for family in MODES for rows in (False, True)] for ranks in (2, 4)
}
COMPARED[2] += [("compare", "megaslm", rows, "compiled") for rows in (False, True)]
UNDER_ZERO = [
    ("compare_under_zero", "megaslm_untied", stage, precision)
    for stage, precision in ((0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
]


@pytest.fixture(scope="module")
def found(fork_ranks, tmp_path_factory) -> dict:
    """Of 2 and of 4 ranks: what rank 0 found, by task."""
    folder, found = tmp_path_factory.mktemp("sharded"), {}
    for ranks, tasks in (
        (2, COMPARED[2] + UNDER_ZERO + [("drop_a_tag",)]),
        (4, COMPARED[4] + [("compare_collectives",)]),
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
    for name, (value, gradient, bypassed) in result.items():
        assert value < 1e-14 and gradient < 1e-14 and bypassed, name


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
        assert len(rules) == int(any(True for _ in module.parameters(recurse=False))), name


def test_a_module_without_a_rule_is_no_part_of_a_plan():
    model = LanguageModel(config())
    model.decoder.adapter = torch.nn.Linear(24, 24)
    with pytest.raises(AssertionError, match="0 rules of the plan are for decoder.adapter"):
        shard_model(model, Group(0, (0, 1), None))


def test_in_a_group_of_one_nothing_changes():
    model = LanguageModel(config(tie_embeddings=True))
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    shard_model(model, ALONE, sequence_parallel=True)
    check_tags(model)
    assert dict(model.named_modules()) == modules
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and not placement_of(name, parameter).sliced


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
    check_tags(model)


def test_sizes_that_do_not_divide_are_refused_with_those_that_do():
    for size in (1, 2, 4, 12):  # 12: three ranks to a key/value head
        check_sizes(config(), size)
    with pytest.raises(UserError) as refusal:
        check_sizes(config(), 8)
    assert str(refusal.value) == (
        "12 attention heads do not divide among 8 tensor-parallel ranks (parallel.tensor_parallel_size); "
        "for this model, sizes that do: 1, 2, 4, 12"
    )
    for switches, size, words in (
        ({}, 3, "4 key/value heads do not"),
        ({"ffn_hidden_size": 50}, 4, "a feed-forward width of 50 do"),
        ({"num_kv_heads": 12}, 5, "12 attention heads and 12 key/value heads and a feed-forward width of 48 and"),
        ({"vocab_size": 128}, 6, "4 key/value heads and a padded vocabulary of 128 do not"),
    ):
        with pytest.raises(UserError, match=words):
            check_sizes(config(**switches), size)
