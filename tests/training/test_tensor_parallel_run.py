"""Tensor and sequence parallelism as a user meets them: overrides that change no number, and sizes that are refused."""

import json
from pathlib import Path

import pytest

THREE_HEADS = ["model.num_heads=3", "model.num_kv_heads=3", "model.head_dim=8"]
PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"


def sample(out: str) -> list[str]:
    """The texts that the model wrote."""
    lines = out.splitlines()
    return [lines[i + 1] for i, line in enumerate(lines) if line == "sample:"]


def test_four_ranks_give_the_run_of_one(pretrain_in_turn, command, preset, packed, metrics, tmp_path):
    """Two copies of the model, each on two ranks, in a process that has made groups of other sizes before. Documents
    are kept apart, and every rank has another number of targets that are not padding."""
    run = ["--preset", preset, f"data.train={packed}", "data.mask_documents=true", "train.max_steps=6"]
    run += ["optimizer.eps=1e-5", "logging.interval=2", "eval.interval=3", "eval.sample_tokens=12"]
    sizes = ["parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"]
    four = pretrain_in_turn([{"arguments": [*run, *sizes, "--run_dir", tmp_path / "four"]}], ranks=4).out
    one = command(*run, "--run_dir", tmp_path / "one")
    assert one.code == 0, one.err
    layout = " (2 data parallel x 2 tensor parallel, sequence parallel), ZeRO 1, micro-batch 2 x 2 accumulation"
    assert layout in four
    facts = json.loads((tmp_path / "four" / "environment.json").read_text())
    assert [facts[f"{kind}ranks"] for kind in ("", "data_parallel_", "tensor_parallel_")] == [4, 2, 2]

    for kind, keys in (("train", ("loss", "grad_norm", "tokens")), ("eval", ("loss", "bits_per_byte", "targets"))):
        expected, found = metrics(tmp_path / "one", kind), metrics(tmp_path / "four", kind)
        assert len(found) == len(expected) > 1
        for key in keys:
            assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-5)
    assert len(sample(four)) == 2 and sample(four) == sample(one.out)
    steps = [sorted(p.name for p in (tmp_path / name / "checkpoints").glob("step_*")) for name in ("four", "one")]
    assert steps[0] == steps[1] != []


@pytest.mark.parametrize(
    ("ranks", "overrides", "words"),
    [
        (2, ["parallel.tensor_parallel_size=4"], "needs a multiple of 4 ranks, and there are 2"),
        # Before an hour of tokenizing: what would be read is not even looked for.
        (
            2,
            ["parallel.tensor_parallel_size=2", *THREE_HEADS, "data.train=nowhere"],
            "3 attention heads and 3 key/value heads do not divide among 2 tensor-parallel ranks",
        ),
        (
            3,
            ["parallel.tensor_parallel_size=3", *THREE_HEADS, "model.ffn_hidden_size=48"],
            "a padded vocabulary of 128 do not divide among 3 tensor-parallel ranks",
        ),
    ],
)
def test_sizes_that_do_not_divide(fork_ranks, preset, tmp_path, ranks, overrides, words):
    arguments = ["--preset", preset, "--run_dir", tmp_path / "run", *overrides]
    assert words in fork_ranks(PRETRAIN, arguments, ranks).message()
    assert not (tmp_path / "run").exists()


def test_a_group_that_does_not_lie_on_one_node_is_noted(fork_ranks, preset, tmp_path):
    """Two ranks that take themselves for two nodes."""
    script = tmp_path / "two_nodes.py"
    script.write_text(
        "import os, runpy\n"
        "os.environ.update(LOCAL_RANK='0', LOCAL_WORLD_SIZE='1')\n"
        f"runpy.run_path({str(PRETRAIN)!r}, run_name='__main__')\n"
    )
    dry = ["--preset", preset, "--run_dir", tmp_path / "run", "--dry_run", "train.max_steps=1"]
    finished = fork_ranks(script, [*dry, "parallel.tensor_parallel_size=2"], 2)
    assert finished.code == 0, finished.err
    assert "2 tensor-parallel ranks do not lie on one node, which has 1" in finished.out
    assert "dry run: one step" in finished.out
