"""The README.md of an export: what the model is, how it was trained, what was proven, how it is used."""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megaslm.checkpoint.opening import ModelSource

SNIPPET = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("Once", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens={new_tokens}, do_sample=True, top_k=50)
print(tokenizer.decode(output[0]))
```"""
SNIPPET_OF_IDS = """\
```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")  # exported without its tokenizer
output = model.generate(torch.tensor([[0]]), max_new_tokens={new_tokens}, do_sample=True, top_k=50)
print(output)
```"""
MOST_NEW_TOKENS = 100


def model_card(source: "ModelSource", name: str, record: dict[str, Any]) -> str:
    """The card of an export.

    Args:
        name: what users open, a folder or a repository.
        record: the content of megaslm_export.json, without `files`.
    """
    snippet = SNIPPET if source.tokenizer is not None else SNIPPET_OF_IDS
    new_tokens = max(1, min(MOST_NEW_TOKENS, source.config.context_length // 2))
    base = _base_model(source)
    facts = ["library_name: transformers", "pipeline_tag: text-generation", "tags:\n- megaslm"]
    if base is not None and "/" in base:  # a name on the hub
        facts.append(f"base_model: {base}")
    parts = [
        "\n".join(["---", *facts, "---"]),
        f"# {record['checkpoint'].get('run') or name}",
        f"A {record['family']} language model of {record['parameters']:,} parameters, weights in {record['dtype']}, "
        f"{_origin(source, base)} megaslm {record['megaslm']}.",
        snippet.format(name=name, new_tokens=new_tokens),
        "## Model",
        _table(_model_facts(source)),
    ]
    if source.kind == "checkpoint" and source.weights.step:
        parts += ["## Training", _table(_training_facts(source))]
    if record["logits_check"]:
        parts += ["## The export", _check_text(record)]
    return "\n\n".join(parts) + "\n"


def _state(source: "ModelSource") -> dict[str, Any]:
    """What a checkpoint has of its run beside the weights."""
    return source.weights.global_state if source.kind == "checkpoint" else {}


def _weights_from(source: "ModelSource") -> dict[str, Any]:
    """Of a run that began with given weights: where they came from; else empty."""
    return (_state(source).get("progress") or {}).get("weights_from") or {}


def _base_model(source: "ModelSource") -> str | None:
    """The name of the model of transformers that it began with."""
    if source.kind == "huggingface":
        return source.path.name
    imported = _state(source).get("imported_from") or {}
    return imported.get("name") or _weights_from(source).get("imported_from")


def _origin(source: "ModelSource", base: str | None) -> str:
    """How it came about."""
    given = _weights_from(source)
    if given:
        start = base or f"step {given['step']:,} of {given.get('run') or 'another run'}"
        return f"whose training was continued from {start} with"
    if base is not None:
        return f"made from {base} with"
    return "a base model, which continues text and was not trained to follow instructions, pretrained with"


def _table(facts: dict[str, Any]) -> str:
    rows = [f"| {key} | {_value(value)} |" for key, value in facts.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *rows])


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _model_facts(source: "ModelSource") -> dict[str, Any]:
    config = source.config
    heads = f"{config.num_heads} of {config.head_dim}"
    if config.num_kv_heads != config.num_heads:
        heads += f", {config.num_kv_heads} for keys and values"
    position = "learned"
    if config.position == "rope":
        position = f"rotary, theta {config.rope_theta:g}"
        if config.rope_fraction < 1:
            position += f", over {config.rope_fraction:g} of each head"
        if config.rope_scaling != "none":
            position += f", {config.rope_scaling} scaling by {config.rope_scaling_factor:g}"
        if config.rope_original_context is not None:
            position += f" from {config.rope_original_context:,} tokens"
    return {
        "layers": config.num_layers,
        "width": config.hidden_size,
        "heads": heads,
        "feed-forward": f"{config.feed_forward}, {config.ffn_hidden_size:,}",
        "context": f"{config.context_length:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "positions": position,
        "norm": f"{config.norm}, epsilon {config.norm_eps:g}{', of queries and keys too' if config.qk_norm else ''}",
        "biases": "in every linear layer and norm" if config.bias else "none",
        "residual": "attention and feed-forward in parallel" if config.parallel_residual else None,
        "output head": "tied to the embedding" if config.tie_embeddings else "a matrix of its own",
    }


def _training_facts(source: "ModelSource") -> dict[str, Any]:
    checkpoint = source.weights
    run, progress = checkpoint.run_config, checkpoint.global_state.get("progress", {})
    facts = {"run": run.get("name"), "steps": checkpoint.step, "tokens": progress.get("tokens")}
    if (loss := checkpoint.manifest["marks"]["validation_loss"]) is not None:
        facts["validation loss"] = f"{loss:.4f} nats per token"
    if (best := progress.get("best_loss")) is not None:
        facts["best validation loss"] = f"{best:.4f} nats per token, of step {progress['best_step']:,}"
    facts["data"] = _data(run.get("data", {}))
    if "optimizer" in run:
        optimizer, schedule, batch = run["optimizer"], run["schedule"], run["train"]["global_batch_size"]
        facts["batch"] = f"{batch:,} sequences"
        facts["optimizer"] = f"{optimizer['type']}, betas {optimizer['betas']}, decay {optimizer['weight_decay']:g}"
        facts["learning rate"] = f"{optimizer['lr']:g}, {schedule['type']}, warmup {schedule['warmup_steps']:,} steps"
    facts["code"] = ", ".join(f"{name} {version}" for name, version in checkpoint.manifest["code"].items())
    return facts


def _data(data: dict[str, Any]) -> str | None:
    """The names of what it was trained on, without the folders, which mean nothing elsewhere."""
    named = data.get("input") or [dataset["prefix"] for dataset in data.get("train", [])]
    return ", ".join(path.rstrip("/").split("/")[-1] for path in named) or None


def _check_text(record: dict[str, Any]) -> str:
    check = record["logits_check"]
    return (
        f"Before this folder was given its name, transformers {check['transformers']} computed the logits of "
        f"{check['tokens']} tokens ({check['text']}) from it, and megaslm those of the checkpoint, both in fp32 "
        f"from weights rounded to {record['dtype']}, as they are stored here: the largest difference is "
        f"{check['max_difference']:.3g}, of logits up to {check['largest_logit']:.3g}. "
        "`megaslm_export.json` has the size and the hash of every file. Made from: "
        f"`{json.dumps(record['checkpoint'])}`."
    )
