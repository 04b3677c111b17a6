"""One door: every name of a model leads to it, and nothing else passes."""

import json
import shutil

import pytest
import torch

from megaslm.checkpoint import Piece, open_checkpoint, open_model, write_checkpoint
from megaslm.checkpoint.format import write_manifest
from megaslm.checkpoint.huggingface.families import hf_config
from megaslm.checkpoint.huggingface.mapping import parameter_groups
from megaslm.checkpoint.safetensors_file import write_safetensors
from megaslm.config import ModelConfig
from megaslm.data import Document, build_token_file, train_bpe
from megaslm.errors import UserError
from megaslm.model import build_model, stretch_context

SIZES = {"vocab_size": 300, "context_length": 32, "num_layers": 2, "hidden_size": 32, "num_heads": 4}
CONFIG = ModelConfig(**SIZES, ffn_hidden_size=48, num_kv_heads=2, tie_embeddings=True, bias=True)
LEARNED = ModelConfig(**SIZES, ffn_hidden_size=48, norm="layernorm", position="learned", feed_forward="gelu", bias=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = train_bpe(["a text that is rather short, and then some more of it"], 290)
    tokenizer.save(tmp_path_factory.mktemp("tokenizer"))
    return tokenizer


def save(directory, step=1, config=CONFIG, carried=None, trained_with=None, name=None, **run_config):
    """A checkpoint of `config`'s network of seed `step`. Tokenizers: one that it carries, and one on its record."""
    weights = [Piece.whole(name, tensor) for name, tensor in build_model(config, step).named_parameters()]
    datasets = run_config.pop("datasets", [])
    return write_checkpoint(
        directory,
        {"weights": weights, "exp_avg": weights},
        step=step,
        run_config={"name": "run", "model": config.model_dump(mode="json"), **run_config},
        global_state={
            "identity": {"tokenizer": trained_with and trained_with.fingerprint},
            "data": {"datasets": [{"prefix": str(prefix)} for prefix in datasets]},
        },
        optimizer=None,
        tokenizer_files=carried and carried.files,
        name=name,
    )


@pytest.fixture
def run_folder(tmp_path, tokenizer):
    """A run of two checkpoints, as training leaves it."""
    folder = tmp_path / "run"
    for step in (1, 2):
        save(folder / "checkpoints", step, carried=tokenizer, trained_with=tokenizer)
    (folder / "checkpoints" / "lm_current").symlink_to("step_00000001")
    (folder / "config.json").write_text("{}")
    return folder


def huggingface(folder, config=CONFIG):
    """`config`'s network of seed 1 as a folder of transformers."""
    folder.mkdir()
    parameters, tensors = dict(build_model(config, 1).named_parameters()), {}
    content = hf_config(config, "fp32", None)
    for group in parameter_groups(config, content["model_type"]):
        tensors |= dict(zip(group.theirs, group.split(parameters[group.ours]), strict=True))
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "place, step",
    [
        ("", 2),
        ("checkpoints", 2),
        ("checkpoints/step_00000001", 1),
        ("checkpoints/lm_current", 1),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_run_is_found_by_every_name(run_folder, place, step, verify, tokenizer):
    source = open_model(run_folder / place, verify=verify)
    assert (source.kind, source.config, source.tokenizer.fingerprint) == ("checkpoint", CONFIG, tokenizer.fingerprint)
    assert source.path == run_folder / "checkpoints" / f"step_{step:08d}"
    model, expected = source.build(), build_model(CONFIG, step)
    assert not model.training
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens), expected(tokens))


def test_a_huggingface_folder_is_the_same_network(tmp_path):
    source = open_model(huggingface(tmp_path / "hf"))
    assert (source.kind, source.tokenizer) == ("huggingface", None)
    expected = build_model(CONFIG, 1)
    tokens = torch.arange(20)[None]
    assert torch.equal(source.build()(tokens), expected(tokens))
    half = source.build(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.head.weight is half.decoder.embedding.weight
    assert half.decoder.rotary_table.cos.dtype == torch.float32
    assert torch.equal(half.decoder.rotary_table.cos, expected.decoder.rotary_table.cos)


@pytest.mark.parametrize(
    "config_json, generation_json, expected",
    [
        ({}, None, set()),
        ({"eos_token_id": 3}, None, {3}),
        ({"eos_token_id": 3}, {"eos_token_id": [4, 5]}, {4, 5}),
        ({"eos_token_id": [3, 6]}, {}, {3, 6}),
    ],
)
def test_what_ends_a_text_is_what_the_folder_names(tmp_path, config_json, generation_json, expected):
    folder = huggingface(tmp_path / "hf")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "eos_token_id": None, **config_json}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation_json is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_json))
    assert open_model(folder).eod_ids == expected


def test_a_huggingface_folder_may_have_a_folder_of_checkpoints(tmp_path):
    (huggingface(tmp_path / "hf") / "checkpoints").mkdir()
    assert open_model(tmp_path / "hf").kind == "huggingface"
    with pytest.raises(UserError, match="name is empty"):
        open_model("")


def test_a_longer_context_is_built(tmp_path):
    short = open_model(save(tmp_path, config=LEARNED))
    model = short.build(config=stretch_context(LEARNED, 63, "interpolate"))
    positions = model.decoder.position_embedding.weight
    assert positions.shape == (63, 32)
    torch.testing.assert_close(positions[::2], short.build().decoder.position_embedding.weight)
    rotary = open_model(save(tmp_path / "rope")).build(config=stretch_context(CONFIG, 64, "linear"))
    assert rotary.decoder.rotary_table.cos.shape == (64, 4)


def test_weights_and_manifest_alone_are_enough(run_folder, tmp_path):
    """As somebody copies them to a laptop, without the moments."""
    whole = run_folder / "checkpoints" / "step_00000002"
    shutil.copytree(whole, tmp_path / "copy", ignore=shutil.ignore_patterns("exp_avg*"))
    with pytest.raises(UserError, match="exp_avg_00000.safetensors is missing"):
        open_checkpoint(tmp_path / "copy")
    assert torch.equal(open_model(tmp_path / "copy").build().head.weight, open_model(whole).build().head.weight)


def test_the_newest_sound_one_is_taken_and_the_damaged_one_named(run_folder, caplog):
    weights = run_folder / "checkpoints" / "step_00000002" / "weights_00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert open_model(run_folder).path.name == "step_00000001"
    assert "step_00000002 is damaged: weights_00000.safetensors is not what was written" in caplog.text
    with pytest.raises(UserError, match="step_00000002 is damaged"):
        open_model(weights.parent)


def test_the_tokenizer_of_an_older_checkpoint_is_found_where_the_run_had_it(tmp_path, tokenizer):
    other = train_bpe(["quite another text, of other words"], 280)
    other.save(tmp_path / "other")
    build_token_file([Document("a text that is", "a", 1)], tokenizer, str(tmp_path / "tokens"))
    tokenizer.save(tmp_path / "named")
    named = {"tokenizer": {"path": str(tmp_path / "named")}}
    wrong = {"tokenizer": {"path": str(tmp_path / "other")}}
    gone = {"tokenizer": {"path": str(tmp_path / "gone")}}
    cases = [
        ("by its path", named, tokenizer),
        ("by the token file", {"datasets": [tmp_path / "nowhere", tmp_path / "tokens"]}, tokenizer),
        ("path is another by now", {**wrong, "datasets": [tmp_path / "tokens"]}, tokenizer),
        ("nothing fits", {**wrong, "datasets": [tmp_path / "nowhere"]}, None),
        ("nothing is there", gone, None),
    ]
    for i, (case, run_config, expected) in enumerate(cases):
        found = open_model(save(tmp_path / str(i), trained_with=tokenizer, **run_config)).tokenizer
        assert (found and found.fingerprint) == (expected and expected.fingerprint), case
    # What a run without a tokenizer was trained on, nobody knows: its path is no proof.
    assert open_model(save(tmp_path / "none", **named)).tokenizer is None


def test_a_tokenizer_that_is_given_must_be_the_models(run_folder, tmp_path, tokenizer):
    tokenizer.save(tmp_path / "right")
    train_bpe(["quite another text, of other words"], 280).save(tmp_path / "other")
    train_bpe(["many words to have a vocabulary that is larger " * 3 + str(i) for i in range(99)], 320).save(
        tmp_path / "large"
    )
    assert open_model(run_folder, str(tmp_path / "right")).tokenizer.name == str(tmp_path / "right")
    with pytest.raises(UserError, match="other .*is not the tokenizer that .* was trained with"):
        open_model(run_folder, str(tmp_path / "other"))
    with pytest.raises(UserError, match="has 3[0-9]+ tokens and the model of .* only 300"):
        open_model(save(tmp_path / "no record"), str(tmp_path / "large"))
    folder = huggingface(tmp_path / "hf")
    assert open_model(folder, str(tmp_path / "other")).tokenizer.name == str(tmp_path / "other")
    with pytest.raises(UserError, match="has 3[0-9]+ tokens and the model of .*hf only 300"):
        open_model(folder, str(tmp_path / "large"))
    train_bpe(["many words to have a vocabulary that is larger " * 3 + str(i) for i in range(99)], 300).save(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    extra = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] += [{"id": 300 + i, "content": f"<{i}>", **extra, "special": True} for i in range(4)]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="only 300: beyond its embedding lie '<0>', '<1>', '<2>' and others"):
        open_model(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"ffn_hidden_size": 50},
            r"feed_forward.down.weight has the shape \(32, 48\) instead of \(32, 50\) and 5 more",
        ),
        ({"num_layers": 3}, "decoder.blocks.2.attention.out.bias is missing and"),
        ({"num_layers": 1}, "decoder.blocks.1.attention.out.bias is of no use to it and"),
    ],
)
def test_weights_of_another_model_than_the_config_says(tmp_path, change, message):
    config = CONFIG.model_copy(update=change).model_dump(mode="json")
    source = open_model(save(tmp_path, model=config))
    with pytest.raises(UserError, match=message):
        source.build()


def test_the_tokenizer_of_the_training_is_known_also_where_it_is_gone(tmp_path, tokenizer):
    gone = open_model(save(tmp_path / "gone", trained_with=tokenizer))
    assert gone.tokenizer is None and gone.tokenizer_fingerprint == tokenizer.fingerprint
    assert open_model(save(tmp_path / "unknown")).tokenizer_fingerprint is None
    carried = open_model(save(tmp_path / "carried", carried=tokenizer))
    assert carried.tokenizer_fingerprint == tokenizer.fingerprint
    folder = huggingface(tmp_path / "hf")
    assert open_model(folder).tokenizer_fingerprint is None
    tokenizer.save(folder)
    assert open_model(folder).tokenizer_fingerprint == tokenizer.fingerprint


def empty_run(folder):
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def of_deepspeed(folder):
    folder.mkdir()
    (folder / "mp_rank_00_model_states.pt").write_text("")


def a_file(folder):
    folder.write_text("")


def long_context(folder):
    path = huggingface(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 10**12}))


def newer(folder):
    path = save(folder.parent, name="thing") / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    write_manifest(path.parent, manifest | {"version": 99})


def without_model(folder):
    write_checkpoint(
        folder.parent, {"weights": [Piece.whole("a", torch.ones(2))]}, step=0, run_config={}, global_state={},
        optimizer=None, name="thing",
    )  # fmt: skip


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "there is no checkpoint .*thing"),
        (lambda folder: folder.mkdir(), "is not a megaslm checkpoint .* it holds nothing"),
        (empty_run, "the run in .*thing has saved no checkpoint yet"),
        (of_deepspeed, "it looks like a DeepSpeed checkpoint"),
        (a_file, "is a file; a checkpoint is a folder"),
        (newer, "has format version 99, this megaslm reads"),
        (without_model, "says nothing of the model"),
        (lambda folder: save(folder, name="imported"), "folder of checkpoints with names of their own.*/imported"),
        (long_context, r"max_position_embeddings is 10+, whose rotary angles take .* GB"),
        (lambda folder: folder.symlink_to("nowhere"), "there is no checkpoint .*nowhere"),
    ],
)
def test_whatever_else_says_what_it_looks_like(tmp_path, make, message):
    make(tmp_path / "thing")
    with pytest.raises(UserError, match=message):
        open_model(tmp_path / "thing")
