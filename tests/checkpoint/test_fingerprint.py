"""What a model computes on fixed tokens: what it sees, what it forgives, and what it leaves alone."""

import copy
import dataclasses
import json
import math

import pytest
import torch

from megaslm.checkpoint import NUM_TOKENS, Fingerprint, compare_fingerprints, take_fingerprint
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


def take(model: LanguageModel, precision: str = "fp32") -> Fingerprint:
    return take_fingerprint(model, TOKENS, precision, "cpu")


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
    whole, of_engine = take(model), take(narrow, "fp32")
    assert of_engine.precision == precision
    assert take(model, precision) == of_engine and of_engine.loss != whole.loss
    assert compare_fingerprints(whole, of_engine) is None, "an fp32 run may go on in bf16"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("switches", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_every_change_of_a_weight_is_seen(switches, precision):
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


def test_tolerances_and_what_is_said_of_a_difference():
    one = Fingerprint(TOKENS, "fp32", 3.0, [20.0, -0.5])
    replace = dataclasses.replace
    assert compare_fingerprints(one, replace(one, loss=3.00002, logits=[20.001, -0.50005])) is None
    other = replace(one, loss=3.0001, logits=[20.001, -0.5002])
    text = compare_fingerprints(one, other)
    assert "the loss in nats was 3 and is 3.0001, 3.3e-05 apart where 1e-05 is allowed" in text
    assert "the logit that is furthest off was -0.5 and is -0.5002" in text and "fp32 then, fp32 now" in text
    assert compare_fingerprints(one, replace(other, precision="bf16")) is None
    assert "another vocabulary" in compare_fingerprints(one, replace(one, logits=[1.0]))
