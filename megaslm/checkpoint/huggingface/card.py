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
output = model.generate(**inputs, max_new_tokens=100, do_sample=True, top_k=50)
print(tokenizer.decode(output[0]))
```"""
SNIPPET_OF_IDS = """\
```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")  # exported without its tokenizer
output = model.generate(torch.tensor([[0]]), max_new_tokens=100, do_sample=True, top_k=50)
```"""


def model_card(source: "ModelSource", name: str, record: dict[str, Any]) -> str:
    """The card of an export.

    Args:
        name: what users open, a folder or a repository.
        record: the content of megaslm_export.json, without `files`.
    """
    snippet = SNIPPET if source.tokenizer is not None else SNIPPET_OF_IDS
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- megaslm\n---",
        f"# {record['checkpoint']['run'] if record['checkpoint'].get('step') else name}",
        f"A {record['family']} language model of {record['parameters']:,} parameters, weights in {record['dtype']}, "
        f"{_origin(source)} megaslm {record['megaslm']}.",
        snippet.format(name=name),
        "## Model",
        _table(_model_facts(source)),
    ]
    if source.kind == "checkpoint" and source.weights.step:
        parts += ["## Training", _table(_training_facts(source))]
    if record["logits_check"]:
        parts += ["## The export", _check_text(record)]
    return "\n\n".join(parts) + "\n"


def _origin(source: "ModelSource") -> str:
    """How it came about."""
    if source.kind == "huggingface":
        return f"made from {source.path.name} with"
    if (origin := source.weights.global_state.get("imported_from")) is not None:
        return f"made from {origin['name']} with"
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
    position = f"rotary, theta {config.rope_theta:g}" if config.position == "rope" else "learned"
    return {
        "layers": config.num_layers,
        "width": config.hidden_size,
        "heads": heads,
        "feed-forward": f"{config.feed_forward}, {config.ffn_hidden_size:,}",
        "context": f"{config.context_length:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "positions": position,
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
        f"{check['tokens']} tokens ({check['text']}) from it, and megaslm those of the checkpoint, both in fp32: "
        f"the largest difference is {check['max_difference']:.3g}, of {check['bound']:g} allowed. "
        "`megaslm_export.json` has the size and the hash of every file. Made from: "
        f"`{json.dumps(record['checkpoint'])}`."
    )
