"""The configuration of an export, read back: what the logits of one text do not show of it.

They do not show the longest context, the spelling of the rotary settings that this version of transformers passes over,
special tokens, the type that the weights are opened in, a window longer than the text, nor dropout.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaslm.checkpoint.huggingface.families import (
    DROPOUTS,
    DTYPE_NAMES,
    FAMILIES,
    SPECIAL_TOKENS,
    family_of,
    model_config,
    special_tokens,
)
from megaslm.checkpoint.huggingface.folder import CONFIG, HuggingFaceFolder
from megaslm.checkpoint.huggingface.library import load_transformers
from megaslm.config import ModelConfig
from megaslm.errors import UserError
from megaslm.model import rotary_base

if TYPE_CHECKING:
    from megaslm.checkpoint.opening import ModelSource

# The keys of each spelling of the rotary settings: either alone says all.
OLD_ROTARY = ("rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct")
NEW_ROTARY = ("rope_parameters",)


def configuration_faults(folder: Path, source: "ModelSource", dtype: str) -> list[str]:
    """What config.json, generation_config.json and the tokenizer's files say otherwise than the model is.

    Args:
        folder: an export, weights and all.
        source: that it was made from.
        dtype: of its weights, "bf16", "fp16" or "fp32".
    """
    faults = []
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    expected = as_read_back(source.config, source.origin.get("family"))
    try:
        if str(HuggingFaceFolder(folder).dtype) != f"torch.{DTYPE_NAMES[dtype]}":
            faults.append(f"the weights are not {dtype}")
        for left_out in ((), NEW_ROTARY, OLD_ROTARY) if expected.position == "rope" else ((),):
            part = {key: value for key, value in content.items() if key not in left_out}
            faults += _switches(model_config(part, CONFIG), expected)
    except UserError as error:
        faults.append(str(error))
    fixed = {**FAMILIES[family_of(expected, source.origin.get("family"))].fixed, "use_cache": True}
    fixed |= dict.fromkeys(("dtype", "torch_dtype"), DTYPE_NAMES[dtype])
    if expected.position == "rope":
        fixed["rope_theta"] = expected.rope_theta  # which transformers 4 reads in a gpt_neox too
    for key, value in fixed.items():
        faults += _compare(f"{CONFIG}: {key}", content.get(key), value)
    return faults + _as_transformers_reads(folder, source, expected)


def as_read_back(config: ModelConfig, preferred: str | None = None) -> ModelConfig:
    """The switches as the config.json of an export holds them: what it has no word for has its default.

    Args:
        preferred: see `family_of`.
    """
    switches: dict[str, Any] = config.model_dump()
    if config.position == "learned":
        switches = {key: value for key, value in switches.items() if not key.startswith("rope_")}
    elif config.rope_scaling == "ntk":  # a larger theta
        switches |= {"rope_theta": rotary_base(config), "rope_scaling": "none", "rope_scaling_factor": 1.0}
    if family_of(config, preferred) == "gpt2":
        switches["bias"] = True  # zeros, where the model has none
    return ModelConfig(**switches)


def _switches(found: ModelConfig, expected: ModelConfig) -> list[str]:
    found, expected = found.model_dump(), expected.model_dump()
    return [fault for key in expected for fault in _compare(f"{CONFIG}, as model.{key}", found[key], expected[key])]


def _as_transformers_reads(folder: Path, source: "ModelSource", expected: ModelConfig) -> list[str]:
    transformers = load_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        generation = transformers.GenerationConfig.from_pretrained(folder)
    except Exception as error:  # a class for each fault
        return [f"transformers does not open it: {' '.join(str(error).split())[:300]}"]
    faults = _compare("tie_word_embeddings", config.tie_word_embeddings, expected.tie_embeddings)
    faults += _compare("sliding_window", getattr(config, "sliding_window", None), None)
    for key in DROPOUTS:
        faults += _compare(key, getattr(config, key, 0.0), 0.0)
    ids = special_tokens(source.tokenizer, source.origin)
    for key in SPECIAL_TOKENS:
        faults += _compare(f"{CONFIG}: {key}", getattr(config, key, None), ids[key])
        if not source.origin.get("generation_config"):
            faults += _compare(f"generation_config.json: {key}", getattr(generation, key), ids[key])
    if (ours := source.tokenizer) is not None:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        faults += _compare("eos_token of the tokenizer", theirs.eos_token_id, ours.eod_id)
        for name, found, own in (("bos", theirs.bos_token_id, ours.bos_id), ("pad", theirs.pad_token_id, ours.pad_id)):
            if found is not None:  # ours begins a text with the token that ends one, where none is named
                faults += _compare(f"{name}_token of the tokenizer", found, own)
    return faults


def _compare(what: str, found: Any, expected: Any) -> list[str]:
    return [] if found == expected else [f"{what} is {found!r} instead of {expected!r}"]
