"""What a model computes on fixed tokens: what it sees, what it forgives, and what it leaves alone."""

import copy
import dataclasses
import json
import math

import pytest
import torch

from megaslm.checkpoint import NUM_TOKENS, Fingerprint, check_fingerprint, compare_fingerprints, take_fingerprint
from megaslm.checkpoint.fingerprint import Figures, why_not_comparable
from megaslm.config import ModelConfig
from megaslm.model import LanguageModel, build_model

LLAMA = {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "tie_embeddings": True}
GPT2 = {"num_heads": 4, "norm": "layernorm", "position": "learned", "feed_forward": "gelu", "bias": True}
TOKENS = torch.randint(50, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()


def build(**switches) -> LanguageModel:
    sizes = {"vocab_size": 50, "context_length": 32, "num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 64}
    model = build_model(ModelConfig(**sizes, **switches), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # as if trained: no bias is zero, no norm is one
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def take(model: LanguageModel, precision: str = "fp32", with_roundings: bool = False) -> Fingerprint:
    return take_fingerprint(model, TOKENS, precision, "cpu", with_roundings=with_roundings)


@pytest.mark.parametrize("switches", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_it_is_the_loss_and_logits_of_the_model(switches):
    model = build(**switches)
    found = take(model)
    ids = torch.tensor(TOKENS)
    logits = model(ids[None, :-1])[0]
    assert found.tokens == TOKENS and found.precision == "fp32"
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, ids[1:]).item(), rel=1e-6)
    spread = [i * 50 // 32 for i in range(32)]
    assert found.logits == pytest.approx(logits[-1, spread].tolist(), rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("switches", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_an_engine_s_weights_and_master_weights_rounded_give_the_same_numbers(switches, precision):
    model = build(**switches)
    narrow = copy.deepcopy(model).to({"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    whole, of_engine = take(model, with_roundings=True), take(narrow, "fp32", with_roundings=True)
    assert of_engine.precision == precision and not of_engine.rounded
    assert take(model, precision) == of_engine and of_engine.loss != whole.loss
    assert whole.rounded.keys() == {"bf16", "fp16"} and whole.figures[precision] == of_engine.figures[precision]
    assert (whole.loss, whole.logits) == (take(model).loss, take(model).logits)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_goes_on_in_another_precision_however_much_it_rounds(precision):
    """A model that is sure of itself: the rounding of its weights moves the loss more than a mixed-up layer would."""
    model = build(**LLAMA)
    with torch.no_grad():
        model.decoder.norm.weight.mul_(20)
    stored = take(model, with_roundings=True)
    narrow = model.to({"bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    assert max(map(abs, stored.logits)) > 10 and abs(stored.rounded["bf16"].loss - stored.loss) > 2e-3
    check = check_fingerprint(narrow, stored, "cpu")
    assert check.equal is True and f"{stored.rounded[precision].loss:.6f} nats, as when" in check.text
    with torch.no_grad():
        narrow.decoder.blocks[2].feed_forward.down.weight.mul_(1.01)
    check = check_fingerprint(narrow, stored, "cpu")
    assert check.equal is False and f"(weights in {precision})" in check.text


def test_what_says_nothing_of_each_other_is_not_compared():
    model = build(**LLAMA)
    stored, replace = take(model), dataclasses.replace
    wide = replace(stored, rounded={"bf16": Figures(1.0, [0.0])})
    for other, narrow, reason in (
        (stored, True, "weights in fp32 and in bf16"),
        (replace(stored, precision="fp8"), False, "weights in fp8, which this megaslm does not know"),
        (replace(stored, tokens=[1] * 34), False, "33 tokens do not fit in a context of 32"),
        (replace(stored, tokens=[1, 50]), False, "not all in a vocabulary of 50"),
        (replace(stored, tokens=[-1, 4]), False, "not all in a vocabulary of 50"),
        (replace(stored, logits=[1.0]), False, "1 logits and 32"),
        (wide, True, "1 logits and 32"),
    ):
        check = check_fingerprint(copy.deepcopy(model).bfloat16() if narrow else model, other, "cpu")
        assert check.equal is None and reason in check.text
    assert why_not_comparable(stored, replace(stored, tokens=TOKENS[1:])) == "other tokens"
    assert why_not_comparable(wide, stored) is None


@pytest.mark.parametrize(
    "value",
    [[], "text", {"tokens": [1, 2]}]
    + [
        {"tokens": [1, 2], "precision": "fp32", "loss": 1.0, "logits": [0.0]} | change
        for change in ({"logits": []}, {"logits": {"a": 1}}, {"loss": "x"}, {"tokens": [1]}, {"tokens": "12"})
        + ({"rounded": {"bf16": 3}}, {"rounded": {"bf16": {"loss": 1.0}}}, {"rounded": 1})
    ],
    ids=repr,
)
def test_another_layout_is_told_from_ours(value):
    with pytest.raises(ValueError, match="does not understand"):
        Fingerprint.from_json(value)


def test_the_arithmetic_is_that_of_ieee_and_the_mode_that_of_evaluation():
    """Whatever the process is set to: TF32 is a thousand times coarser than the tolerance."""
    model, seen = build(**LLAMA).train(), []
    model.decoder.register_forward_hook(
        lambda module, *_: seen.append((torch.get_float32_matmul_precision(), module.training))
    )
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium", "highest"):
            torch.set_float32_matmul_precision(precision)
            take(model, with_roundings=True)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [("highest", False)] * 9 and model.training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("switches", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_change_of_the_weights_that_take_part_is_seen(switches, precision):
    """A tensor off by 1 %, two of its rows swapped, a layer's queries, keys and values mixed up."""
    model = build(**switches)
    stored = take(model, precision)
    order = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        original = parameter.detach().clone()
        changed = {"1 %": original * 1.01}
        if parameter.dim() == 2 and "embedding" not in name and "head" not in name:
            changed["two rows"] = original.clone()
            changed["two rows"][[3, 7]] = original[[7, 3]]
        if "qkv" in name:
            changed["permuted"] = original[torch.randperm(len(original), generator=order)]
        for what, value in changed.items():
            with torch.no_grad():
                parameter.copy_(value)
            assert compare_fingerprints(stored, take(model, precision)) is not None, f"{what} of {name}"
        with torch.no_grad():
            parameter.copy_(original)
    assert take(model, precision) == stored


def test_it_leaves_the_model_and_the_random_state_alone():
    model = build(**LLAMA).bfloat16()
    parameters = dict(model.named_parameters())
    hooks = [dict(hooks) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
    state = torch.get_rng_state()
    for mode in (True, False):
        model.train(mode)
        take(model)
        assert all(module.training is mode for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert [dict(hooks) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)] == hooks
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.head.weight is model.decoder.embedding.weight
    assert all(parameter.grad is None and parameter.dtype == torch.bfloat16 for parameter in parameters.values())


def test_a_forward_pass_that_fails_leaves_the_model_as_it_was():
    model = build(**LLAMA).bfloat16().train()
    parameters = dict(model.named_parameters())
    model.decoder.blocks[1].feed_forward.down.forward = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        take(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.training and not model.decoder.blocks[0].attention.qkv._forward_hooks


def test_strict_json_also_of_what_is_not_finite():
    model = build(**LLAMA)
    with torch.no_grad():
        model.decoder.norm.weight[0] = math.inf
    found = take(model)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert math.isnan(found.loss) and '"loss": null' in text
    stored = Fingerprint.from_json(json.loads(text) | {"of_the_future": 1})
    assert compare_fingerprints(stored, found) is None
    sound = take(build(**LLAMA))
    assert Fingerprint.from_json(sound.to_json()) == sound
    for pair in ((stored, sound), (sound, stored)):
        assert "nan" in compare_fingerprints(*pair)


def test_the_tolerance_lets_the_rounding_of_fp32_through():
    """It forgives what fp64 would change, ten times over; that it forgives no damage is in the test of changes."""
    for switches in (LLAMA, GPT2):
        model = build(**switches)
        stored = take(model)
        ids = torch.tensor(TOKENS)
        logits = model.double()(ids[None, :-1])[0]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:]).item()
        exact = [logits[-1, i * 50 // 32].item() for i in range(32)]
        apart = [10 * (now - then) for now, then in zip([loss, *exact], [stored.loss, *stored.logits], strict=True)]
        moved = [then + by for then, by in zip([stored.loss, *stored.logits], apart, strict=True)]
        assert any(apart)
        assert compare_fingerprints(stored, dataclasses.replace(stored, loss=moved[0], logits=moved[1:])) is None


def test_tolerances_and_what_is_said_of_a_difference():
    one = Fingerprint(TOKENS, "fp32", 3.0, [20.0, -0.5])
    replace = dataclasses.replace
    for loss, logit, equal in ((2.9e-5, 0.0, True), (3.1e-5, 0.0, False), (0.0, 1.9e-3, True), (0.0, 2.1e-3, False)):
        now = replace(one, loss=3.0 + loss, logits=[20.0 + logit, -0.5])
        assert (compare_fingerprints(one, now) is None) is equal
    assert compare_fingerprints(one, replace(one, loss=3.00002, logits=[20.001, -0.50005])) is None
    other = replace(one, loss=3.0001, logits=[20.001, -0.5002])
    text = compare_fingerprints(one, other)
    assert "the loss in nats was 3 and is 3.0001, 3.3e-05 apart where 1e-05 is allowed" in text
    assert "the logit that is furthest off was -0.5 and is -0.5002" in text and "(weights in fp32)" in text
