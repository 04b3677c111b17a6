"""train.float8 with emulated products: what they change, what they do not, and where there are none."""

import functools
import sys
import warnings

import pytest
import torch
from layout_engines import as_run, run_config
from test_device_step import Run

from megaslm.checkpoint import export_checkpoint, open_checkpoint, open_model, verify_export
from megaslm.errors import UserError
from megaslm.model import build_model
from megaslm.training import run as run_module
from megaslm.training.float8 import check_float8, use_float8

RECIPES = ("tensorwise", "rowwise")


@pytest.fixture
def emulated(monkeypatch):
    """Runs with train.float8 work on any device."""
    monkeypatch.setattr(run_module, "check_float8", lambda *_: None)
    monkeypatch.setattr(run_module, "use_float8", functools.partial(use_float8, emulate=True))


def losses(run: Run, steps: int = 4) -> list[float]:
    return [run.step()[0] for _ in range(steps)]


def test_losses_are_near_those_of_bf16_whatever_the_layout(ranks, emulated):
    expected = losses(Run(ranks, 1, "bf16"))
    found = losses(Run(ranks, 1, "bf16", float8="tensorwise"))
    assert found == pytest.approx(expected, rel=5e-3)
    assert found[0] != expected[0], "nothing was rounded to float8"
    assert found[-1] < found[0] - 0.05, "it does not learn"
    assert losses(Run(ranks, 2, "bf16", float8="rowwise")) == pytest.approx(expected, rel=5e-3)
    # What ZeRO-3 fetches, and what is computed again, is multiplied in float8 too.
    again = losses(Run(ranks, 3, "bf16", float8="tensorwise", activation_checkpointing=True))
    assert again == pytest.approx(found, rel=1e-3)


def model_in_bf16(**changes) -> torch.nn.Module:
    run = as_run(run_config(**changes))
    return build_model(run.model, 0, torch.device("cpu")).bfloat16()


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_and_evaluation_are_those_of_a_model_without(recipe):
    model = model_in_bf16(model={"bias": True, "feed_forward": "gelu"})
    before, tokens = dict(model.named_parameters()), torch.arange(16).reshape(1, 16)
    logits = model.eval()(tokens)
    use_float8(model, recipe, emulate=True)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(model.eval()(tokens), logits)
    assert not torch.equal(model.train()(tokens), logits)


def test_checkpoints_and_exports_are_those_of_any_run(emulated, command, preset, tmp_path):
    """transformers computes the logits of the export, which `export_checkpoint` compares with our own."""
    options = ["--preset", preset, "--run_dir", tmp_path / "run", "train.float8=rowwise", "train.precision=bf16"]
    for steps in (2, 4):
        finished = command(*options, f"train.max_steps={steps}")
        assert finished.code == 0, finished.err
    assert "at step 2" in finished.out
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    source = open_model(checkpoint)
    model = build_model(source.config, 0, torch.device("cpu"))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == open_checkpoint(checkpoint).shapes
    assert verify_export(export_checkpoint(source, tmp_path / "export").path) == []


def test_a_block_is_one_graph():
    model = model_in_bf16()
    use_float8(model, "tensorwise", emulate=True)
    tokens = torch.arange(16).reshape(1, 16)
    loss = model(tokens, tokens)[0].item()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in model.decoder.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        assert model(tokens, tokens)[0].item() == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(
    ("capability", "precision", "changes", "words"),
    [
        ((8, 0), "bf16", {}, ["sm_89"]),
        ((9, 4), "bf16", {}, ["NVIDIA"]),  # what ROCm says of its MI300
        ((9, 0), "fp32", {}, ["train.precision=bf16"]),
        ((9, 0), "bf16", {"parallel": {"tensor_parallel_size": 2}}, ["parallel.tensor_parallel_size=2"]),
        ((9, 0), "bf16", {"model": {"ffn_hidden_size": 72}}, ["multiples of 16", "model.ffn_hidden_size (72)"]),
        ((9, 0), "bf16", {"data": {"seq_length": 12}}, ["multiples of 16", "the tokens of a micro-batch (12)"]),
    ],
)
def test_where_there_is_no_float8_a_message_says_why(monkeypatch, capability, precision, changes, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None if capability < (9, 4) else "6.4")
    monkeypatch.setattr("megaslm.training.float8.device_name", lambda device: "some GPU")
    run = as_run(run_config(**{"train": {"float8": "rowwise"}} | changes))
    with pytest.raises(UserError) as error:
        check_float8(run, precision, torch.device("cuda"), 1)
    assert all(word in str(error.value) for word in words)


def test_an_h100_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("megaslm.training.float8.device_name", lambda device: "some GPU")
    check_float8(as_run(run_config(train={"float8": "rowwise"})), "bf16", torch.device("cuda"), 1)


def test_a_cpu_has_none(command, preset, tmp_path):
    message = command("--preset", preset, "--run_dir", tmp_path, "train.float8=tensorwise").message()
    assert "train.float8=tensorwise needs an NVIDIA GPU" in message


def test_without_torchao_a_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"needs torchao.*megaslm\[float8\]"):
        use_float8(model_in_bf16(), "tensorwise")
