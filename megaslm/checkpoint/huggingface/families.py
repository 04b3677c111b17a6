"""Which architecture of transformers a model is, and its config.json, both ways.

Five classes of transformers compute what our network computes under some of its switches:

    llama      rmsnorm, rope over whole heads, swiglu, sequential; biases in all projections or in none
    mistral    the same without biases, for heads that do not divide the width, which LlamaConfig refuses
    qwen3      the same without biases, with QK norm
    gpt2       layernorm, learned positions, gelu, sequential; one key/value head per query head
    gpt_neox   layernorm, rope over a fraction of the heads, gelu, sequential or parallel; the same of the heads

transformers ignores in silence what a class has no word for (a rotary fraction in llama, key/value heads in gpt_neox,
per-layer types), so the refusals are ours, in both directions. Keys that none of the five classes reads are no
concern: they change nothing there either.

The rotary settings have two spellings: `rope_theta`, `rope_scaling`, `rotary_pct`, `rotary_emb_base` (transformers 4),
and `rope_parameters` (5). Both are written and both are read.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from megaslm.config import ModelConfig
from megaslm.data import Tokenizer
from megaslm.errors import UserError
from megaslm.model import rotary_base

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ACTIVATIONS = {"swiglu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
# Names of transformers for the same functions. (gelu_fast is gelu_new with its factors multiplied out.)
SYNONYMS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new"}
# What the rotary scalings have beside a factor and the original context.
YARN_RANGE = {"beta_fast": 32.0, "beta_slow": 1.0}
LLAMA3_RANGE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL_CONTEXT = "original_max_position_embeddings"
ONLY_OF_5 = ("rope_theta", "partial_rotary_factor")  # of the keys of rope_scaling
# Of switches that no family's `keys` have.
ROTARY_KEYS = {
    "rope_theta": "rope_theta",
    "rope_fraction": "partial_rotary_factor",
    "rope_scaling_factor": "factor",
    "rope_original_context": ORIGINAL_CONTEXT,
}
# Types of what is worked with below; ModelConfig checks the others. Also within the rotary settings.
TYPES = {
    "text": ((str,), ("model_type", "hidden_act", "activation_function", "rope_type", "type")),
    "a list": ((list,), ("architectures", "layer_types")),
    "an object": ((dict,), ("auto_map", "rope_scaling", "rope_parameters")),
    "a whole number": (
        (int,),
        ("n_embd", "max_position_embeddings", "sliding_window", "original_max_position_embeddings"),
    ),
    "a number": (
        (int, float),
        ("rope_theta", "rotary_emb_base", "rotary_pct", "partial_rotary_factor", "factor"),
    ),
}
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        architecture: its class with an output head.
        holds: the values it can hold of our switches; those that are not named here are free.
        keys: the key of config.json for a switch.
        activation: the key of config.json for the activation.
        defaults: what transformers takes for keys that a config.json may leave out.
        heads: "free" of the width; must "divide" it; or "equal": num_kv_heads is num_heads, and head_dim their share.
        fixed: keys of config.json that have one value in what we write and are refused with another in what we read.
        dropouts: keys of config.json that are zero in what we write, since the network has none.
    """

    architecture: str
    holds: dict[str, tuple]
    keys: dict[str, str]
    defaults: dict[str, Any]
    heads: Literal["free", "divide", "equal"] = "free"
    activation: str = "hidden_act"
    fixed: dict[str, Any] = field(default_factory=dict)
    dropouts: tuple[str, ...] = ("attention_dropout",)


SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
LLAMA_KEYS = {**SIZES, "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "norm_eps": "rms_norm_eps"}
LLAMA_HOLDS = {
    "norm": ("rmsnorm",),
    "position": ("rope",),
    "rope_fraction": (1.0,),
    "feed_forward": ("swiglu",),
    "parallel_residual": (False,),
}
LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}
LAYERNORM_HOLDS = {"norm": ("layernorm",), "feed_forward": ("gelu", "gelu_tanh"), "qk_norm": (False,)}

FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        holds={**LLAMA_HOLDS, "qk_norm": (False,)},
        keys={**LLAMA_KEYS, "bias": "attention_bias"},
        defaults={**LLAMA_DEFAULTS, "attention_bias": False, "mlp_bias": False},
        heads="divide",
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        holds={**LLAMA_HOLDS, "qk_norm": (False,), "bias": (False,)},
        keys=LLAMA_KEYS,
        defaults={**LLAMA_DEFAULTS, "num_key_value_heads": 8, "sliding_window": 4096},
        fixed={"sliding_window": None},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        holds={**LLAMA_HOLDS, "qk_norm": (True,), "bias": (False,)},
        keys=LLAMA_KEYS,
        defaults={
            **LLAMA_DEFAULTS,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
        },
        fixed={"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        holds={**LAYERNORM_HOLDS, "position": ("learned",), "parallel_residual": (False,)},
        keys={
            "vocab_size": "vocab_size",
            "context_length": "n_positions",
            "num_layers": "n_layer",
            "hidden_size": "n_embd",
            "num_heads": "n_head",
            "ffn_hidden_size": "n_inner",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
            "init_std": "initializer_range",
        },
        heads="equal",
        activation="activation_function",
        defaults={
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        holds={**LAYERNORM_HOLDS, "position": ("rope",)},
        keys={
            **SIZES,
            "norm_eps": "layer_norm_eps",
            "bias": "attention_bias",
            "parallel_residual": "use_parallel_residual",
        },
        heads="equal",
        defaults={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
            "use_parallel_residual": True,
            "attention_bias": True,
        },
        dropouts=("attention_dropout", "hidden_dropout"),
    ),
}


def family_of(config: ModelConfig, preferred: str | None = None) -> str:
    """The family that holds a model: a key of FAMILIES.

    Args:
        preferred: the family it was imported from, which it keeps where that holds it.

    Raises UserError if none does: names the switches at fault, their values, and those of the nearest family.
    """
    faults = {name: _faults(name, family, config) for name, family in FAMILIES.items()}
    nearest = min(faults, key=lambda name: (len(faults[name]), name != preferred))  # the first of those with as few
    if faults[nearest]:
        raise UserError(
            f"no architecture of transformers can hold this model: {'; '.join(faults[nearest])}. {nearest} is the "
            "nearest; a model with its values can be exported, this one is used with megaslm's own tools"
        )
    return nearest


def _faults(name: str, family: Family, config: ModelConfig) -> list[str]:
    """What keeps a family from holding the model."""
    faults = [
        f"model.{switch} is {value}, where {name} has {' or '.join(map(str, values))}"
        for switch, values in family.holds.items()
        if (value := getattr(config, switch)) not in values
    ]
    heads, rest = config.num_heads, config.hidden_size % config.num_heads
    if rest and family.heads != "free":
        faults.append(f"model.hidden_size {config.hidden_size} is no multiple of num_heads {heads}, as {name} needs")
    elif family.heads == "equal" and config.head_dim * heads != config.hidden_size:
        faults.append(f"model.head_dim is {config.head_dim}, where {name} has hidden_size / num_heads")
    if family.heads == "equal" and config.num_kv_heads != heads:
        faults.append(f"model.num_kv_heads is {config.num_kv_heads}, where {name} has num_heads, {heads}")
    return faults


def hf_config(
    config: ModelConfig, dtype: str, tokenizer: Tokenizer | None, origin: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of config.json for a model, as transformers 4.56 and later read it.

    Args:
        config: with its vocabulary.
        dtype: of the exported weights, a key of DTYPE_NAMES.
        tokenizer: whose special tokens are named; None names none.
        origin: what is known of the model of transformers that it was imported from (`HuggingFaceFolder.facts`): its
            family and its special tokens come back.

    Raises UserError: no family holds the model.
    """
    origin = origin or {}
    name = family_of(config, origin.get("family"))
    family = FAMILIES[name]
    content: dict[str, Any] = {"model_type": name, "architectures": [family.architecture]}
    content |= {key: getattr(config, switch) for switch, key in family.keys.items()}
    content |= {family.activation: ACTIVATIONS[config.feed_forward], **family.fixed, "use_cache": True}
    content |= dict.fromkeys(family.dropouts, 0.0)
    if name == "llama":
        content["mlp_bias"] = config.bias
    if config.position == "rope":
        content |= _rotary_keys(name, config)
    content |= special_tokens(tokenizer, origin)
    # transformers 4 reads the former, 5 the latter.
    return {**content, "torch_dtype": DTYPE_NAMES[dtype], "dtype": DTYPE_NAMES[dtype]}


def special_tokens(tokenizer: Tokenizer | None, origin: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The ids of SPECIAL_TOKENS for config.json; None: there is none.

    Explicitly none, since the classes of transformers have ids of their own in these places. Where `origin` has some
    they go before the tokenizer's: it may have several that end a text, and others than its tokenizer names.
    """
    ids = (None,) * 3 if tokenizer is None else (tokenizer.bos_id, tokenizer.eod_id, tokenizer.pad_id)
    return {**dict(zip(SPECIAL_TOKENS, ids, strict=True)), **((origin or {}).get("special_tokens") or {})}


def generation_config(tokenizer: Tokenizer | None, origin: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of generation_config.json: that of `origin` (see `hf_config`) if it had one."""
    kept = (origin or {}).get("generation_config")
    return kept if kept is not None else {**special_tokens(tokenizer, origin), "do_sample": True}


def _rotary_keys(name: str, config: ModelConfig) -> dict[str, Any]:
    theta, scaling = rotary_base(config), None
    if config.rope_scaling not in ("none", "ntk"):  # ntk has no name in transformers, and needs none
        scaling = {"rope_type": config.rope_scaling, "factor": config.rope_scaling_factor}
        if config.rope_scaling in ("yarn", "llama3"):
            scaling["original_max_position_embeddings"] = config.rope_original_context
            scaling |= YARN_RANGE if config.rope_scaling == "yarn" else LLAMA3_RANGE
    keys = {"rope_theta": theta, "rope_scaling": scaling}
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    if name == "gpt_neox":
        keys |= {"rotary_emb_base": theta, "rotary_pct": config.rope_fraction}
        parameters["partial_rotary_factor"] = config.rope_fraction
    return {**keys, "rope_parameters": parameters}


def family_named(hf: dict[str, Any], where: str) -> str:
    """The family that a config.json names.

    Raises UserError: another architecture, a model without an output head, code of its own, quantized weights.
    """
    _check_types(hf, where)
    name = hf.get("model_type")
    if name not in FAMILIES:
        raise UserError(
            f"{where}: model_type is {name!r}, and megaslm's network computes {', '.join(FAMILIES)} and no other"
        )
    architectures = hf.get("architectures") or [FAMILIES[name].architecture]
    if architectures != [FAMILIES[name].architecture]:
        raise UserError(
            f"{where}: architectures is {architectures}, and only {FAMILIES[name].architecture} is a language model"
        )
    if "AutoModelForCausalLM" in (hf.get("auto_map") or {}):
        raise UserError(f"{where}: auto_map names code of its own, which megaslm does not run")
    if hf.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config is {hf['quantization_config']}: the weights are quantized; take the "
            "model that they were made from, or dequantize them with transformers"
        )
    return name


def _check_types(hf: dict[str, Any], where: str) -> None:
    for kind, (types, keys) in TYPES.items():
        for key in keys:
            for section in (hf, hf.get("rope_scaling"), hf.get("rope_parameters")):
                value = section.get(key) if isinstance(section, dict) else None
                if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
                    raise UserError(f"{where}: {key} is {value!r}, not {kind}")


def model_config(hf: dict[str, Any], where: str) -> ModelConfig:
    """The switches of the model that a config.json describes. Dropout is no matter: see `dropout_of`.

    Args:
        hf: content of config.json.
        where: its path, for messages.

    Raises UserError: names the key that our network cannot hold, one that is missing, or one of the wrong type.
    """
    name = family_named(hf, where)
    family = FAMILIES[name]

    def value(key: str) -> Any:
        if hf.get(key) is None and key not in family.defaults:
            raise UserError(f"{where}: {key} is missing, without which a {name} has no shape")
        return hf.get(key, family.defaults.get(key))

    switches = {switch: value(key) for switch, key in family.keys.items()}
    switches |= {switch: values[0] for switch, values in family.holds.items() if len(values) == 1}
    activation = value(family.activation)
    same = SYNONYMS.get(activation, activation)
    allowed = {ACTIVATIONS[kind]: kind for kind in family.holds["feed_forward"]}
    if same not in allowed:
        raise UserError(f"{where}: {family.activation} is {activation!r}; megaslm's network has {', '.join(allowed)}")
    switches["feed_forward"] = allowed[same]
    if name == "gpt2":
        switches["bias"] = True
        if switches["ffn_hidden_size"] is None:
            switches["ffn_hidden_size"] = 4 * value("n_embd")
    if not switches["init_std"]:
        switches["init_std"] = None  # of no use to weights that are there
    _check_fixed(name, value, where)
    if hf.get("layer_types") and set(hf["layer_types"]) != {"full_attention"}:
        raise UserError(
            f"{where}: layer_types is {hf['layer_types']}; every layer of megaslm's network sees everything"
        )
    if switches["position"] == "rope":
        switches |= _rotary_switches(name, hf, where)
    try:
        config = ModelConfig(**switches)
    except ValidationError as error:
        first = error.errors()[0]
        keys = {**ROTARY_KEYS, **family.keys}
        key = keys.get(str(first["loc"][0]), "") if first["loc"] else ""
        given = f"{key} is {first['input']!r}: " if key else ""
        raise UserError(f"{where}: {given}{first['msg'].removeprefix('Value error, ')}") from None
    if family.heads == "divide" and config.hidden_size % config.num_heads:
        same = "; with model_type mistral, architectures left out and sliding_window null it is the same model"
        raise UserError(
            f"{where}: hidden_size {config.hidden_size} is no multiple of num_attention_heads {config.num_heads}, "
            f"which transformers refuses in a {name}{'' if config.bias else same}"
        )
    return config


def _check_fixed(name: str, value: Callable[[str], Any], where: str) -> None:
    """Refuse what the class of transformers does and our network does not."""
    fixed = dict(FAMILIES[name].fixed)
    if name == "llama" and value("attention_bias") != value("mlp_bias"):
        raise UserError(
            f"{where}: attention_bias is {value('attention_bias')} and mlp_bias is {value('mlp_bias')}; megaslm's "
            "network has biases in both or in neither"
        )
    if "sliding_window" in fixed:
        # A window that the whole context fits in is none.
        del fixed["sliding_window"]
        window, context = value("sliding_window"), value("max_position_embeddings")
        slides = name == "mistral" or value("use_sliding_window")
        fixed.pop("use_sliding_window", None)
        if slides and window is not None and window < context:
            raise UserError(
                f"{where}: sliding_window is {window}, shorter than max_position_embeddings {context}; every token of "
                "megaslm's network sees all before it. Up to that many tokens the model is the same: with "
                f"max_position_embeddings set to {window} it can be converted"
            )
    for key, only in fixed.items():
        if value(key) != only:
            raise UserError(f"{where}: {key} is {value(key)}; megaslm's network has {only} there")


def _rotary_switches(name: str, hf: dict[str, Any], where: str) -> dict[str, Any]:
    """The rotary switches, from either spelling."""
    parameters = hf.get("rope_scaling") or hf.get("rope_parameters") or {}  # in transformers' order
    if any(isinstance(part, dict) for part in parameters.values()):
        raise UserError(f"{where}: rope_parameters differ from layer to layer; megaslm's network has one rotation")

    def one(key: str, old: str, default: float) -> float:
        """A value that may stand in two or three places, which must agree."""
        places = {"rope_parameters": (hf.get("rope_parameters") or {}).get(key), old: hf.get(old)}
        places["rope_scaling"] = (hf.get("rope_scaling") or {}).get(key)
        given = {place: found for place, found in places.items() if found is not None}
        if len(set(given.values())) > 1:
            raise UserError(f"{where}: {key} is given twice, with different values ({given}); leave one")
        return float(next(iter(given.values()), default))

    neox = name == "gpt_neox"
    theta = one("rope_theta", "rotary_emb_base" if neox else "rope_theta", 10000.0)
    fraction = one("partial_rotary_factor", "rotary_pct" if neox else "partial_rotary_factor", 0.25 if neox else 1.0)
    if fraction != 1.0 and not neox:
        raise UserError(
            f"{where}: partial_rotary_factor is {fraction}, which {name} in transformers has no use for; of the "
            "families megaslm reads, gpt_neox has one"
        )
    switches = {"rope_theta": theta, "rope_fraction": fraction}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return switches
    if kind not in ("linear", "yarn", "llama3"):
        raise UserError(f"{where}: rope_type is {kind!r}; megaslm's network has default, linear, yarn and llama3")
    if not isinstance(parameters.get("factor"), (int, float)):
        raise UserError(f"{where}: rope_type is {kind!r}, and its factor is {parameters.get('factor')}, not a number")
    factor = float(parameters["factor"])
    switches |= {"rope_scaling": kind, "rope_scaling_factor": factor}
    only: dict[str, Any] = {}
    if kind == "yarn":
        only = {**YARN_RANGE, "truncate": True, "mscale": None, "mscale_all_dim": None}
        only["attention_factor"] = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    elif kind == "llama3":
        only = LLAMA3_RANGE
    for key, expected in only.items():
        given = parameters.get(key)
        absent = given is None and kind == "yarn"  # llama3 has no defaults
        close = isinstance(given, (int, float)) and expected is not None and math.isclose(given, expected, rel_tol=1e-6)
        if not (absent or close):
            raise UserError(f"{where}: {key} of rope_type {kind!r} is {given}; megaslm's network has {expected} there")
    if kind in ("yarn", "llama3"):
        original = hf.get(ORIGINAL_CONTEXT, parameters.get(ORIGINAL_CONTEXT))
        switches["rope_original_context"] = original or hf.get("max_position_embeddings")
    return switches


def needs_transformers_5(hf: dict[str, Any], where: str) -> bool:
    """Whether transformers 4 would compute something else, in silence: it passes over the rotary settings' new
    spelling (`rope_parameters`), and over old ones in new places. Raises UserError as `model_config`."""
    old = {key: value for key, value in hf.items() if key not in ("rope_parameters", ORIGINAL_CONTEXT)}
    if hf.get("rope_scaling"):
        old["rope_scaling"] = {key: value for key, value in hf["rope_scaling"].items() if key not in ONLY_OF_5}
    expected = model_config(hf, where)
    try:
        return model_config(old, where) != expected
    except UserError:
        return True


def dropout_of(hf: dict[str, Any]) -> dict[str, float]:
    """The dropout rates above zero of a config.json. megaslm's network has none, which changes nothing but training."""
    return {key: hf[key] for key in DROPOUTS if hf.get(key)}
