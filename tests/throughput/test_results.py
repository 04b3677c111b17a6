"""What is made of the figures: the terminal's table, RESULTS.md, the picture."""

import json
import math

import matplotlib.pyplot as plt
import pytest

from megaslm.errors import UserError
from megaslm.planning import LeftOut, Result, read_report
from megaslm.reports import write_json
from megaslm.throughput.plot import draw_results
from megaslm.throughput.results import result_lines, without_folders, write_report, write_results

TOKENS_PER_STEP = 8 * 1024
GPU = {"mfu": 0.451, "mfu_causal": 0.412, "memory_reserved_bytes": 5 * 2**30}
ENVIRONMENT = {
    "device": "Processor 9000", "cores": 2, "code_version": "abc123", "python": "3.11.9", "date": "2031-01-02",
    "packages": {"torch": "2.13.0"}, "command": ["tools/benchmark_throughput.py", "--output", "a b"],
}  # fmt: skip


@pytest.fixture
def result():
    """result(tokens_per_s, name=value, ...) -> Result, of a CPU if nothing is said."""

    def make(tokens_per_s: float, **changes) -> Result:
        ms = 1e3 * TOKENS_PER_STEP / tokens_per_s
        values = {
            "preset": "slm", "case": "megaslm", "compiled": "off", "model": {"hidden_size": 64}, "parameters": 1500000,
            "seq_length": 1024, "global_batch_size": 8, "micro_batch_size": 4, "accumulation_steps": 2,
            "world_size": 1, "zero_stage": 1, "tensor_parallel_size": 1, "activation_checkpointing": False,
            "precision": "fp32", "kernels": "reference", "steps": 10, "rounds": 3, "ms_per_step": ms, "spread_ms": 1.5,
            "tokens_per_s": tokens_per_s, "tokens_per_s_per_device": tokens_per_s,
            "phases_ms": {"data": 0.0, "forward": 0.25 * ms, "backward": 0.5 * ms, "optimizer": 0.2 * ms,
                          "rest": 0.05 * ms},
            "tflops": 0.02, "tflops_causal": 0.018, "mfu": None, "mfu_causal": None, "matmul_tflops": 0.05,
            "of_matmul_rate": 0.4, "memory_bytes": 3 * 2**30, "first_loss": 10.0, "last_loss": 9.5,
        }  # fmt: skip
        return Result(**values | changes)

    return make


@pytest.fixture
def write(tmp_path):
    """write(name, results, environment key=value, ...): a file as the benchmark writes it."""

    def to_file(name: str, results: list[Result], **environment):
        content = {"format": 1, "environment": ENVIRONMENT | environment, "options": {}}
        write_json(tmp_path / name, content | {"results": [one.model_dump() for one in results]})

    return to_file


def columns(lines: list[str]) -> list[str]:
    return lines[1].split()


def test_the_table_compares_with_the_fastest_of_megaslm(result):
    """Also where a peer is faster; in megaslm's favour is nothing rounded up."""
    lines = result_lines(
        [result(1000.0), result(2000.0, compiled="every block"), result(500.0, case="hf"), result(2500.0, case="ddp")]
    )
    assert lines[0].startswith(
        "slm: 1.5M parameters, steps of 8 x 1024 tokens, fp32, kernels reference, 1 rank, ZeRO-1"
    )
    place = lines[1].index("of megaslm")
    assert [line[place : place + len("of megaslm")].strip() for line in lines[2:6]] == ["0.50", "1.00", "0.25", "1.25"]
    assert [line.split()[0] for line in lines[2:6]] == ["megaslm", "megaslm", "transformers", "DDP"]
    assert "4 x 2" in lines[2] and "1,000" in lines[2] and "8,192.0 +- 1.5" in lines[2] and "40%" in lines[2]
    assert "3.00" in lines[2] and "2,048.0" in lines[2] and "10.0000 to 9.5000" in lines[2]


def test_columns_that_would_be_empty_are_left_out(result):
    on_cpu, on_gpu = (columns(result_lines([result(1000.0, **facts)])) for facts in ({}, GPU))
    assert "MFU" not in on_cpu and "causal" not in on_cpu and "with" not in on_cpu
    assert "MFU" in on_gpu and "causal" in on_gpu
    lines = result_lines([result(1000.0, float8="rowwise", cuda_graphs=True, **GPU), result(900.0, case="hf", **GPU)])
    assert "float8 rowwise, graphs" in lines[2] and "45.1%" in lines[2] and "41.2%" in lines[2]
    assert lines[3].split()[:3] == ["transformers", "off", "-"]


def test_every_preset_has_a_table(result):
    lines = result_lines([result(1000.0), result(10.0, preset="other"), result(500.0, case="hf")])
    titles = [line for line in lines if "parameters" in line]
    assert len(titles) == 2 and lines.count("") == 1
    other = lines[lines.index("") + 1 :]
    assert other[0].startswith("other: ") and len(other) == 3 and "1.00" in other[2]


@pytest.mark.parametrize(
    "precision, loss, is_comparable",
    [
        ("fp32", 10.0005, True),
        ("fp32", 10.002, False),
        ("bf16", 10.002, True),
        ("bf16", 9.8, False),
        ("fp32", math.nan, False),
    ],
)
def test_a_case_that_computes_something_else_is_marked(result, precision, loss, is_comparable):
    ours = result(1000.0, precision=precision)
    lines = result_lines([ours, result(500.0, case="ddp", precision=precision), result(
        500.0, case="hf", compiled="whole model", precision=precision, first_loss=loss
    )])  # fmt: skip
    marked = [line for line in lines if line.startswith("NOT COMPARABLE")]
    assert len(marked) == (not is_comparable)
    assert all("transformers, compiled" in line for line in marked)
    assert any(
        line.startswith(f"First losses differ from megaslm's by at most {abs(loss - 10) / 10:.1e}") for line in lines
    )


@pytest.mark.parametrize("loss, is_comparable", [(9.505, True), (9.52, False), (math.nan, False)])
def test_the_last_loss_counts_too(result, loss, is_comparable):
    lines = result_lines([result(1000.0), result(500.0, case="hf", last_loss=loss)])
    marked = [line for line in lines if line.startswith("NOT COMPARABLE: transformers, whose last loss")]
    assert len(marked) == (not is_comparable)
    assert any(line.startswith("Last losses differ") and "(bound in fp32: 0.001)" in line for line in lines)


def test_rates_are_of_all_ranks_and_of_one_and_memory_is_reserved(result):
    (_, header, row) = result_lines([result(3000.0, tokens_per_s_per_device=750.0, world_size=4, **GPU)])
    assert row[: header.index("per device") + 10].split()[-2:] == ["3,000", "750"]
    assert row[header.index("reserved") :].split()[0] == "5.00" and "reserved" not in result_lines([result(1.0)])[1]


def test_a_smaller_batch_and_an_attention_of_choice_are_in_the_title(result):
    title = result_lines([result(1000.0, run_global_batch_size=512, attention="cudnn")])[0]
    assert "steps of 8 x 1024 tokens (a run's: of 512)" in title and "cudnn attention" in title
    assert "a run's" not in result_lines([result(1000.0, run_global_batch_size=8)])[0]


def test_a_gap_that_is_not_known_is_said_and_not_drawn(result, tmp_path):
    ours = result(1000.0)
    ours = ours.model_copy(update={"phases_ms": ours.phases_ms | {"gap": None}})
    _, header, row, remark = result_lines([ours])
    assert row[header.index("rest") + 4 :].split()[:2] == ["not", "known"] and remark.startswith(
        "megaslm: the gap is not known"
    )
    draw_results([ours], "", tmp_path / "speed.png")


def test_what_was_left_out_is_told(result, tmp_path):
    missing = [
        LeftOut(preset="slm", case="hf", compiled=True, rounds=2, reason="/tmp/secret/x.bin is gone"),
        LeftOut(preset="slm", case="ddp", compiled=None, rounds=0, reason="no memory"),
    ]
    lines = result_lines([result(1000.0)], missing)
    assert lines[-1] == "LEFT OUT: slm, DDP: no memory"
    environment = ENVIRONMENT | {"command": ["--output", "/srv/me/throughput_x"], "variables": {"NCCL_DEBUG": "WARN"}}
    options = {"preset": ["/srv/me/mine.json"]}
    write_report(tmp_path / "throughput_x.json", environment, options, [result(1000.0)], missing)
    written = (tmp_path / "throughput_x.json").read_text()
    assert read_report(tmp_path / "throughput_x.json").results == [result(1000.0)]
    assert "secret" not in written and "/srv" not in written and '"mine.json"' in written
    text = write_results(tmp_path).read_text()
    assert "LEFT OUT after 2 rounds: slm, transformers, compiled: x.bin is gone" in text and "; with NCCL_DEBUG" in text


@pytest.mark.parametrize(
    "word, expected",
    [
        ("/a/b/c.json", "c.json"),
        ("data.train=/a/b", "data.train=b"),
        ('data.train=["/a/b", "c/d"]', 'data.train=["b", "c/d"]'),
        ("tokens/s of (/a/b:/c/d)", "tokens/s of (b:d)"),
        ("ds_configs/zero2.json", "ds_configs/zero2.json"),
        ("https://a.b/c", "https://a.b/c"),
    ],
)
def test_paths_from_the_root_become_names(word, expected):
    assert without_folders({"x": [word, 3]}) == {"x": [expected, 3]}


def test_a_compilation_that_fell_back_is_told_in_full(result):
    lines = result_lines([result(1000.0, compiled="fell back to eager: no compiler")])
    assert lines[2].split()[1:3] == ["fell", "back"]
    assert lines[-1] == "megaslm: fell back to eager: no compiler."


def test_the_page_has_every_file_under_its_device(result, write, tmp_path):
    write("throughput_cpu.json", [result(1000.0), result(500.0, case="hf")])
    write("throughput_h200.json", [result(9000.0, preset="big", precision="bf16", **GPU)], device="NVIDIA H200")
    write("throughput_h200_8.json", [result(70000.0, preset="big", world_size=8, **GPU)], device="NVIDIA H200")
    (tmp_path / "conversion_cpu.json").write_text("{}")
    path = write_results(tmp_path)
    text = path.read_text()
    assert path == tmp_path / "RESULTS.md" and str(tmp_path) not in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# Speed of training", "## Processor 9000", "### slm", "## NVIDIA H200", "### big", "### big"]
    assert "[throughput_cpu.json](throughput_cpu.json), 2031-01-02, 2 processor cores, code version abc123" in text
    assert "torch 2.13.0" in text and "    tools/benchmark_throughput.py --output 'a b'" in text
    assert "Measured: Processor 9000 (1 rank at most); NVIDIA H200 (8 ranks at most)." in text
    assert "Not measured" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 3 + 3 + 4
    assert {line.count("|") for line in tables[:4]} == {tables[0].count("|")}
    assert {line.count("|") for line in tables[4:]} == {tables[0].count("|") + 3}  # MFU, both, and reserved


def test_the_page_says_what_is_not_measured(result, write, tmp_path):
    assert "Measured: nothing yet." in write_results(tmp_path).read_text()
    write("throughput_cpu.json", [result(1000.0, world_size=2)])
    text = write_results(tmp_path).read_text()
    assert "Measured: Processor 9000 (2 ranks at most)." in text and "Not measured: any GPU." in text
    assert "--output benchmarks/throughput_h200" in text
    write("throughput_h100.json", [result(9000.0, **GPU)], device="NVIDIA H100")
    text = write_results(tmp_path).read_text()
    assert "any GPU" not in text and "Not measured: more than one GPU" in text


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda content: "{", "cannot be read"),
        (lambda content: [], "is not of tools/benchmark_throughput.py"),
        (lambda content: {"environment": {"torch": "2.13"}, "results": []}, "is not of tools/benchmark_throughput.py"),
        (lambda content: content | {"format": 2}, "has format 2, and this megaslm reads 1"),
        (lambda content: content | {"results": [{"preset": "slm"}]}, r"\(results.0.case: Field required\)"),
    ],
)
def test_a_file_that_is_not_ours_is_named(result, write, tmp_path, change, says):
    write("throughput_cpu.json", [result(1000.0)])
    path = tmp_path / "throughput_other.json"
    content = change(json.loads((tmp_path / "throughput_cpu.json").read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=says) as raised:
        write_results(tmp_path)
    assert str(raised.value).startswith(str(path)) and not (tmp_path / "RESULTS.md").exists()


def test_a_loss_that_is_no_number_comes_through_a_file(result, write, tmp_path):
    write("throughput_cpu.json", [result(1000.0), result(900.0, case="hf", first_loss=math.nan)])
    assert "NOT COMPARABLE: transformers" in write_results(tmp_path).read_text()


def test_the_picture_shows_speeds_and_phases(result, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    results = [result(1000.0), result(500.0, case="hf"), result(80.0, preset="big")]
    draw_results(results, "Processor 9000", tmp_path / "speed.png")
    monkeypatch.undo()
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    axes = figure.axes
    assert len(axes) == 4 and [axis.get_title() for axis in axes[::2]] == ["slm", "big"]
    assert [bar.get_width() for bar in axes[0].patches] == [1000.0, 500.0]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["megaslm", "transformers"]
    for axis, group in ((axes[1], results[:2]), (axes[3], results[2:])):
        ends = {round(bar.get_y(), 3): 0.0 for bar in axis.patches}
        for bar in axis.patches:
            assert bar.get_x() == pytest.approx(ends[round(bar.get_y(), 3)])
            ends[round(bar.get_y(), 3)] += bar.get_width()
        assert sorted(ends.values()) == pytest.approx(sorted(one.ms_per_step for one in group))
        assert axis.get_xlim()[1] > max(ends.values())
    plt.close(figure)
    with pytest.raises(UserError, match="cannot write"):
        draw_results(results, "", tmp_path / "not" / "there.png")
