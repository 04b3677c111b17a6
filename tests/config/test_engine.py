"""The engine config: what is taken, filled in and refused."""

import json
from pathlib import Path

import pytest

from megaslm.config import (
    default_engine_config,
    load_engine_config,
    load_run_config,
    requested_precision,
    resolve_batch,
    resolve_engine_config,
)
from megaslm.config.engine import check_engine_config
from megaslm.errors import UserError

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
RUN = load_run_config("slm_tiny")  # global batch 32, micro-batch 8, clipping 1


def resolve(raw, precision="fp32", run=RUN, ranks=1):
    batch = resolve_batch(run.train.global_batch_size, run.train.micro_batch_size, ranks)
    return resolve_engine_config(raw, precision=precision, run=run, batch=batch, data_parallel_size=ranks)


def refusal(raw):
    with pytest.raises(UserError) as caught:
        check_engine_config(raw)
    return str(caught.value)


def zero(stage, **keys):
    return {"zero_optimization": {"stage": stage, **keys}}


# --- files ---


def test_shipped_files_load_and_the_default_is_zero1():
    files = sorted(path.stem for path in DS_CONFIGS.glob("*.json"))
    assert files == ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]
    loaded = {name: load_engine_config(DS_CONFIGS / f"{name}.json") for name in files}
    assert [loaded[name]["zero_optimization"]["stage"] for name in files] == [0, 1, 2, 3, 3]
    assert loaded["zero1"] == default_engine_config()
    assert all(not config["zero_optimization"].get("overlap_comm") for config in loaded.values())


def test_broken_files(tmp_path):
    path = tmp_path / "ds.json"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_engine_config(path)
    path.write_text('{"zero_optimization": {\n  "stage": 1,\n}}')
    with pytest.raises(UserError, match=r"ds\.json is not JSON: line [23]"):
        load_engine_config(path)
    path.write_text('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}')
    with pytest.raises(UserError, match="'bf16' is given twice"):
        load_engine_config(path)
    path.write_text('{"zero_optimisation": {"stage": 1}, "steps_per_print": 0}')
    with pytest.raises(UserError, match=r"(?s)ds\.json: 2 mistakes.*did you mean zero_optimization\?"):
        load_engine_config(path)


def test_whole_floats_are_counts(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 2e8}}')
    assert load_engine_config(path)["zero_optimization"]["reduce_bucket_size"] == 200_000_000


# --- keys and values ---


@pytest.mark.parametrize(
    "raw, says",
    [
        ({"gradient_cliping": 1.0}, "did you mean gradient_clipping?"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean zero_optimization?"),
        (zero(2, reduce_bucket=5), "did you mean zero_optimization.reduce_bucket_size?"),
        (zero(3, prefetch_bucket_size=5), "did you mean zero_optimization.stage3_prefetch_bucket_size?"),
        (zero(3, offload_optimizer={"devise": "cpu"}), "did you mean zero_optimization.offload_optimizer.device?"),
        ({"bf16": {"enable": True}}, "did you mean bf16.enabled?"),
        ({"data_types": {"grad_accumulation_dtype": "fp32"}}, "did you mean data_types.grad_accum_dtype?"),
        ({"timers": {"throughput": {"enabld": True}}}, "did you mean timers.throughput.enabled?"),
        ({"stage": 2}, "did you mean zero_optimization.stage?"),
    ],
)
def test_unknown_keys(raw, says):
    assert says in refusal(raw)


@pytest.mark.parametrize(
    "raw, says",
    [
        (zero(4), "zero_optimization.stage = 4: must be a whole number >= 0 and <= 3"),
        (zero(True), "zero_optimization.stage = true: must be a whole number >= 0 and <= 3"),
        ({"zero_optimization": {"overlap_comm": False}}, "zero_optimization.stage: missing"),
        ({"zero_optimization": True}, "zero_optimization = true: must be an object with stage"),
        (zero(2, reduce_bucket_size=0), "must be a whole number > 0"),
        (zero(2, reduce_bucket_size="auto"), "must be a whole number > 0"),
        (zero(2, overlap_comm="no"), "must be true or false"),
        ({"bf16": {}}, "bf16.enabled: missing, must be true, false or auto"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled = 1: must be true, false or auto"),
        ({"bf16": {"enabled": "yes"}}, 'bf16.enabled = "yes": must be true, false or auto'),
        ({"bf16": True}, "bf16 = true: must be an object with enabled"),
        ({"data_types": {"grad_accum_dtype": "float32"}}, "must be fp32, bf16 or fp16"),
        ({"communication_data_type": None}, "must be fp32, bf16 or fp16"),
        ({"fp16": {"enabled": True, "loss_scale": -1}}, "must be a number >= 0"),
        ({"train_batch_size": "all"}, "must be a whole number > 0"),
        (zero(3, offload_param={"device": "disk"}), "must be none, cpu or nvme"),
        (zero(3, offload_param={"device": "nvme"}), "offload_param.nvme_path: missing"),
        (zero(2, offload_optimizer={"device": "cpu", "ratio": 0.5}), "stage 3 only"),
    ],
)
def test_wrong_values(raw, says):
    assert says in refusal(raw)


@pytest.mark.parametrize(
    "key, says",
    [
        ("optimizer", "optimizer.*"),
        ("scheduler", "schedule.*"),
        ("tensorboard", "logging.tensorboard"),
        ("wandb", "logging.wandb"),
        ("checkpoint", "checkpoint.*"),
        ("activation_checkpointing", "train.activation_checkpointing"),
        ("compile", "train.compile"),
        ("dataloader_drop_last", "data.*"),
        ("flops_profiler", "MFU"),
        ("elasticity", "DeepSpeed removed"),
        ("amp", "DeepSpeed removed"),
        ("autotuning", "autotuner"),
        ("torch_autocast", "train.precision"),
        ("zero_optimization.cpu_offload", "offload_optimizer"),
        ("zero_optimization.mics_shard_size", "DeepSpeed removed MiCS"),
        ("data_types.param_dtype", "train.precision"),
        ("bf16.bf16_master_weights_and_grads", "fp32 master weights"),
    ],
)
def test_what_belongs_elsewhere_is_refused_with_the_place(key, says):
    raw = zero(2) | {"bf16": {"enabled": True}, "data_types": {}}
    section, _, name = key.rpartition(".")
    (raw[section] if section else raw)[name] = {"enabled": False}
    message = refusal(raw)
    assert message.startswith(f"Engine config: {key}: ") and says in message


@pytest.mark.parametrize(
    "raw, says",
    [
        (zero(2, stage3_prefetch_bucket_size=5), "acts in stage 3, not in 2"),
        (zero(3, round_robin_gradients=True), "acts in stages 1 and 2, not in 3"),
        (zero(0, reduce_bucket_size=5), "acts in stages 1, 2 and 3, not in 0"),
        (zero(1, offload_param={"device": "cpu"}), "acts in stage 3, not in 1"),
        (zero(0) | {"data_types": {"grad_accum_dtype": "bf16"}}, "stage 0 accumulates in fp32"),
    ],
)
def test_keys_that_do_nothing_in_the_stage_are_refused(raw, says):
    assert says in refusal(raw)


def test_all_mistakes_in_one_message():
    message = refusal({"optimizer": {}, "gradient_cliping": 1, **zero(9), "amp": {}})
    assert "4 mistakes" in message


# --- precision ---

AUTO, ON, OFF = {"enabled": "auto"}, {"enabled": True}, {"enabled": False}


@pytest.mark.parametrize(
    "blocks, train, device, expected",
    [
        ({}, "auto", "bf16", "fp32"),
        ({}, "bf16", "fp32", "bf16"),
        ({}, "fp16", "fp32", "fp16"),
        ({"bf16": AUTO}, "auto", "bf16", "bf16"),
        ({"bf16": AUTO}, "auto", "fp32", "fp32"),
        ({"bf16": AUTO}, "fp32", "bf16", "fp32"),
        ({"bf16": AUTO}, "fp16", "bf16", "fp16"),
        ({"bf16": AUTO, "fp16": AUTO}, "auto", "bf16", "bf16"),
        ({"fp16": AUTO}, "auto", "bf16", "fp32"),
        ({"bf16": ON}, "auto", "fp32", "bf16"),
        ({"bf16": ON}, "bf16", "fp32", "bf16"),
        ({"fp16": ON}, "auto", "bf16", "fp16"),
        ({"bf16": AUTO, "fp16": ON}, "auto", "bf16", "fp16"),
        ({"bf16": OFF}, "auto", "bf16", "fp32"),
        ({"bf16": OFF}, "fp16", "bf16", "fp16"),
        ({"bf16": OFF, "fp16": OFF}, "fp32", "bf16", "fp32"),
    ],
)
def test_requested_precision(blocks, train, device, expected):
    assert requested_precision(zero(1) | blocks, train, lambda: device) == expected


@pytest.mark.parametrize(
    "blocks, train",
    [({"bf16": ON}, "fp32"), ({"bf16": ON}, "fp16"), ({"bf16": OFF}, "bf16"), ({"fp16": ON}, "bf16")],
)
def test_contradicting_precisions(blocks, train):
    with pytest.raises(UserError, match=rf"train.precision={train} contradicts \w+.enabled = (true|false)"):
        requested_precision(zero(1) | blocks, train, lambda: "bf16")


def test_both_halves_are_refused():
    assert "choose one" in refusal({"bf16": ON, "fp16": ON})


@pytest.mark.parametrize("raw", [zero(0), {}])
def test_stage_0_is_fp32_only(raw):
    assert requested_precision(raw, "auto", lambda: "bf16") == "fp32"
    assert requested_precision(raw | {"bf16": AUTO}, "auto", lambda: "bf16") == "fp32"
    for blocks, train in (({}, "bf16"), ({}, "fp16"), ({"bf16": ON}, "auto"), ({"fp16": ON}, "fp16")):
        with pytest.raises(UserError, match="ZeRO stage 0 in (bf16|fp16).*zero1.json"):
            requested_precision(raw | blocks, train, lambda: "bf16")


def test_the_device_is_asked_only_when_it_decides():
    def never():
        raise AssertionError

    for raw, train in ((zero(1), "auto"), (zero(1) | {"bf16": AUTO}, "fp32"), (zero(0) | {"bf16": AUTO}, "auto")):
        assert requested_precision(raw, train, never) == "fp32"


# --- the dict for deepspeed.initialize ---


def test_resolved_zero1():
    raw = default_engine_config()
    assert resolve(raw, "bf16", ranks=2) == {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": 1, "overlap_comm": False, "reduce_bucket_size": 50_000_000},
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
    }
    assert raw == default_engine_config()  # left as it was


def test_resolved_config_is_json_and_passes_again():
    resolved = resolve(json.loads((DS_CONFIGS / "zero3_offload.json").read_text(), parse_float=lambda x: int(float(x))))
    assert resolve(json.loads(json.dumps(resolved))) == resolved


def test_fp16_writes_its_loss_scaling():
    fp16 = resolve(default_engine_config(), "fp16")["fp16"]
    assert fp16["enabled"] is True and fp16["loss_scale"] == 0 and fp16["initial_scale_power"] == 16
    raw = zero(1) | {"fp16": {"enabled": True, "initial_scale_power": 8}}
    assert resolve(raw, "fp16")["fp16"]["initial_scale_power"] == 8


def test_clipping_is_always_written():
    off = load_run_config("slm_tiny", ["optimizer.gradient_clipping=0"])
    assert resolve(zero(2), run=off)["gradient_clipping"] == 0
    assert resolve(zero(0))["gradient_clipping"] == 0  # the training code clips
    assert resolve({})["zero_optimization"] == {"stage": 0}


@pytest.mark.parametrize(
    "key, right, wrong",
    [
        ("train_batch_size", 32, 64),
        ("train_micro_batch_size_per_gpu", 8, 4),
        ("gradient_accumulation_steps", 4, 1),
        ("gradient_clipping", 1, 0.5),
    ],
)
@pytest.mark.parametrize("stage", [0, 1])
def test_what_the_run_config_owns(key, right, wrong, stage):
    expected = resolve(zero(stage))
    for value in ("auto", right):
        assert resolve(zero(stage) | {key: value}) == expected
    with pytest.raises(UserError, match=f"{key} = {wrong}, but the run config makes it {right}"):
        resolve(zero(stage) | {key: wrong})


def test_offload_of_torch_adamw_and_of_the_others():
    offload = zero(2, offload_optimizer={"device": "cpu"})
    assert resolve(offload)["zero_force_ds_cpu_optimizer"] is False
    with pytest.raises(UserError, match="zero_force_ds_cpu_optimizer = True"):
        resolve(offload | {"zero_force_ds_cpu_optimizer": True})
    assert "zero_force_ds_cpu_optimizer" not in resolve(zero(2, offload_optimizer={"device": "none"}))
    cpu_adam = load_run_config("slm_tiny", ["optimizer.type=deepspeed_cpu_adam"])
    assert "zero_force_ds_cpu_optimizer" not in resolve(offload, run=cpu_adam)
    apex = load_run_config("slm_tiny", ["optimizer.type=apex_fused_adam"])
    assert resolve(zero(2), run=apex)
    with pytest.raises(UserError, match="optimizer.type=apex_fused_adam works on the GPU"):
        resolve(offload, run=apex)


def test_accumulation_dtype_fits_the_precision():
    for precision, dtype in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32")):
        assert resolve(zero(1) | {"data_types": {"grad_accum_dtype": dtype}}, precision)
    for precision, dtype in (("fp32", "bf16"), ("bf16", "fp16"), ("fp16", "bf16")):
        with pytest.raises(UserError, match=f"grad_accum_dtype = {dtype} in a {precision} run"):
            resolve(zero(1) | {"data_types": {"grad_accum_dtype": dtype}}, precision)


def test_what_the_user_says_about_mechanics_stays():
    raw = zero(1, allgather_bucket_size=7) | {
        "steps_per_print": 5,
        "wall_clock_breakdown": True,
        "timers": {"throughput": {"enabled": True}},
        "communication_data_type": "fp32",
    }
    resolved = resolve(raw)
    assert all(resolved[key] == value for key, value in raw.items())


# --- tensor parallelism ---


def test_the_tensor_parallel_size_stands_in_the_run_config():
    message = refusal({"tensor_parallel": {"autotp_size": 2}})
    assert "tensor_parallel: say it in the run config: parallel.tensor_parallel_size" in message


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("zero_hpz_partition_size", 8, "would group ranks that hold different parts of the model"),
        ("zero_quantized_gradients", True, "would group ranks that hold different parts of the model"),
        ("zero_quantized_weights", True, "not verified"),
    ],
)
def test_what_does_not_go_with_tensor_parallelism(key, value, reason):
    assert resolve(zero(3, **{key: value}))["zero_optimization"][key] == value
    message = rf"zero_optimization.{key} does not go with parallel.tensor_parallel_size=2: .*{reason}; remove it, or "
    with pytest.raises(UserError, match=message + "take parallel.tensor_parallel_size=1"):
        resolve(zero(3, **{key: value}), run=load_run_config("slm_tiny", ["parallel.tensor_parallel_size=2"]))
