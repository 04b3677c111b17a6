"""tools/benchmark_generation.py on a model so small that nothing of its figures is of interest."""

import json
import re

import pytest

from megaslm.generation import generator

TINY = [
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.vocab_size=99",
]
SHORT = ("--prompt_tokens", 5, "--new_tokens", 6, "--rounds", 2, "--batch_sizes", 1, 3)


def test_figures_are_of_equal_tokens_and_written_without_paths(run_tool, tmp_path):
    finished = run_tool("benchmark_generation.py", *TINY, *SHORT, "--json", tmp_path / "figures.json")
    assert finished.code == 0 and finished.out.count("100.0%") == 2
    text = (tmp_path / "figures.json").read_text()
    figures = json.loads(text)
    assert str(tmp_path) not in text
    for one, batch_size in zip(figures["results"], (1, 3), strict=True):
        assert one["batch_size"] == batch_size and one["equal_tokens"] == 1
        ours, theirs = (sorted(one["seconds"][name]) for name in ("megaslm", "transformers"))
        assert len(ours) == len(theirs) == 2
        assert one["ratio"] == pytest.approx(sum(theirs) / sum(ours))
        assert one["tokens_per_s"]["megaslm"] == pytest.approx(batch_size * 6 / (sum(ours) / 2))


def test_other_tokens_than_those_of_transformers_are_an_error(run_tool, monkeypatch):
    """With the first place, and the gap of the logits there."""
    real = generator._Batch._choose

    def second_best(self, logits_BV, step):
        next_B, largest_B = real(self, logits_BV, step)
        return (logits_BV.topk(2).indices[:, 1] if step == 2 else next_B), largest_B

    monkeypatch.setattr(generator._Batch, "_choose", second_best)
    message = run_tool("benchmark_generation.py", *TINY, *SHORT).message()
    assert "are those of transformers; in row 1 the first other one is token 3, " in message
    gap = float(re.search(r"whose logits are (\S+) apart", message)[1])
    assert gap > 0


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("--rounds", 0), "--rounds 0: give 1 or more"),
        (("--batch_sizes", 1, 0), "--batch_sizes 0: give 1 or more"),
        (("--new_tokens", 5000, *TINY), "more than the model's context of 2048"),
        (("--model", "x", *TINY), "model.num_layers=1 is of a preset"),
        (("--model", "x", "--preset", "slm_small"), "--preset slm_small is of a preset"),
        (("--json", "not/there/x.json"), "a folder that is there"),
    ],
)
def test_mistakes(run_tool, arguments, says):
    assert says in run_tool("benchmark_generation.py", *arguments).message()
