"""What a Hugging Face folder holds, under our names; and what is refused, by name."""

import json
import shutil
from fnmatch import fnmatch

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaslm.checkpoint import HuggingFaceFolder
from megaslm.checkpoint.huggingface.folder import find_folder
from megaslm.errors import UserError


@pytest.fixture(scope="module")
def llama(hf_folder):
    return hf_folder("llama", torch.bfloat16, num_key_value_heads=2)


@pytest.fixture
def copy(llama, tmp_path):
    """A folder to damage."""
    return shutil.copytree(llama, tmp_path / "copy")


def change(folder, change):
    """Let `change` edit the tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_tensors_are_joined_as_they_are_stored(llama):
    folder, stored = HuggingFaceFolder(llama), load_file(llama / "model.safetensors")
    assert (folder.family, folder.dtype, folder.config.num_kv_heads) == ("llama", torch.bfloat16, 2)
    parts = [stored[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(folder.read("decoder.blocks.1.attention.qkv.weight"), torch.cat(parts))
    embedding = folder.read("decoder.embedding.weight")
    assert embedding.dtype == torch.bfloat16 and embedding.shape == (384, 64)
    assert torch.equal(embedding[:300], stored["model.embed_tokens.weight"]) and not embedding[300:].any()
    assert all(folder.read(name).shape == shape for name, shape in folder.shapes.items())
    assert folder.tokenizer() is None


def test_shards_are_read_by_their_index(hf_folder, copy):
    folder = hf_folder("llama", max_shard_size="40KB", num_key_value_heads=2)
    assert len(HuggingFaceFolder(folder).files) > 2
    one = next(path for path in sorted(folder.glob("model-*.safetensors")))
    one.unlink()
    with pytest.raises(UserError, match=f"{one.name} of model.safetensors.index.json is missing"):
        HuggingFaceFolder(folder)
    (folder.parent / "x.safetensors").write_bytes(b"")  # an index leads to no other folder
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../x.safetensors"}}')
    with pytest.raises(UserError, match="../x.safetensors of model.safetensors.index.json is missing"):
        HuggingFaceFolder(folder)


def test_a_single_file_goes_before_an_index_as_in_transformers(copy):
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert HuggingFaceFolder(copy).files == [copy / "model.safetensors"]


def test_a_tensor_stands_in_one_file(copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    other = {"model.norm.weight": tensors["model.norm.weight"] * 2}
    for buffer in (True, False):
        again = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)} if buffer else other
        save_file(tensors | (again if buffer else {}), copy / "a.safetensors")
        save_file(again, copy / "b.safetensors")
        weight_map = {**dict.fromkeys(tensors, "a.safetensors"), **dict.fromkeys(again, "b.safetensors")}
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        if buffer:
            HuggingFaceFolder(copy)
    with pytest.raises(UserError, match="model.norm.weight stands in a.safetensors and in b.safetensors"):
        HuggingFaceFolder(copy)


def test_types_may_differ_and_the_widest_is_told(copy):
    change(copy, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()}))
    folder = HuggingFaceFolder(copy)
    assert folder.dtype == torch.float32 and folder.dtypes == {torch.float32, torch.bfloat16}
    assert folder.facts["dtype"] == "fp32"
    assert folder.read("decoder.norm.weight").dtype == torch.float32
    assert folder.read("head.weight").dtype == torch.bfloat16


def test_old_files_have_no_prefix_and_have_buffers(hf_folder):
    """As the first gpt2 of the hub."""
    folder = hf_folder("gpt2")
    before = {name: HuggingFaceFolder(folder).read(name) for name in HuggingFaceFolder(folder).shapes}

    def as_of_old(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}

    change(folder, as_of_old)
    opened = HuggingFaceFolder(folder)
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in before.items())


def test_rotary_frequencies_and_a_tied_head_may_be_stored(hf_folder):
    folder = hf_folder("llama", tie_word_embeddings=True)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change(folder, add)
    assert "head.weight" not in HuggingFaceFolder(folder).shapes
    change(folder, lambda tensors: tensors["lm_head.weight"].mul_(2))
    embedding = "model.embed_tokens.weight"
    with pytest.raises(UserError, match="tie_word_embeddings of config.json is true, and lm_head.weight is not"):
        HuggingFaceFolder(folder)
    change(folder, lambda tensors: tensors.pop(embedding))
    with pytest.raises(UserError, match=f"{embedding} is missing"):
        HuggingFaceFolder(folder)


def test_the_head_of_gpt_neox_has_two_names(hf_folder):
    folder = hf_folder("gpt_neox")
    names = set(load_file(folder / "model.safetensors"))
    here, other = ("lm_head.weight", "embed_out.weight")[:: 1 if "lm_head.weight" in names else -1]
    before = HuggingFaceFolder(folder).read("head.weight")
    change(folder, lambda tensors: tensors.update({other: tensors.pop(here)}))
    assert torch.equal(HuggingFaceFolder(folder).read("head.weight"), before)


def test_biases_that_our_network_would_not_have_must_be_zero(hf_folder):
    folder = hf_folder("gpt_neox", attention_bias=False)
    with pytest.raises(UserError, match="bias is not zero, and attention_bias of config.json is false"):
        HuggingFaceFolder(folder)
    change(folder, lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if name.endswith("bias")])
    assert not HuggingFaceFolder(folder).config.bias


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop(NORM), rf"does not hold the llama that its config.json describes: {NORM} is missing"),
        (lambda t: [t.pop(name) for name in list(t) if "layers.1" in name], "and 6 more are missing"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[NORM]}), "model.layers.2.mlp.up_proj.weight is of"),
        (lambda t: t.update({NORM: t[NORM][:-1]}), r"input_layernorm.weight has the shape \(63,\), and by .* \(64,\)"),
        (lambda t: t.update({NORM: t[NORM].to(torch.int8)}), "is of type I8, and megaslm reads F32, BF16, F16"),
        (lambda t: t.update({NORM: t[NORM].double()}), "is of type F64"),
    ],
)
def test_other_tensors_than_the_config_describes_are_refused(copy, edit, message):
    change(copy, edit)
    with pytest.raises(UserError, match=message):
        HuggingFaceFolder(copy)


def replace(name, content, removed=("model.safetensors",)):
    def edit(folder):
        for one in removed:
            (folder / one).unlink()
        (folder / name).write_bytes(content)

    return edit


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "edit, message",
    [
        (replace("pytorch_model.bin", b""), "pytorch_model.bin is pickled, and a pickle can run code.*save_pretrained"),
        (replace("other.gguf", b""), "has no weights: neither model.safetensors nor"),
        (
            replace("model.safetensors", b"version https://git-lfs", ()),
            "model.safetensors can't be read.*Git LFS pointer",
        ),
        (replace("config.json", b"{", ()), "config.json is not JSON"),
        (replace("adapter_config.json", b"{}", ("config.json",)), "is an adapter of another model: merge"),
        (replace("notes", b"", ("config.json",)), r"is not a Hugging Face model \(config.json is missing\); it holds"),
    ],
)
def test_what_is_not_a_model_is_refused(copy, edit, message):
    edit(copy)
    with pytest.raises(UserError, match=message):
        HuggingFaceFolder(copy)


def test_a_file_that_ends_too_early_is_named(copy):
    truncate(copy)
    with pytest.raises(UserError, match="model.safetensors can't be read"):
        folder = HuggingFaceFolder(copy)
        for name in folder.shapes:
            folder.read(name)


def test_a_name_of_the_hub_is_fetched_and_a_path_is_not(monkeypatch, tmp_path, llama):
    import huggingface_hub

    asked, files = [], ["config.json", "model.safetensors", "generation_config.json", "tokenizer.model", "README.md"]

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        if name == "no/where":
            raise OSError("offline\nat length")
        folder = tmp_path / f"{len(asked)}"
        folder.mkdir()
        for file in files:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                shutil.copy(llama / file if (llama / file).exists() else llama / "config.json", folder / file)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    found = find_folder("some/llama")
    assert asked == ["some/llama"] and sorted(path.name for path in found.iterdir()) == sorted(files[:4])
    assert HuggingFaceFolder(found).older_tokenizer == found / "tokenizer.model"
    assert find_folder(str(tmp_path)) == tmp_path and find_folder(tmp_path / "gone") == tmp_path / "gone"
    assert len(asked) == 1
    with pytest.raises(UserError, match=r"no no/where here, and the Hugging Face hub gives no model .* \(offline\)"):
        find_folder("no/where")
    files[1] = "pytorch_model.bin"
    with pytest.raises(UserError, match="some/llama on the .* hub has no weights in safetensors.* pickle can run code"):
        find_folder("some/llama")
    files[0] = "x.gguf"
    with pytest.raises(UserError, match="some/llama on the .* hub is not a model of transformers: it has no config"):
        find_folder("some/llama")
    files[0] = "adapter_config.json"
    with pytest.raises(UserError, match="is an adapter of another model: merge"):
        HuggingFaceFolder(find_folder("some/adapter"))
    with pytest.raises(UserError, match="name is empty"):
        find_folder("")


def test_unknown_keys_of_config_json_are_no_matter(copy, edit_json):
    before = HuggingFaceFolder(copy).config
    edit_json(copy / "config.json", unsloth_version="2025.1", use_sliding_window=True)
    assert HuggingFaceFolder(copy).config == before
