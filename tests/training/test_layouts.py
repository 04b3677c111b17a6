"""Layout never changes the numbers: ranks, accumulation, recomputation and padding give the same run.

The whole command, on data. Engines of every ZeRO stage and number of ranks are in test_tensor_parallel.py.
"""

import math
from pathlib import Path

import pytest
import torch

from megaslm.checkpoint import open_checkpoint
from megaslm.config import load_run_config
from megaslm.data import ValidationData, load_tokenizer
from megaslm.model import LanguageModel

ROOT = Path(__file__).resolve().parents[2]

# name: (ZeRO stage, overrides)
LAYOUTS = {
    "zero0": (0, []),
    "largest micro-batch": (1, ["train.micro_batch_size=8"]),
    "smallest micro-batch": (2, ["train.micro_batch_size=1"]),
    "zero2 recomputed": (2, ["train.activation_checkpointing=true"]),
    "zero3 recomputed": (3, ["train.activation_checkpointing=true"]),
}
REFERENCE = "zero0"
# Padding and documents, on a packed file: compared with each other.
PACKED = {
    "packed": (1, ["data.mask_documents=true"]),
    "packed, smallest micro-batch": (3, ["data.mask_documents=true", "train.micro_batch_size=1"]),
}


@pytest.fixture(scope="module")
def runs(preset, packed, pretrain_in_turn, tmp_path_factory) -> dict[tuple[int, str], Path]:
    """Run folders of 20 steps by (ranks, layout)."""
    folders = {}
    for ranks in (1, 2):
        commands = []
        of_packed = {name: (stage, [*o, f"data.train={packed}"]) for name, (stage, o) in PACKED.items()}
        for name, (stage, overrides) in (LAYOUTS | of_packed).items():
            folder = folders[ranks, name] = tmp_path_factory.mktemp(f"layout_{ranks}") / "run"
            engine = ["--ds_config", ROOT / "ds_configs" / f"zero{stage}.json"]
            commands.append({"arguments": ["--preset", preset, *engine, "--run_dir", folder, *overrides]})
        pretrain_in_turn(commands, ranks if ranks > 1 else None)
    return folders


OTHERS = [(ranks, name) for ranks in (1, 2) for name in LAYOUTS if (ranks, name) != (1, REFERENCE)]


@pytest.mark.parametrize(("ranks", "name"), OTHERS)
def test_every_layout_gives_the_same_losses_and_gradient_norms(runs, metrics, ranks, name):
    expected, found = metrics(runs[1, REFERENCE]), metrics(runs[ranks, name])
    assert [record["step"] for record in found] == list(range(1, 21))
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-5)


@pytest.mark.parametrize(("ranks", "name"), [(2, "packed"), (2, "packed, smallest micro-batch")])
def test_padding_and_documents_give_the_same_numbers_in_every_layout(runs, metrics, ranks, name):
    """Every rank and micro-batch has another number of targets that are not padding."""
    for kind, keys in (("train", ("loss", "grad_norm")), ("eval", ("loss", "bits_per_byte", "targets"))):
        expected, found = metrics(runs[1, "packed"], kind), metrics(runs[ranks, name], kind)
        for key in keys:
            assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-5)


def test_the_reference_run_clips_and_learns(runs, metrics):
    records = metrics(runs[1, REFERENCE])
    assert max(record["grad_norm"] for record in records) > 0.5, "clipping is not active"
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]


@pytest.mark.parametrize(("ranks", "name"), OTHERS)
def test_every_layout_evaluates_to_the_same_loss(runs, metrics, ranks, name):
    """Micro-batches of 1, 2 and 8 windows on 1 and 2 ranks, which do not divide the windows of the validation part."""
    (expected,), (found,) = metrics(runs[1, REFERENCE], "eval"), metrics(runs[ranks, name], "eval")
    assert found["targets"] == expected["targets"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize(("ranks", "name"), [(1, "zero0"), (2, "smallest micro-batch"), (2, "zero3 recomputed")])
def test_the_validation_loss_is_that_of_the_bare_model(runs, metrics, preset, ranks, name):
    """Against token by token arithmetic on the weights of the checkpoint, to 1e-6."""
    run = load_run_config(preset)
    tokenizer = load_tokenizer(run.tokenizer.path)
    config = run.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
    model = LanguageModel(config)
    checkpoint = open_checkpoint(runs[ranks, name] / "checkpoints" / "step_00000020", verify=False)
    model.load_state_dict({key: checkpoint.read(key) for key in checkpoint.shapes})

    (part,) = ValidationData([run.data.train[0].prefix], run.seq_length, run.data.split).parts
    ids = torch.from_numpy(part.tokens.astype("int64"))
    assert (len(ids) - 1) % run.seq_length, "the last window must be a short one"
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, run.seq_length):
            window = ids[start : start + run.seq_length + 1]
            log_probabilities = model(window[None, :-1])[0].double().log_softmax(-1)
            total -= log_probabilities.gather(-1, window[1:, None]).sum().item()

    (record,) = metrics(runs[ranks, name], "eval")
    assert record["targets"] == len(ids) - 1
    assert record["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-6)
    assert tokenizer.eod_id is None, "its bytes would have to be left out"
    num_bytes = len(tokenizer.decode(ids[1:].tolist()).encode())
    assert record["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-6)
