"""data.order, data.mask_documents, named validation sets and packed files, from the command to the numbers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megaslm.checkpoint import open_checkpoint
from megaslm.config import load_run_config
from megaslm.data import TrainingData, ValidationData, load_tokenizer
from megaslm.model import LanguageModel, initialize_parameters
from megaslm.training import report


def bare_model(preset: str, run_dir=None) -> LanguageModel:
    """With the initial weights, or those of the last checkpoint."""
    run = load_run_config(preset)
    config = run.model.model_copy(update={"vocab_size": load_tokenizer(run.tokenizer.path).vocab_size})
    model = LanguageModel(config)
    initialize_parameters(model, config, run.train.seed)
    if run_dir is not None:
        checkpoint = open_checkpoint(sorted((run_dir / "checkpoints").iterdir())[-1], verify=False)
        model.load_state_dict({key: checkpoint.read(key) for key in checkpoint.shapes})
    return model


@torch.no_grad()
def loss_of_each_document_by_itself(model: LanguageModel, windows: np.ndarray, first_tokens: set, start: int) -> float:
    """Sum over `windows` [N, S + 1], of which the first begins at token `start` of its file and the others follow.

    first_tokens: where documents start in the file.
    """
    total = 0.0
    for number, window in enumerate(torch.from_numpy(windows.astype("int64"))):
        begin = start + number * (len(window) - 1)
        cuts = [0, *(i for i in range(1, len(window) - 1) if begin + i in first_tokens), len(window) - 1]
        for low, high in zip(cuts, cuts[1:], strict=False):
            logits = model(window[None, low:high])[0]
            total += F.cross_entropy(logits, window[low + 1 : high + 1], reduction="sum").item()
    return total


def test_masked_documents_are_evaluated_as_each_by_itself(command, preset, metrics, tmp_path):
    arguments = ["--preset", preset, "--run_dir", tmp_path, "train.max_steps=3", "eval.max_sequences=20"]
    finished = command(*arguments, "data.mask_documents=true")
    assert finished.code == 0, finished.err
    (record,) = metrics(tmp_path, "eval")
    run = load_run_config(preset)
    (part,) = ValidationData([run.data.train[0].prefix], run.seq_length, run.data.split).parts
    windows = np.lib.stride_tricks.sliding_window_view(part.tokens, 33)[::32][:20]
    first_tokens = set((part.file.sequence_offsets // part.file.dtype.itemsize).tolist())
    model, num_targets = bare_model(preset, tmp_path), 20 * 32
    masked, crossed = (
        loss_of_each_document_by_itself(model, windows, documents, part.first) / num_targets
        for documents in (first_tokens, set())
    )
    assert record["targets"] == num_targets
    assert record["loss"] == pytest.approx(masked, rel=1e-6)
    assert abs(masked / crossed - 1) > 1e-4, "no document ends inside of a window"

    message = command(*arguments, "train.max_steps=4").message()
    assert "data.mask_documents was true and is not set" in message


@pytest.mark.parametrize(
    ("mask_documents", "device", "flash", "noted"),
    [
        (True, "cuda", False, True),
        (True, "cuda", True, False),
        (True, "cpu", False, False),
        (False, "cuda", False, False),
    ],
)
def test_a_mask_instead_of_flash_attention_is_noted(
    ranks_of, preset, monkeypatch, mask_documents, device, flash, noted
):
    run = load_run_config(preset, [f"data.mask_documents={str(mask_documents).lower()}", "train.kernels=reference"])
    monkeypatch.setattr(report, "separates_by_flash", lambda *_: flash)
    plan = SimpleNamespace(
        run=run, steps=10**6, precision="bf16", layout=SimpleNamespace(micro_batch_size=run.train.micro_batch_size),
        ranks=ranks_of(device=torch.device(device)),
    )  # fmt: skip
    assert ["kept apart by a mask" in note for note in report._notes(plan, "off")] == [True] * noted


def test_named_validation_sets_are_reported_one_by_one(command, preset, corpus, packed, metrics, tmp_path):
    arguments = ["--preset", preset, "train.max_steps=2", "eval.max_sequences=20", "--run_dir"]
    named = f'data.validation={{"own": "{corpus.prefix}", "all-2": ["{packed}", "{corpus.prefix}"]}}'
    finished = command(*arguments, tmp_path / "named", named)
    assert finished.code == 0, finished.err
    (record,) = metrics(tmp_path / "named", "eval")
    sets = record["sets"]
    assert list(sets) == ["own", "all-2"]
    assert sets["own"]["targets"] == 20 * 32 > sets["all-2"]["targets"], "padding is no target"
    assert record["targets"] == sum(part["targets"] for part in sets.values())
    mean = sum(part["loss"] * part["targets"] for part in sets.values()) / record["targets"]
    assert record["loss"] == pytest.approx(mean, rel=1e-12)
    for name, part in sets.items():
        assert f"    {name:<5}  loss {part['loss']:.4f} | perplexity" in finished.out
        assert f"{name} " in finished.out.split("summary")[1]
    (step,) = (tmp_path / "named" / "checkpoints").iterdir()
    assert open_checkpoint(step, verify=False).manifest["marks"]["validation_loss"] == record["loss"]

    assert command(*arguments, tmp_path / "plain", f"data.validation={corpus.prefix}").code == 0
    (plain,) = metrics(tmp_path / "plain", "eval")
    assert plain["loss"] == sets["own"]["loss"] and "sets" not in plain


def test_a_run_in_megatrons_order_is_continued_exactly(command, preset, numbers, stopped_at_step, tmp_path):
    arguments = ["--preset", preset, "data.order=megatron", "logging.interval=3", "train.max_steps=10", "--run_dir"]
    assert command(*arguments, tmp_path / "whole").code == 0
    (step,) = (tmp_path / "whole" / "checkpoints").iterdir()
    assert open_checkpoint(step, verify=False).global_state["data"]["num_samples"] == 10 * 8
    assert (
        command("--preset", preset, "logging.interval=3", "train.max_steps=10", "--run_dir", tmp_path / "w").code == 0
    )
    assert numbers(tmp_path / "whole")[0]["loss"] != numbers(tmp_path / "w")[0]["loss"]
    with stopped_at_step(5):
        assert "stopped by SIGTERM at step 5 of 10" in command(*arguments, tmp_path / "cut").out
    # A run of so many epochs would have had another first half.
    message = command(*arguments, tmp_path / "cut", "train.max_steps=5000").message()
    assert "Megatron's order" in message and "epochs" in message
    message = command(*arguments, tmp_path / "cut", "data.order=windows").message()
    assert "order" in message and "megatron" in message
    assert "at step 5" in command(*arguments, tmp_path / "cut").out
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("order", ["windows", "megatron"])
def test_a_run_goes_on_at_the_sample_that_another_one_came_to(command, preset, metrics, tmp_path, order):
    """Its second half by itself, from the first weights and with its own schedule: the same losses at a rate of next to
    nothing, where batches alone decide; and resumed exactly."""
    arguments = ["--preset", preset, f"data.order={order}", "logging.interval=1", "optimizer.lr=1e-12", "--run_dir"]
    assert command(*arguments, tmp_path / "whole", "train.max_steps=8").code == 0
    half = [tmp_path / "half", "data.first_sample=32"]
    finished = command(*arguments, *half, "train.max_steps=2")
    assert finished.code == 0 and f"{order} order from sample 32 on" in finished.out, finished.err
    assert command(*arguments, *half, "train.max_steps=4").code == 0
    whole, found = metrics(tmp_path / "whole"), metrics(tmp_path / "half")
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in whole[4:]], rel=1e-6)
    assert found[0]["loss"] != pytest.approx(whole[0]["loss"], rel=1e-4)
    state = open_checkpoint(tmp_path / "half" / "checkpoints" / "step_00000004", verify=False).global_state
    assert state["progress"]["samples"] == 32
    assert state["data"].get("num_samples") == (64 if order == "megatron" else None)
    message = command(*arguments, tmp_path / "half", "train.max_steps=6").message()
    assert "data.first_sample was 32 and is not set" in message
    if order == "windows":  # other weights are in force from the next sample on
        prefix = load_run_config(preset).data.train[0].prefix
        assert command(*arguments, *half, "train.max_steps=5", f'data.train=["{prefix}", "{prefix}"]').code == 0
        state = open_checkpoint(tmp_path / "half" / "checkpoints" / "step_00000005", verify=False).global_state
        assert [segment["start_sample"] for segment in state["data"]["segments"]] == [0, 64]


def test_the_padding_of_packed_files_is_not_trained_on(command, preset, packed, metrics, tmp_path):
    """The loss of the first step, against a bare model; and the same under another accumulation."""
    arguments = ["--preset", preset, f"data.train={packed}", "train.max_steps=4"]
    found = []
    for micro in (2, 8):
        finished = command(*arguments, f"train.micro_batch_size={micro}", "--run_dir", tmp_path / f"{micro}")
        assert finished.code == 0, finished.err
        found.append(metrics(tmp_path / f"{micro}"))
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in found[0]] == pytest.approx([r[key] for r in found[1]], rel=1e-5)
    run = load_run_config(preset)
    data = TrainingData([(packed, 1.0)], run.seq_length, run.train.seed, run.data.split)
    windows = torch.from_numpy(data.batch(0, 8).tokens.astype("int64"))
    tokens, targets = windows[:, :-1], windows[:, 1:].clone()
    targets[(tokens == data.ignore_repeated_eod) & (targets == data.ignore_repeated_eod)] = -100
    assert 0 < (targets == -100).sum() < targets.numel() / 2
    logits = bare_model(preset)(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert found[0][0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    share = f"({100 * data.padding_share:.1f} % padding)"
    assert f"training tokens {share} in windows order" in finished.out and f"validation {share} targets" in finished.out
