"""Small models as they stand on the hub: config.json, tensors and tokenizers in the spelling of their time."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = Path(json.__file__).read_text()
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64,
    "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 2048, "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 512,
}  # fmt: skip
CONFIGS = {
    "TinyLlama": {**LLAMA, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float16"},
    "Llama-3.2": {
        **LLAMA, "attention_bias": False, "bos_token_id": 480, "eos_token_id": [481, 482, 483], "head_dim": 12,
        "max_position_embeddings": 131072, "mlp_bias": False, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "Qwen3": {
        **LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "bos_token_id": 480, "eos_token_id": 482,
        "head_dim": 32, "max_window_layers": 28, "rms_norm_eps": 1e-06, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False,
    },
    "Mistral": {
        **LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2,
        "rope_theta": 1000000.0, "sliding_window": None, "num_hidden_layers": 3,
    },
    "gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 480,
        "embd_pdrop": 0.1, "eos_token_id": 480, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2", "n_ctx": 64, "n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 64,
        "resid_pdrop": 0.1, "summary_type": "cls_index", "vocab_size": 481, "torch_dtype": "float32",
    },
    "pythia": {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 480, "eos_token_id": 480, "hidden_act": "gelu",
        "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 256, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 4, "num_hidden_layers": 2,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
        "use_cache": True, "use_parallel_residual": True, "vocab_size": 512,
    },
}  # fmt: skip


def byte_level(specials: tuple[str, ...], bos: str | None = None) -> Tokenizer:
    """480 tokens, and special ones behind them; with `bos` before every text, for those that ask for it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(special, normalized=False) for special in specials])
    if bos:
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As converted from SentencePiece: spaces are marks that a normalizer puts in, unknown characters are bytes."""
    specials = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(TEXT.split("\n"), trainers.BpeTrainer(vocab_size=253, show_progress=False))
    content = json.loads(trained.to_str())
    learned = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    vocabulary = dict.fromkeys([*specials, *(f"<0x{i:02X}>" for i in range(256)), *learned])
    content["model"] |= {"vocab": {token: i for i, token in enumerate(vocabulary)}, "byte_fallback": True}
    content["model"] |= {"fuse_unk": True, "unk_token": "<unk>"}
    space = {"pattern": {"String": " "}, "content": "\u2581"}
    mark = {"pattern": {"String": "\u2581"}, "content": " "}
    parts = [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", **space}]
    content["normalizer"] = {"type": "Sequence", "normalizers": parts}
    parts = [{"type": "Replace", **mark}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    parts.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    content["decoder"] = {"type": "Sequence", "decoders": parts}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [{"id": i, "content": s, **flags, "special": True} for i, s in enumerate(specials)]
    return Tokenizer.from_str(json.dumps(content))


def write_tokenizer(name: str, folder: Path) -> None:
    if name in ("TinyLlama", "Mistral"):
        tokenizer, content = sentencepiece(), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        content |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    elif name == "Llama-3.2":
        begin = "<|begin_of_text|>"
        tokenizer = byte_level((begin, "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), begin)
        content = {"bos_token": begin, "eos_token": "<|end_of_text|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    elif name == "Qwen3":
        tokenizer = byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
        content = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        content |= {"tokenizer_class": "Qwen2Tokenizer", "chat_template": "{{ messages }}"}
    else:
        tokenizer = byte_level(("<|endoftext|>",))
        content = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
        content["tokenizer_class"] = {"gpt2": "GPT2Tokenizer", "pythia": "GPTNeoXTokenizer"}[name]
    if name == "gpt2":  # of older repositories, these two alone
        tokenizer.model.save(str(folder))
    else:
        tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def spelled(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the hub, and the tensors that stand there and are no parameters."""
    config = CONFIGS[name]
    if name == "gpt2":
        tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
        mask = torch.ones(1, 1, 64, 64).tril()
        return tensors | {f"h.{i}.attn.bias": mask.clone() for i in range(config["n_layer"])}
    for i in range(config["num_hidden_layers"]):
        if name == "pythia":
            layer = f"gpt_neox.layers.{i}.attention"
            tensors[f"{layer}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            tensors |= {f"{layer}.masked_bias": torch.tensor(-1e9), f"{layer}.rotary_emb.inv_freq": torch.ones(2)}
        elif name == "TinyLlama":
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    if name == "pythia" and "lm_head.weight" in tensors:
        tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    if name == "Qwen3":  # tied, and stored all the same
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return tensors


def write_hub_model(name: str, folder: Path, network: torch.nn.Module) -> Path:
    """Write `network`, of the type that CONFIGS[name] names; in two files if it is Mistral's."""
    folder.mkdir()
    config = CONFIGS[name]
    dtype = getattr(torch, config["torch_dtype"])
    parameters = {key: tensor.detach().to(dtype).clone() for key, tensor in network.named_parameters()}
    tensors = spelled(name, parameters)
    if name == "Mistral":
        names, weight_map = list(tensors), {}
        for i in range(2):
            file = f"model-{i + 1:05d}-of-00002.safetensors"
            save_file({key: tensors[key] for key in names[i::2]}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names[i::2], file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    if name == "Llama-3.2":
        generation = {"bos_token_id": 480, "eos_token_id": [481, 482, 483], "temperature": 0.6, "top_p": 0.9}
        (folder / "generation_config.json").write_text(json.dumps({**generation, "do_sample": True}))
    write_tokenizer(name, folder)
    return folder
