"""Presets, files and overrides -> RunConfig; every mistake of a user named in one message."""

import json
import subprocess
import sys

import pytest

from megaslm.config import (
    BatchLayout,
    describe_fields,
    list_presets,
    load_run_config,
    resolve_batch,
    to_json,
    with_expected_vocabulary,
)
from megaslm.config.explain import all_keys
from megaslm.config.load import ACTS_WHEN, TAKES_PLACE_OF, save_run_config
from megaslm.config.schema import RunConfig
from megaslm.errors import UserError


def mistake(*overrides, base="slm_tiny"):
    with pytest.raises(UserError) as caught:
        load_run_config(str(base), overrides)
    return str(caught.value)


def test_imports_without_torch_and_deepspeed():
    code = "import megaslm.config, sys; sys.exit(bool({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=".").returncode == 0


def test_overrides_of_every_type():
    config = load_run_config(
        "slm_tiny",
        [
            "train.max_steps=1e3",
            "optimizer.betas=[0.8, 0.9]",
            "model.rope_theta=1e6",
            "model.qk_norm=true",
            "data.seq_length=512",
            "eval.max_sequences=null",
            'data.train=["a", {"prefix": "b", "weight": 2}]',
            "name=2024",
            "description=a=b",
            'eval.sample_prompt="def "',
        ],
    )
    assert config.train.max_steps == 1000 and isinstance(config.train.max_steps, int)
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.model.rope_theta == 1e6 and config.model.qk_norm is True
    assert config.seq_length == 512 and config.tokens_per_step == 512 * 32
    assert config.eval.max_sequences is None
    assert [(d.prefix, d.weight) for d in config.data.train] == [("a", 1.0), ("b", 2.0)]
    assert (config.name, config.description, config.eval.sample_prompt) == ("2024", "a=b", "def ")


def test_one_text_stands_for_a_list_of_one():
    assert load_run_config("slm_tiny", ["data.input=corpus.jsonl"]).data.input == ["corpus.jsonl"]
    assert load_run_config("slm_tiny", ["data.train=a"]).data.train[0].prefix == "a"


def test_later_overrides_win_and_a_section_is_replaced_whole():
    assert load_run_config("slm_tiny", ["optimizer.lr=1", "optimizer.lr=2"]).optimizer.lr == 2
    config = load_run_config("slm_tiny", ['optimizer={"lr": 1e-4}'])
    assert config.optimizer.lr == 1e-4 and config.optimizer.weight_decay == 0.1  # the default, not the preset's


@pytest.mark.parametrize("key", ["train.max_steps", "train.max_tokens", "train.max_epochs"])
@pytest.mark.parametrize("preset", ["slm_tiny", "megaslm_125m", "sab_lite"])
def test_an_overridden_stop_criterion_replaces_the_presets(preset, key):
    train = load_run_config(preset, [f"{key}=7"]).train
    given = {name: getattr(train, name) for name in ("max_steps", "max_tokens", "max_epochs")}
    assert given == {"max_steps": None, "max_tokens": None, "max_epochs": None} | {key.split(".")[1]: 7}


def test_several_overridden_stop_criteria_all_hold():
    train = load_run_config("megaslm_125m", ["train.max_steps=7", "train.max_epochs=0.5"]).train
    assert (train.max_steps, train.max_tokens, train.max_epochs) == (7, None, 0.5)


def test_token_files_replace_raw_text_and_back(tmp_path):
    config = load_run_config("quickstart", ["data.train=a"])
    assert not config.data.input
    file = tmp_path / "run.json"
    save_run_config(load_run_config("slm_tiny", ["data.train=a", "data.validation=b"]), file)
    config = load_run_config(str(file), ["data.input=c.jsonl"])
    assert config.data.input == ["c.jsonl"] and not config.data.train and not config.data.validation
    assert "exclude each other" in mistake("data.train=a", "data.input=b")


def test_token_files_by_name_alone():
    data = load_run_config("quickstart", ["data.train=a", 'data.validation=["b", "c"]']).data
    assert [(dataset.prefix, dataset.weight) for dataset in data.train] == [("a", 1)] and data.validation == ["b", "c"]
    assert load_run_config("quickstart", ["data.train=a", "data.validation=b"]).data.validation == ["b"]


def test_validation_sets_may_have_names(tmp_path):
    def sets(*overrides):
        return load_run_config("quickstart", ["data.train=a", *overrides]).data.validation_sets

    assert sets() == {}
    assert sets("data.validation=b") == {"validation": ["b"]}
    named = 'data.validation={"wiki": "b", "code-1.0": ["c", "d"]}'
    assert sets(named) == {"wiki": ["b"], "code-1.0": ["c", "d"]}
    config = load_run_config("quickstart", ["data.train=a", named])
    save_run_config(config, tmp_path / "run.json")
    assert load_run_config(str(tmp_path / "run.json")) == config


def test_the_vocabulary_of_a_run_without_its_data():
    config = load_run_config("slm_tiny", ["tokenizer.type=ascii"])
    found = with_expected_vocabulary(config)
    assert found.model.vocab_size == 96 and config.model.vocab_size is None
    with pytest.raises(UserError, match=r"slm_tiny takes its vocabulary from its data: give model.vocab_size=N"):
        with_expected_vocabulary(load_run_config("slm_tiny", ["tokenizer.path=gpt2"]))


@pytest.mark.parametrize(
    "limits, tokens, steps",
    [
        ({"max_steps": 10}, 2560, 10),
        ({"max_tokens": 1000}, 1000, 4),
        ({"max_tokens": 1000, "max_steps": 3}, 768, 3),
        ({"max_tokens": 700, "max_steps": 3, "max_epochs": 1}, 700, 3),
        ({"max_epochs": 2}, None, None),
    ],
)
def test_how_long_a_run_is(limits, tokens, steps):
    """Steps of 8 x 32 tokens."""
    overrides = [f"train.{name}={limits.get(name, 'null')}" for name in ("max_steps", "max_tokens", "max_epochs")]
    config = load_run_config("slm_tiny", ["train.global_batch_size=8", "data.seq_length=32", *overrides])
    assert (config.token_limit, config.step_limit) == (tokens, steps)


def test_an_existing_tokenizer_brings_its_own_vocabulary():
    config = load_run_config("slm_tiny", ["tokenizer.path=gpt2"])
    assert config.tokenizer.vocab_size is None and config.expected_vocab_size is None
    assert load_run_config("slm_tiny", ["tokenizer.type=ascii"]).expected_vocab_size == 96
    assert load_run_config("slm_tiny", ["tokenizer.path=gpt2", "model.vocab_size=50257"]).expected_vocab_size == 50257


@pytest.mark.parametrize("preset", sorted(list_presets()))
def test_a_saved_configuration_loads_as_an_equal_one(preset, tmp_path):
    config = load_run_config(preset)
    (tmp_path / "run.json").write_text(to_json(config))
    assert load_run_config(str(tmp_path / "run.json")) == config


@pytest.mark.parametrize(
    "override, nearest",
    [
        ("train.max_step=3", "train.max_steps"),
        ("max_steps=3", "train.max_steps"),
        ("trian.max_steps=3", "train.max_steps"),
        ("optim.lr=1", "optimizer.lr"),
        ("--optimizer.lr=1", "optimizer.lr"),
        ("optimizer.zzz=1", "the keys of optimizer are type, lr"),
        ("model.n_layer=3", "model.num_layers"),
        ("train.optimizer.lr=3", "optimizer"),
        ("data.train=[{'prefix': 1}]", "not JSON"),
        ('data.train=[{"prefx": "a"}]', "data.train[0].prefix"),
        ('train={"max_steps": 3, "global_batch": 2, "micro_batch_size": 1}', "train.global_batch_size"),
        ("train.max_steps.x=1", "train.max_steps is one value"),
        ("data.train.0=a", "data.train is one value"),
        ("train.max_steps", "KEY=VALUE"),
        ("=3", "unknown key"),
    ],
)
def test_unknown_keys_name_the_nearest_right_one(override, nearest):
    message = mistake(override)
    assert nearest in message
    assert override.partition("=")[0] in message


@pytest.mark.parametrize(
    "override, allowed",
    [
        ("train.max_steps=0", "a whole number >= 1, or null"),
        ("train.max_steps=true", "a whole number >= 1, or null"),
        ("train.max_steps=1.5", "a whole number >= 1, or null"),
        ("train.max_steps=ten", "a whole number >= 1, or null"),
        ("optimizer.lr=-1", "a number > 0"),
        ("optimizer.lr=NaN", "a number > 0"),
        ("optimizer.lr=1e400", "a number > 0"),
        ("optimizer.betas=[0.9, 1.0]", "a number >= 0 and < 1"),
        ("optimizer.betas=[0.9]", "missing"),
        ("model.qk_norm=1", "true or false"),
        ("model.qk_norm=no", "true or false"),
        ("model.norm=rms", "rmsnorm or layernorm"),
        ("train.compile=maybe", "auto or true or false"),
        ("schedule.type=cosin", "constant, linear, cosine or wsd"),
        ("model.rope_fraction=1.5", "a number > 0 and <= 1"),
        ("data.input=[3]", "text"),
        ("data.input=3", "a list, each item text"),
        ('data.validation=[{"prefix": "v", "weight": 2}]', "text"),
        ('data.validation={"a b": "v"}', "the name 'a b' of a set"),
        ('data.validation={"a": []}', "the set 'a' must be a PREFIX"),
        ('data.validation={"a": {"b": "v"}}', "the set 'a' must be a PREFIX"),
        ("data.validation=3", "must be a PREFIX"),
        ("data.order=megatron-lm", "windows or megatron"),
        ("data.first_sample=-1", "a whole number >= 0"),
        ("data.split=98", "two or three shares"),
        ("data.split=0,2", "two or three shares"),
        ("name=../x", "must match"),
        ("train=null", "an object with seed"),
        ("train=3", "an object with seed"),
    ],
)
def test_wrong_values_name_the_key_the_value_and_what_is_allowed(override, allowed):
    message = mistake(override)
    assert allowed in message and override.partition("=")[0] in message and f"override {override}" in message


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["model.num_heads=5"], "num_heads 5 is not a multiple of num_kv_heads 2"),
        (["model.head_dim=null", "model.num_heads=6"], "hidden_size 256 does not divide into num_heads 6"),
        (["data.seq_length=4096"], "data.seq_length 4096 is longer than model.context_length 1024"),
        (["train.max_steps=null"], "one of train.max_steps, train.max_tokens and train.max_epochs"),
        (["data.validation=v"], "data.validation goes with data.train"),
        (["data.order=megatron", "train.max_epochs=2"], "give train.max_steps or train.max_tokens instead"),
        (["data.order=megatron", "checkpoint.every_epoch=true"], "shuffles those of a run together"),
        (["schedule.horizon_steps=100"], "warmup_steps 2000 leaves no step of horizon_steps 100"),
        (["model.rope_scaling_factor=2"], "rope_scaling_factor has no effect"),
        (["model.rope_scaling=ntk", "model.rope_original_context=64"], "rope_original_context has no effect"),
        (["tokenizer.type=char", "tokenizer.vocab_size=300"], "has no effect with type char"),
        (
            ["parallel.tensor_parallel_size=3", "parallel.sequence_parallel=true"],
            "sequences of 1024 tokens (model.context_length) into parallel.tensor_parallel_size=3 equal parts",
        ),
    ],
)
def test_contradictions(overrides, says):
    assert says in mistake(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.position=learned", "model.rope_theta=5"],
        ["schedule.decay_fraction=0.1"],
        ["schedule.type=constant", "schedule.horizon_steps=9000"],
        ["tokenizer.path=x", "tokenizer.vocab_size=300"],
        ["data.train=x", "tokenizer.vocab_size=300"],
        ["data.train=x", "data.validation_fraction=0.1"],
        ["data.split=9,1"],
        ["data.train=x", "data.validation=y", "data.split=9,1"],
        ["tokenizer.unknown=refuse"],
        ["eval.sample_tokens=0", "eval.sample_temperature=1"],
        ["logging.wandb_project=x"],
        ["parallel.sequence_parallel=true"],
        ["data.mask_documents=true", "train.attention=cudnn"],
    ],
)
def test_an_override_without_effect_is_an_error(overrides):
    message = mistake(*overrides)
    assert f"override {overrides[-1]} has no effect" in message


def test_all_mistakes_in_one_message():
    message = mistake("train.max_step=3", "optimizer.lr=-1", "model.norm=rms", "nonsense")
    assert "4 mistakes" in message and len(message.splitlines()) == 5


def test_missing_keys_of_a_file(tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{"name": "x", "model": {"context_length": 8}, "train": {}}')
    message = mistake(base=file)
    for key in ("model.num_layers", "train.global_batch_size"):
        assert f"{key}: missing, must be a whole number >= 1" in message
    assert str(file) in message


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"name": "x",\n "model": }', "line 2, column 11"),
        ("[1]", "must hold a JSON object"),
        ('{"name": "x", "name": "y"}', "the key 'name' is given twice"),
        ("\xff", "not UTF-8"),
    ],
)
def test_broken_files(tmp_path, text, says):
    file = tmp_path / "run.json"
    file.write_bytes(text.encode("latin-1"))
    assert says in mistake(base=file)


def test_unknown_presets_and_missing_files(tmp_path):
    assert "did you mean slm_tiny?" in mistake(base="slm_tinny")
    assert "the presets are" in mistake(base="qqqq")
    assert "cannot be read: No such file" in mistake(base=tmp_path / "none.json")


def test_tables_name_real_keys():
    keys = set(all_keys(RunConfig))
    assert keys >= set(TAKES_PLACE_OF) | {key for others in TAKES_PLACE_OF.values() for key in others}
    assert keys >= {key for acting, _, _ in ACTS_WHEN for key in acting}


def test_every_field_is_in_the_manual_with_a_docstring():
    manual = describe_fields()
    for key in all_keys(RunConfig):
        if "." in key or RunConfig.model_fields[key].annotation is str:
            entry = manual.split(f"\n\n{key}: ")[1].splitlines()
            assert len(entry[1].strip()) > 10, f"{key} has no docstring"
    assert "train.max_steps: a whole number >= 1, or null (default null)" in manual
    assert max(map(len, manual.splitlines())) <= 240


def test_resolved_json_is_plain():
    resolved = json.loads(to_json(load_run_config("slm_tiny")))
    assert resolved["model"]["num_kv_heads"] == 2 and resolved["optimizer"]["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    "global_batch, micro, ranks, layout",
    [
        (32, 8, 1, (8, 4)),
        (32, 8, 8, (4, 1)),
        (12, 8, 1, (6, 2)),
        (14, 8, 2, (7, 1)),
        (26, 8, 2, (1, 13)),
        (1, 8, 1, (1, 1)),
        (1024, 4, 64, (4, 4)),
    ],
)
def test_resolve_batch(global_batch, micro, ranks, layout):
    assert resolve_batch(global_batch, micro, ranks) == BatchLayout(*layout)


def test_resolve_batch_covers_the_batch_and_is_the_largest():
    for ranks in (1, 2, 3, 8):
        for per_rank in range(1, 50):
            for micro in range(1, 20):
                batch = resolve_batch(per_rank * ranks, micro, ranks)
                assert batch.micro_batch_size * batch.accumulation_steps == per_rank
                assert batch.micro_batch_size <= micro
                assert not any(per_rank % m == 0 for m in range(batch.micro_batch_size + 1, min(micro, per_rank) + 1))


def test_resolve_batch_names_the_nearest_batches_that_work():
    with pytest.raises(UserError, match="global_batch_size 30 does not divide among 8 .* 24 and 32"):
        resolve_batch(30, 8, 8)
    with pytest.raises(UserError, match="global_batch_size 3 does not divide among 8 .* 8$"):
        resolve_batch(3, 8, 8)
