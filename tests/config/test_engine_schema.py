"""Our tables of DeepSpeed's keys against the DeepSpeed that is installed, and the shipped files in its hands."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from megaslm.config import engine_schema
from megaslm.config.engine_schema import REFUSED, REMOVED, STAGES, EngineConfig
from megaslm.config.explain import subfields

ROOT = Path(__file__).parents[2]


def accepted(section=""):
    kind = EngineConfig
    for name in filter(None, section.split(".")):
        kind = subfields(kind)[name]
    return set(subfields(kind))


def refused(section=""):
    start = f"{section}." if section else ""
    keys = {key.removeprefix(start) for key in {**REFUSED, **REMOVED} if key.startswith(start)}
    return {key for key in keys if "." not in key}


def test_tables_are_for_the_installed_version():
    assert version("deepspeed") == "0.19.8", "go through engine_schema.py for the new version"
    assert engine_schema.__doc__.startswith("The keys of a DeepSpeed 0.19.8 engine config")


def test_no_key_is_both_taken_and_refused():
    for section in ("", "zero_optimization", "bf16", "fp16", "data_types", "zero_optimization.offload_optimizer"):
        assert not accepted(section) & refused(section)
    assert set(STAGES) <= accepted("zero_optimization")


def test_sections_have_the_keys_of_deepspeeds_models():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }
    for section, model in models.items():
        theirs = {field.alias or name for name, field in model.model_fields.items()}
        gone = {key.rpartition(".")[2] for key in REMOVED if key.startswith(f"{section}.")}
        assert accepted(section) | (refused(section) - gone) == theirs, section
    assert accepted("aio") == set(AIO_DEFAULT_DICT)
    assert {key for key in REMOVED if "." not in key} == set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert {key.partition(".")[2] for key in REMOVED if "." in key} == set(_REMOVED_ZERO_CONFIG_KEYS)


class Recorder(dict):
    """A dict that remembers which keys it was asked for."""

    def __init__(self, **items):
        super().__init__(**items)
        self.asked = set()

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):
        return self

    def __copy__(self):
        return self


def test_top_level_and_data_types_have_the_keys_that_deepspeed_reads():
    from deepspeed.runtime.config import DeepSpeedConfig

    data_types = Recorder()
    top = Recorder(train_batch_size=1, data_types=data_types)
    DeepSpeedConfig(top)
    assert accepted("data_types") | refused("data_types") == data_types.asked
    assert top.asked <= accepted() | refused(), "keys we neither take nor refuse"
    # Read only when no process group is there, or only beside the older name of the block.
    elsewhere = {"sequence_parallel_size", "bfloat16"}
    assert accepted() | refused() <= top.asked | elsewhere | set(REMOVED), "keys DeepSpeed does not read"


STEPS = """
import json, logging, sys
import deepspeed, deepspeed.ops, torch
from deepspeed.accelerator import get_accelerator
from megaslm.config import load_engine_config, load_run_config, resolve_batch, resolve_engine_config

torch.set_num_threads(1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
deepspeed.utils.logging.logger.setLevel(logging.ERROR)
get_accelerator().is_fp16_supported = lambda: True  # most CPUs say no; slow, but the arithmetic is there
get_accelerator().supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]
run = load_run_config("quickstart", ["train.global_batch_size=8", "train.micro_batch_size=4"])
batch = resolve_batch(8, 4, 1)
for path, precision, dtype in (
    (path, precision, getattr(torch, name))
    for path in sys.argv[1:]
    for precision, name in (("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"))
):
    raw = load_engine_config(path)
    if raw["zero_optimization"]["stage"] == 0 and precision != "fp32":
        continue
    config = resolve_engine_config(raw, precision=precision, run=run, batch=batch, data_parallel_size=1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    losses = []
    for _ in range(2 * batch.accumulation_steps):
        x = torch.linspace(-1, 1, 4 * 16).view(4, 16).to(dtype)
        loss = (engine(x).float() - 1).pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    print("RESULT", json.dumps([path, precision, type(engine.optimizer).__name__, engine.global_steps, losses]))
    engine.destroy()
"""


def test_deepspeed_trains_two_steps_with_every_shipped_file_and_precision(free_port):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}
    files = [str(path) for path in sorted((ROOT / "ds_configs").glob("*.json"))]
    done = subprocess.run(
        [sys.executable, "-c", STEPS, *files],
        env=os.environ | ranks | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == 3 * len(files) - 2  # stage 0 in fp32 only
    reference = results[0][4]
    for path, precision, optimizer, steps, losses in results:
        tolerance = {"fp32": 1e-6, "bf16": 2e-2, "fp16": 5e-3}[precision]
        assert losses == pytest.approx(reference, rel=tolerance), (path, precision)
        assert steps == 2
        if (Path(path).stem, precision) == ("zero1", "bf16"):
            assert optimizer == "BF16_Optimizer"  # the fast path: one reduction per step, fp32 accumulation
