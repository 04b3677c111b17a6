"""Where a run starts: at its own newest checkpoint, at the weights of another run, or from nothing."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from megaslm.checkpoint import (
    Checkpoint,
    check_compatible,
    checkpoint_step,
    latest_sound,
    list_checkpoints,
    open_checkpoint,
)
from megaslm.errors import UserError
from megaslm.parallel import host
from megaslm.training.preparation import Options, Plan, identity


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a new run starts from. `origin` goes into its checkpoints, `differences` to the terminal."""

    checkpoint: Checkpoint
    origin: dict
    differences: str


def find_checkpoint(plan: Plan) -> Checkpoint | None:
    """The newest sound checkpoint of the run folder, if it is one of this run; the data is set to go on from it."""
    options = plan.options
    directory = options.run_dir / "checkpoints"
    if options.resume == "never":
        if host.on_first(lambda: bool(list_checkpoints(directory))):
            raise UserError(
                f"{options.run_dir} already holds a run; leave out --resume never to continue it, "
                "or choose another --run_dir"
            )
        return None
    if options.resume == "weights" and weights_directory(options) in (directory.resolve(), options.run_dir.resolve()):
        raise UserError(
            f"--from {options.weights_from} is in the run folder itself: the new run would mix with the one that its "
            "weights come from; choose another --run_dir"
        )
    checkpoint = latest_sound(directory, report=plan.say)
    if checkpoint is not None:
        state = checkpoint.global_state
        check_compatible(state["identity"], identity(plan.run, plan.data))
        origin = state["progress"]["weights_from"]
        if options.resume == "weights" and (origin or {}).get("from") != os.path.abspath(options.weights_from):
            start = f"from the weights of {origin['from']}" if origin else "without given weights"
            raise UserError(
                f"{options.run_dir} holds a run that started {start}; to continue it, leave out --resume weights; "
                f"to start one from {options.weights_from}, choose another --run_dir"
            )
        plan.data.training.load_state(state["data"], plan.run.data.first_sample + state["progress"]["samples"])
    return checkpoint


def weights_directory(options: Options) -> Path:
    """The folder that the checkpoint of --from lies in, or whose newest checkpoint is meant."""
    source = options.weights_from.resolve()
    return source.parent if checkpoint_step(source) is not None else source


def find_weights(plan: Plan) -> InitialWeights:
    """The checkpoint of --from, or the newest sound one of the run named, if its weights mean the same tokens."""
    source = plan.options.weights_from
    directory = host.on_first(lambda: next(filter(list_checkpoints, (source / "checkpoints", source)), None))
    # The other run may be writing there: nothing is put in order.
    checkpoint = latest_sound(directory, report=plan.say, repair=False) if directory else open_checkpoint(source)
    host.together(checkpoint.hold)  # its run may delete it before the engine is built
    state = checkpoint.global_state.get("identity", {})
    here = identity(plan.run, plan.data)
    tokenizers = state.get("tokenizer"), here["tokenizer"]
    if all(tokenizers) and tokenizers[0] != tokenizers[1]:
        raise UserError(
            f"the weights of {checkpoint.path} were trained with another tokenizer ({tokenizers[0]}) than that of this "
            f"run's data ({tokenizers[1]}): the embeddings would mean other tokens; tokenize the data with the former"
        )
    changed = [
        f"{name} {json.dumps(state[name])} -> {json.dumps(here[name])}"
        for name in sorted(here.keys() & state.keys())
        if name.startswith("model.") and json.dumps(state[name]) != json.dumps(here[name])
    ]
    origin = {
        "from": os.path.abspath(source),  # a link such as lm_current stays one: it may move on
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "sha256": checkpoint.manifest["sha256"],
    }
    return InitialWeights(checkpoint, origin, f", with {', '.join(changed)}" if changed else "")
