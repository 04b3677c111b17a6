"""Every mistake of a user: one message that says what to do, exit code 2, no traceback, and nothing is lost."""

import hashlib
import json
import math
import resource
import shutil
from pathlib import Path

import pytest

from megaslm.config import ModelConfig
from megaslm.data import ascii_tokenizer, build_token_file, character_tokenizer, load_tokenizer
from megaslm.data.sources import TextSource

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "launch" / "pretrain.py"


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder with its hash; not the lock, which says who looked at it last."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- mistakes that are found before torch is imported -------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.seq_length=64"], ["data.seq_length 64", "model.context_length 32"]),
        (["model.num_heads=5"], ["hidden_size 32", "num_heads 5"]),
        (["model.num_kv_heads=3"], ["num_heads 4", "num_kv_heads 3"]),
        (["train.max_step=5"], ["train.max_step", "did you mean train.max_steps?"]),
        (["optim.lr=1"], ["did you mean optimizer.lr?"]),
        (["train.max_steps=many"], ["train.max_steps", '"many"', "a whole number"]),
        (["--preset", "slm_tyni"], ["slm_tyni", "did you mean slm_tiny?"]),
        (["--ds_config", "nowhere.json"], ["nowhere.json", "No such file"]),
    ],
)
def test_a_mistake_in_the_run_config(pretrain, preset, tmp_path, overrides, words):
    message = pretrain("--preset", preset, "--run_dir", tmp_path / "run", *overrides).message()
    assert [word for word in words if word not in message] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"zero_optimisation": {"stage": 2}}, ["zero_optimisation", "did you mean zero_optimization?"]),
        ({"zero_optimization": {"stage": 2, "bucket": 1}}, ["zero_optimization.bucket", "unknown key"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer"]),
    ],
)
def test_a_key_of_the_engine_config_that_is_unknown_or_not_its_own(pretrain, preset, write_json, engine, words):
    message = pretrain("--preset", preset, "--ds_config", write_json("engine.json", engine)).message()
    assert [word for word in ["engine.json", *words] if word not in message] == []


# --- mistakes that are found with the data, the ranks and the device at hand -----------------------------------------


def test_no_data(command, tiny, write_json, tmp_path):
    preset = write_json("no_data.json", {**tiny, "data": {}})
    message = command("--preset", preset, "--run_dir", tmp_path / "run").message()
    assert "data.input=" in message and "data.train=" in message


@pytest.mark.parametrize("key", ["data.train", "data.input"])
def test_data_that_is_not_there(command, preset, tmp_path, key):
    message = command("--preset", preset, "--run_dir", tmp_path / "run", f"{key}={tmp_path}/nothing").message()
    assert f"{tmp_path}/nothing" in message
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_does_not_match_the_token_files(command, preset, corpus, tmp_path):
    ascii_tokenizer().save(tmp_path / "ascii")
    message = command("--preset", preset, "--run_dir", tmp_path / "run", f"tokenizer.path={tmp_path}/ascii").message()
    assert corpus.prefix in message and "tokenizer" in message
    assert not (tmp_path / "run").exists()


@pytest.fixture
def bare(corpus, tmp_path) -> list:
    """Overrides for token files without manifest and without tokenizer, as other programs write them."""
    for ending in (".bin", ".idx"):
        shutil.copy(corpus.prefix + ending, tmp_path / f"bare{ending}")
    return [f"data.train={tmp_path}/bare", "tokenizer.path=null"]


@pytest.mark.parametrize("tokenizer", [["tokenizer.path=null"], []])
def test_token_ids_over_the_vocabulary(command, preset, corpus, tmp_path, tokenizer):
    message = command("--preset", preset, "--run_dir", tmp_path / "run", *tokenizer, "model.vocab_size=5").message()
    assert f"{corpus.vocab_size} tokens" in message and "model.vocab_size is 5" in message
    assert not (tmp_path / "run").exists()


def test_token_ids_over_the_vocabulary_in_files_without_a_manifest(command, preset, bare, tmp_path):
    """They are checked batch by batch."""
    message = command("--preset", preset, "--run_dir", tmp_path / "run", *bare, "model.vocab_size=5").message()
    assert f"{tmp_path}/bare.bin" in message and "vocabulary of 5 tokens" in message


def test_an_unknown_vocabulary(command, preset, bare, tmp_path):
    message = command("--preset", preset, "--run_dir", tmp_path / "run", *bare).message()
    assert "tokenizer.path=" in message and "model.vocab_size=" in message


def test_batch_sizes_that_do_not_multiply_out(fork_ranks, preset, tmp_path):
    batch = ["train.global_batch_size=3", "--run_dir", tmp_path / "run"]
    message = fork_ranks(PRETRAIN, ["--preset", preset, *batch], 2).message()
    assert "train.global_batch_size 3" in message and "2 data-parallel ranks" in message and "2 and 4" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"train_batch_size": 64}, ["train_batch_size = 64", "train.global_batch_size"]),
        ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps = 2", "4"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping = 1", "optimizer.gradient_clipping"]),
        ({"bf16": {"enabled": True}}, ["train.precision=fp32", "bf16.enabled"]),
    ],
)
def test_an_engine_config_that_contradicts_the_run_config(command, preset, write_json, tmp_path, engine, words):
    engine = write_json("engine.json", {"zero_optimization": {"stage": 1}, **engine})
    message = command("--preset", preset, "--run_dir", tmp_path / "run", "--ds_config", engine).message()
    assert [word for word in words if word not in message] == []
    assert not (tmp_path / "run").exists()


def test_stage_0_with_bf16(command, preset, tmp_path):
    engine = ["--ds_config", ROOT / "ds_configs" / "zero0.json", "train.precision=bf16"]
    message = command("--preset", preset, "--run_dir", tmp_path / "run", *engine).message()
    assert "stage 0" in message and "zero1.json" in message


def test_an_optional_package_that_is_not_installed(command, preset, tmp_path):
    arguments = ["--preset", preset, "--run_dir", tmp_path / "run", "optimizer.type=apex_fused_adam"]
    message = command(*arguments).message()
    assert "apex" in message and "optimizer.type=adamw" in message


# --- run folders and checkpoints -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(preset, pretrain_in_turn, tmp_path_factory) -> Path:
    """Run folder with checkpoints of steps 5 and 10, its end."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    arguments = ["--preset", preset, "--run_dir", folder, "train.max_steps=10", "checkpoint.interval=5"]
    pretrain_in_turn([{"arguments": arguments}], None)
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def go_on(preset, folder) -> list:
    """The same command, to step 12."""
    return ["--preset", preset, "--run_dir", folder, "checkpoint.interval=5", "train.max_steps=12"]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["weights_00000.safetensors", "exp_avg_00000.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(command, metrics, folder, go_on, name):
    flip_a_byte(folder / "checkpoints" / "step_00000010" / name)
    result = command(*go_on)
    assert result.code == 0, result.err
    assert "step_00000010 is damaged: " + name in result.out
    assert f"continuing from {folder}/checkpoints/step_00000005 at step 5" in result.out
    assert [record["step"] for record in metrics(folder)] == list(range(1, 13))


def test_no_sound_checkpoint(command, folder, go_on):
    flip_a_byte(folder / "checkpoints" / "step_00000010" / "weights_00000.safetensors")
    (folder / "checkpoints" / "step_00000005" / "exp_avg_sq_00000.safetensors").unlink()
    before = contents(folder)
    message = command(*go_on).message()
    assert "none of the 2 checkpoints" in message
    assert "weights_00000.safetensors" in message and "exp_avg_sq_00000.safetensors is missing" in message
    assert contents(folder) == before


def test_a_foreign_checkpoint(command, folder, go_on):
    foreign = folder / "checkpoints" / "step_00000020"
    foreign.mkdir()
    (foreign / "mp_rank_00_model_states.pt").write_bytes(b"pickle")
    before = contents(folder)
    message = command(*go_on).message()
    assert str(foreign) in message and "it looks like a DeepSpeed checkpoint" in message
    assert contents(folder) == before


# What may not change over a run, each with a value of the run in `folder` and another one.
OTHER_MODEL = {
    "vocab_size": (16, 20),
    "context_length": (32, 64),
    "num_layers": (2, 3),
    "hidden_size": (32, 48),
    "num_heads": (4, 6),
    "num_kv_heads": (2, 3),
    "head_dim": (8, 16),
    "ffn_hidden_size": (64, 96),
    "norm": ("rmsnorm", "layernorm"),
    "norm_eps": (1e-5, 1e-6),
    "qk_norm": (True, False),
    "rope_theta": (10000.0, 500.0),
    "rope_fraction": (1.0, 0.5),
    "rope_scaling": ("none", "yarn"),
    "rope_scaling_factor": (1.0, 2.0),
    "rope_original_context": (None, 16),
    "feed_forward": ("swiglu", "gelu"),
    "parallel_residual": (False, True),
    "bias": (False, True),
    "tie_embeddings": (False, True),
    "init_std": (math.sqrt(2 / (5 * 32)), 0.02),
    "position": ("rope", "learned"),
}
OTHER_RUNS = {
    # Learned positions leave no room for settings of the rotary ones.
    "model": {f"model.{key}": values for key, values in OTHER_MODEL.items() if key != "position"},
    "position": {"model.position": OTHER_MODEL["position"]},
    "layers": {"model.num_layers": (2, 3)},
    "several": {"model.ffn_hidden_size": (64, 96), "train.seed": (1234, 5)},
    "seed": {"train.seed": (1234, 5)},
    "global batch": {"train.global_batch_size": (8, 16)},
    "sequence length": {"data.seq_length": (32, 16)},
}


@pytest.mark.parametrize("changed", OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_the_folder_of_another_run_names_what_differs_and_nothing_else(command, folder, go_on, changed):
    before = contents(folder)
    message = command(*go_on, *(f"{name}={json.dumps(other)}" for name, (_, other) in changed.items())).message()
    assert "the checkpoint is of another run: " in message and "Set these back" in message
    differences = {
        name: f"{name} was {json.dumps(ours)} and is {json.dumps(other)}" for name, (ours, other) in changed.items()
    }
    if "model.context_length" in changed:  # which the sequences fill
        differences["data.seq_length"] = "data.seq_length was 32 and is 64"
    named = message.partition("another run: ")[2].partition(". Set these back")[0]
    assert named.split("; ") == [differences[name] for name in sorted(differences)]
    assert contents(folder) == before


def test_no_setting_of_the_model_is_forgotten():
    assert OTHER_MODEL.keys() == ModelConfig.model_fields.keys()


@pytest.fixture
def tokenized(corpus, tmp_path):
    """tokenized(text, tokenizer) -> overrides for token files of another text, or by another tokenizer."""

    def build(text: Path, tokenizer) -> list[str]:
        tokenizer.save(tmp_path / "tokenizer")
        build_token_file(iter(TextSource([text])), tokenizer, str(tmp_path / "other"))
        return [f"data.train={tmp_path}/other", f"tokenizer.path={tmp_path}/tokenizer"]

    return build


def test_another_tokenizer_is_another_run(command, corpus, folder, go_on, tokenized):
    """One of as many symbols: the shapes of the weights would not tell."""
    ours = load_tokenizer(corpus.tokenizer)
    symbols = ours.decode(range(ours.vocab_size))
    assert "d" in symbols and "z" not in symbols
    other = character_tokenizer([symbols.replace("d", "z")])
    assert other.vocab_size == ours.vocab_size
    before = contents(folder)
    message = command(*go_on, *tokenized(corpus.text, other)).message()
    assert f'of another run: tokenizer was "{ours.fingerprint}" and is "{other.fingerprint}". Set' in message
    assert contents(folder) == before


def test_another_text_is_another_run(command, corpus, folder, go_on, tokenized, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(reversed(corpus.text.read_text().splitlines(keepends=True))))
    before = contents(folder)
    message = command(*go_on, *tokenized(text, load_tokenizer(corpus.tokenizer))).message()
    assert f"dataset 0, {tmp_path}/other, is not what the checkpoint was trained on ({corpus.prefix})" in message
    assert "its fingerprint is " in message and "another run" not in message
    assert contents(folder) == before


def test_other_data_is_named_by_what_differs(command, folder, go_on):
    before = contents(folder)
    message = command(*go_on, "data.split=90,10").message()
    assert "its tokens is " in message
    assert "{" not in message and "model." not in message
    assert contents(folder) == before


def test_token_files_that_were_moved_are_the_same_data(command, corpus, folder, go_on, tmp_path):
    for ending in (".bin", ".idx", ".json"):
        shutil.copy(corpus.prefix + ending, tmp_path / f"moved{ending}")
    result = command(*go_on, f"data.train={tmp_path}/moved")
    assert result.code == 0, result.err
    assert "continuing from" in result.out


def test_resume_never_leaves_a_run_alone(command, folder, go_on):
    before = contents(folder)
    assert "already holds a run" in command(*go_on, "--resume", "never").message()
    assert contents(folder) == before


def test_a_run_folder_that_cannot_be_written(command, preset, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = command("--preset", preset, "--run_dir", tmp_path / "file" / "run", "train.max_steps=1").message()
    assert f"{tmp_path}/file/run" in message and "--run_dir" in message


def test_a_full_disk_while_saving_loses_nothing(pretrain, command, metrics, folder, go_on):
    """A limit on the size of files stands for the disk: the log fits, a checkpoint does not."""
    limit = 60_000
    weights = folder / "checkpoints" / "step_00000010" / "weights_00000.safetensors"
    assert (folder / "metrics.jsonl").stat().st_size < limit / 4 < limit < weights.stat().st_size
    before = contents(folder / "checkpoints")

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    message = pretrain(*go_on, preexec_fn=small_files).message()
    assert "could not save the checkpoint of step 12" in message
    assert "the last sound checkpoint is step_00000010" in message
    assert "run the same command again" in message
    assert contents(folder / "checkpoints") == before

    again = command(*go_on)
    assert again.code == 0, again.err
    assert [record["step"] for record in metrics(folder)] == list(range(1, 13))
    assert json.loads((folder / "summary.json").read_text())["steps"] == 12
