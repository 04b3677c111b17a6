"""Where a run starts: at its own newest checkpoint, at the weights of another run, or from nothing."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from megaslm.checkpoint import (
    WEIGHTS,
    Checkpoint,
    FingerprintCheck,
    check_compatible,
    checkpoint_step,
    code_versions,
    latest_sound,
    list_checkpoints,
    open_checkpoint,
)
from megaslm.errors import UserError
from megaslm.parallel import host
from megaslm.training.preparation import Options, Plan, completed_identity, identity


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a new run starts from. `origin` goes into its checkpoints, `differences` to the terminal.

    same_model: the run's model config is that of the weights, so that it must compute the same.
    """

    checkpoint: Checkpoint
    same_model: bool
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
        if not {"identity", "progress", "data"} <= state.keys():
            raise UserError(
                f"{checkpoint.path} holds weights alone, not a run that can go on (an import, say); to start a run "
                f"from it: --resume weights --from {checkpoint.path}, with another --run_dir"
            )
        check_compatible(completed_identity(state["identity"]), identity(plan.run, plan.data))
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
    if directory:  # the other run may be writing there: nothing is put in order
        checkpoint = latest_sound(directory, report=plan.say, repair=False, kinds=(WEIGHTS,))
    else:
        checkpoint = open_checkpoint(source, kinds=(WEIGHTS,))
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
    earlier = (checkpoint.global_state.get("progress") or {}).get("weights_from") or {}
    origin = {
        "from": os.path.abspath(source),  # a link such as lm_current stays one: it may move on
        "checkpoint": str(checkpoint.path),
        "run": checkpoint.run_config.get("name"),
        "step": checkpoint.step,
        "sha256": checkpoint.manifest["sha256"],
        # The model of transformers that it all began with, if it did.
        "imported_from": (checkpoint.global_state.get("imported_from") or {}).get("name", earlier.get("imported_from")),
    }
    same_model = "model" in checkpoint.run_config and checkpoint.model_config == plan.run.model
    return InitialWeights(checkpoint, same_model, origin, f", with {', '.join(changed)}" if changed else "")


def check_restored(checkpoint: Checkpoint, check: FingerprintCheck, plan: Plan) -> None:
    """Refuse to go on with a model that computes something else than the one that was saved. Collective.

    check: of the restored model, against the checkpoint's fingerprint.
    """

    def refuse_difference() -> None:
        if check.equal is False:
            raise UserError(
                f"the model restored from {checkpoint.path} does not compute what it did when it was saved: "
                f"{check.text}. Its files are as they were written, so the code or the machine computes otherwise: "
                f"{_what_may_help(checkpoint, plan)}"
            )

    host.together(refuse_difference)
    if check.equal is None:
        plan.say(f"warning: what the restored model computes was not compared with its checkpoint: {check.text}")


def _what_may_help(checkpoint: Checkpoint, plan: Plan) -> str:
    """What differs between the save and this process, and what to try, the likeliest first."""
    before, here = checkpoint.manifest["code"], code_versions()
    changed = [f"{name} {before.get(name)} -> {here[name]}" for name in here if before.get(name) != here[name]]
    saved_in = checkpoint.fingerprint.precision
    attempts = []
    if plan.ops.backend != "reference":
        attempts.append("train.kernels=reference")
    if plan.precision != saved_in:
        attempts.append(f"train.precision={saved_in}, as it was saved")
    if changed:
        attempts.append("the versions that saved it")
    attempts.append("another machine")
    versions = ", ".join(changed) if changed else f"the versions of {', '.join(here)} are those of the save"
    return f"{versions}; kernels {plan.ops.backend}, precision {plan.precision}. Try {', or '.join(attempts)}"
