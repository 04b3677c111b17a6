from pathlib import Path

import pytest
import torch

from megaslm.checkpoint import open_checkpoint
from megaslm.config import ModelConfig, load_run_config
from megaslm.data import load_tokenizer
from megaslm.generation import sample_tokens
from megaslm.model import LanguageModel, initialize_parameters

ROOT = Path(__file__).resolve().parents[2]
CONTEXT, VOCAB = 8, 50


@pytest.fixture
def model() -> LanguageModel:
    """Large weights, so that what comes next depends on what came before."""
    config = ModelConfig(
        vocab_size=VOCAB,
        context_length=CONTEXT,
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        ffn_hidden_size=32,
        init_std=1,
    )
    model = LanguageModel(config)
    initialize_parameters(model, config, seed=3)
    return model


PROMPT = torch.tensor([7, 1, 4])


@torch.no_grad()
def greedy(model: LanguageModel, tokens: list[int], count: int) -> list[int]:
    """The definition: the most probable token after the last CONTEXT ones, again and again."""
    generated: list[int] = []
    for _ in range(count):
        window = torch.tensor([(tokens + generated)[-CONTEXT:]])
        generated.append(int(model(window)[0, -1].argmax()))
    return generated


def test_greedy_is_the_argmax_of_the_last_logits_and_the_context_slides(model):
    expected = greedy(model, PROMPT.tolist(), 20)
    assert len(set(expected)) > 3, "the model repeats itself"
    assert sample_tokens(model, PROMPT, 20, temperature=0) == expected


def test_a_prompt_longer_than_the_context_counts_by_its_end(model):
    prompt = torch.arange(20)
    assert sample_tokens(model, prompt, 5, temperature=0) == greedy(model, prompt.tolist(), 5)
    assert sample_tokens(model, prompt, 5, seed=1) == sample_tokens(model, prompt[-CONTEXT:], 5, seed=1)


def test_the_seed_decides_and_the_global_generator_is_left_alone(model):
    torch.manual_seed(0)
    first = sample_tokens(model, PROMPT, 20, seed=1)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert sample_tokens(model, PROMPT, 20, seed=1) == first
    assert sample_tokens(model, PROMPT, 20, seed=2) != first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_top_k_one_is_greedy_and_top_k_zero_keeps_the_vocabulary(model):
    assert sample_tokens(model, PROMPT, 10, top_k=1) == greedy(model, PROMPT.tolist(), 10)
    few = {sample_tokens(model, PROMPT, 1, top_k=3, temperature=5.0, seed=seed)[0] for seed in range(200)}
    all_of_them = {sample_tokens(model, PROMPT, 1, top_k=0, temperature=50.0, seed=seed)[0] for seed in range(200)}
    with torch.no_grad():
        assert few == set(model(PROMPT[None])[0, -1].topk(3).indices.tolist())
    assert len(all_of_them) > 0.9 * VOCAB


def test_tokens_come_as_often_as_the_temperature_says(model):
    counts = torch.zeros(VOCAB)
    for seed in range(2000):
        counts[sample_tokens(model, PROMPT, 1, top_k=0, temperature=3.0, seed=seed)[0]] += 1
    with torch.no_grad():
        expected = (model(PROMPT[None])[0, -1] / 3.0).softmax(0)
    # Half the L1 distance; 2000 fair draws from 50 tokens stay well below.
    assert 0.5 * (counts / 2000 - expected).abs().sum() < 0.08


def test_the_stop_token_ends_the_text_and_is_left_out(model):
    whole = greedy(model, PROMPT.tolist(), 20)
    stop = whole[5]
    assert sample_tokens(model, PROMPT, 20, temperature=0, stop_id=stop) == whole[: whole.index(stop)]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_given_back(model, training):
    model.train(training)
    sample_tokens(model, PROMPT, 2)
    assert model.training is training


def test_no_tokens_asked_for_gives_none(model):
    assert sample_tokens(model, PROMPT, 0) == []


def test_zero_3_on_two_ranks_samples_what_its_whole_weights_give(preset, pretrain_in_turn, tmp_path):
    """Every forward gathers weights: ranks that fell out of step would hang."""
    engine = ["--ds_config", ROOT / "ds_configs" / "zero3.json"]
    sample = ["eval.interval=5", "eval.sample_tokens=60", "eval.sample_prompt=the cat", "train.max_steps=10"]
    arguments = ["--preset", preset, *engine, *sample, "--run_dir", tmp_path / "run"]
    out = pretrain_in_turn([{"arguments": arguments}], 2).out
    lines = out.splitlines()
    printed = [lines[i + 1].removeprefix("    ") for i, line in enumerate(lines) if line == "sample:"]
    assert len(printed) == 2

    run = load_run_config(str(tmp_path / "run" / "config.json"))
    model = LanguageModel(run.model)
    checkpoint = open_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000010", verify=False)
    model.load_state_dict({name: checkpoint.read(name) for name in checkpoint.shapes})
    tokenizer = load_tokenizer(run.tokenizer.path)
    generated = sample_tokens(
        model,
        torch.tensor(tokenizer.encode("the cat")),
        60,
        temperature=run.eval.sample_temperature,
        top_k=run.eval.sample_top_k,
        seed=run.train.seed + 10,
    )
    assert printed[1].rstrip() == ("the cat" + tokenizer.decode(generated)).rstrip()
