"""Tensor and sequence parallelism as a user meets them: overrides that change no number, a run that stops and continues
in another layout, and what is refused."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

SIZES = ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"]
THREE_HEADS = ["model.num_heads=3", "model.num_kv_heads=3", "model.head_dim=8"]
SPOILED = "decoder.blocks.1.attention_norm.weight"
ZERO_0 = Path(__file__).resolve().parents[2] / "ds_configs" / "zero0.json"

# What four ranks are given, the last one with more, and words of the one message.
REFUSED = [
    (["parallel.tensor_parallel_size=3"], [], "needs a multiple of 3 ranks, and there are 4"),
    # Before an hour of tokenizing: what would be read is not even looked for.
    (
        ["parallel.tensor_parallel_size=2", *THREE_HEADS, "data.train=nowhere"], [],
        "among 2 tensor-parallel ranks (parallel.tensor_parallel_size): attention heads 3, key/value heads 3",
    ),
    # Ranks that would wait for each other for ever.
    (
        [], ["parallel.tensor_parallel_size=2"],
        "the same parallel.tensor_parallel_size, and rank 0 was given 1, rank 3 2",
    ),
    (
        ["parallel.tensor_parallel_size=2"], ["parallel.sequence_parallel=true"],
        "parallel.sequence_parallel is False on rank 0 and True on rank 3",
    ),
    ([], ["--resume", "never"], "--resume is auto on rank 0 and never on rank 3"),
]  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """One start of four ranks, and where it left its runs: `whole` and `cut` are the same run, the one was stopped."""

    arguments: list
    whole: Path
    cut: Path
    refused: Path
    stream: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def four_ranks(pretrain_in_turn, preset, packed, tmp_path_factory) -> Runs:
    """Two copies of the model, each on two ranks, in a process that has made groups of other sizes before. Documents
    are kept apart, and every rank has another number of targets that are not padding."""
    base = tmp_path_factory.mktemp("four_ranks")
    whole, cut, spoiled, refused, stream = (base / name for name in ("whole", "cut", "spoiled", "refused", "stream"))
    run = ["--preset", preset, f"data.train={packed}", "data.mask_documents=true", "train.max_steps=6"]
    # eps: see layout_engines.py
    run += ["optimizer.eps=1e-5", "logging.interval=2", "eval.interval=3", "eval.sample_tokens=12"]
    dry = ["--preset", preset, "--dry_run", "train.max_steps=1", "--run_dir", refused, *SIZES[:1]]
    short = ["--preset", preset, "--ds_config", ZERO_0, "train.max_steps=2", *SIZES]
    commands = [
        {"arguments": [*run, *SIZES, "--run_dir", whole], "stream": stream},
        {"arguments": [*run, *SIZES, "--run_dir", cut], "signal": ["SIGTERM", 3, 1]},
        {"arguments": [*short, "--run_dir", spoiled], "spoiled": SPOILED},
        {"arguments": dry, "environment": {"LOCAL_WORLD_SIZE": "1"}},  # every rank takes itself for a node
    ]
    for arguments, of_last_rank, _ in REFUSED:
        command = ["--preset", preset, "--run_dir", refused, *arguments]
        commands.append({"arguments": command, "of_last_rank": of_last_rank, "code": 2})
    finished = pretrain_in_turn(commands, ranks=4)
    return Runs(run, whole, cut, refused, stream, finished.out, finished.err)


@pytest.fixture(scope="module")
def one_rank(four_ranks, pretrain_in_turn, tmp_path_factory) -> tuple[Path, str]:
    """The same run on one rank, and there the rest of the one that was stopped on four."""
    folder = tmp_path_factory.mktemp("one_rank") / "run"
    folders = (folder, four_ranks.cut)
    return folder, pretrain_in_turn([{"arguments": [*four_ranks.arguments, "--run_dir", f]} for f in folders], None).out


def sample(out: str) -> list[str]:
    """The texts that the model wrote."""
    lines = out.splitlines()
    return [lines[i + 1] for i, line in enumerate(lines) if line == "sample:"]


@pytest.mark.parametrize("run", ["whole", "cut"])
def test_four_ranks_give_the_run_of_one(four_ranks, one_rank, metrics, run):
    """`cut`: a signal reached the second rank of the first model at step 3, in the middle of a logging interval; one
    rank continued what the four had saved."""
    folder = getattr(four_ranks, run)
    for kind, keys in (
        ("train", ("step", "loss", "grad_norm", "tokens", "lr", "skipped_steps")),
        ("eval", ("step", "loss", "bits_per_byte", "targets")),
    ):
        expected, found = metrics(one_rank[0], kind), metrics(folder, kind)
        assert len(found) == len(expected) > 1
        for key in keys:
            assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-5)


def test_the_run_says_how_it_is_laid_out_and_is(four_ranks):
    layout = "ZeRO 1, micro-batch 2 x 2 accumulation x 2 data parallel x 2 tensor parallel, sequence parallel"
    assert layout in four_ranks.out
    assert four_ranks.stream.read_text() == "16", "of 32 tokens"
    facts = json.loads((four_ranks.whole / "environment.json").read_text())
    assert [facts[f"{kind}ranks"] for kind in ("", "data_parallel_", "tensor_parallel_")] == [4, 2, 2]


def test_it_stops_at_the_step_of_a_signal_to_any_rank_and_goes_on_there(four_ranks, one_rank):
    stopped = re.search(r"stopped by SIGTERM at step ([34]) of 6; the same command continues", four_ranks.out)
    assert stopped, four_ranks.out
    assert f"continuing from {four_ranks.cut}/checkpoints/step_0000000{stopped[1]} at step {stopped[1]}" in one_rank[1]


def test_samples_and_checkpoints_are_those_of_one_rank(four_ranks, one_rank):
    (first, second), of_four = sample(one_rank[1])[:2], sample(four_ranks.out)
    assert of_four[:2] == [first, second]
    steps = [sorted(p.name for p in (f / "checkpoints").glob("step_*")) for f in (four_ranks.whole, one_rank[0])]
    assert steps[0] == steps[1] != []


def test_a_save_warns_where_ranks_that_should_hold_the_same_do_not(four_ranks):
    """One rank's norm weight was changed. The other saves, of sound ranks, do not warn."""
    assert f"at step 2 tensor-parallel ranks hold different values of {SPOILED}, which" in four_ranks.out
    assert four_ranks.out.count("hold different values of") == 1


def test_what_can_not_be_is_one_message_before_anything_is_written(four_ranks):
    messages = four_ranks.err.split("error: ")[1:]
    assert len(messages) == len(REFUSED), four_ranks.err
    for message, (_, _, words) in zip(messages, REFUSED, strict=True):
        assert words in message
    assert "Traceback" not in four_ranks.err
    assert not four_ranks.refused.exists()


def test_a_group_that_does_not_lie_on_one_node_is_noted(four_ranks):
    assert "2 tensor-parallel ranks do not lie on one node, which has 1" in four_ranks.out
    assert "dry run: one step" in four_ranks.out
