"""Save a DeepSpeed engine to a checkpoint, and continue a checkpoint in an engine, whatever the layout of either."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megaslm.checkpoint.buffers import HostBuffers
from megaslm.checkpoint.fingerprint import Fingerprint
from megaslm.checkpoint.folder import write_checkpoint
from megaslm.checkpoint.format import ADAM_MOMENTS, WEIGHTS, Checkpoint, Piece
from megaslm.errors import UserError
from megaslm.parallel import host

SHOWN = 5  # differences that a message lists


def check_engine(engine) -> None:
    """Refuse, at start-up rather than at the first save, an engine whose state can't be saved.

    Raises:
        UserError: another DeepSpeed version, an optimizer that is not a kind of Adam, or an unsupported layout.
    """
    _engine_state(engine)


def _engine_state(engine):
    # Imported here: those who only read checkpoints need no DeepSpeed, whose import looks for devices.
    from megaslm.checkpoint.deepspeed_state import EngineState

    return EngineState(engine)


def differing_copies(engine) -> list[str]:
    """Parameters of which every rank of a tensor-parallel group should hold the same, and some do not. Collective.

    A checkpoint has one rank's of each.
    """
    return _engine_state(engine).differing_copies()


class NoHostMemory(UserError):
    """A rank has no room for a copy of its state; without one, the state can be saved while the training waits."""


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a checkpoint, as taken at a step; `write` puts it on the disk.

    pieces: by kind; manifest: what the manifest says of the run, arguments of `write_checkpoint`.
    """

    directory: Path
    pieces: dict[str, list[Piece]]
    manifest: dict[str, Any]

    def write(self) -> Path:
        """Write the checkpoint DIRECTORY/step_XXXXXXXX with the snapshots of the other ranks. Collective.

        Raises:
            SaveFailed: the disk is full or not writable. Nothing that was there is lost, and no half-written checkpoint
                is to be seen.
        """
        return write_checkpoint(self.directory, self.pieces, **self.manifest)


def take_snapshot(
    directory: str | Path,
    engine,
    *,
    step: int,
    run_config: dict[str, Any],
    global_state: dict[str, Any],
    marks: dict[str, Any] | None = None,
    fingerprint: Fingerprint | None = None,
    tokenizer_files: Mapping[str, str] | None = None,
    weights_only: bool = False,
    buffers: HostBuffers | None = None,
) -> Snapshot:
    """Take the engine's state as it is now. Collective.

    To be called between optimizer steps, with no gradients accumulated: those are not saved. Each rank takes what it
    holds, its share of the state; no tensors travel between the ranks.

    Args:
        directory: where the run's checkpoints go.
        engine: what `deepspeed.initialize` returned.
        step: optimizer steps made.
        run_config: the resolved run config, plain JSON values.
        global_state: the training loop's own state (samples consumed, ...), plain JSON values, alike on all ranks.
        marks: what retention goes by, see format.py.
        fingerprint: of the model as it is now.
        tokenizer_files: `Tokenizer.files` of the run's, which go into the checkpoint.
        weights_only: leave out the optimizer's state.
        buffers: copy the state there, 12 bytes a parameter over all ranks together, so that training may go on while
            it is written. Without, it must be written before the next step.

    Raises:
        UserError: the engine is of a kind that is not supported.
        NoHostMemory: a rank has no room for the copy.
    """
    # A copy, which the run can't change while it is written; and a TypeError here, before anything is.
    run_config, global_state, marks = json.loads(json.dumps([run_config, global_state, marks]))
    state = _engine_state(engine)
    kinds = (WEIGHTS,) if weights_only else (WEIGHTS, *ADAM_MOMENTS)
    optimizer = None
    if not weights_only:
        optimizer = {
            "type": "adam",
            "moments": list(ADAM_MOMENTS),
            "steps": state.steps(),
            "weight_decay": state.weight_decay(),
            "loss_scaler": state.loss_scaler(),
        }
    manifest = {
        "step": step,
        "run_config": run_config,
        "global_state": global_state,
        "marks": marks,
        "optimizer": optimizer,
        "fingerprint": fingerprint,
        "tokenizer_files": tokenizer_files,
    }
    take = partial(_take_pieces, state, kinds, buffers)
    if buffers is None:
        return Snapshot(Path(directory), take(), manifest)
    pieces, failures = host.try_together(take)
    if not failures:
        return Snapshot(Path(directory), pieces, manifest)
    rank, error = failures[0]
    if isinstance(error, (MemoryError, RuntimeError)):  # torch has no type of its own for host memory
        text = (str(error) or type(error).__name__).splitlines()[0]
        raise NoHostMemory(f"rank {rank} could not copy its state to host memory ({text})") from error
    raise error


def _take_pieces(state, kinds: tuple[str, ...], buffers: HostBuffers | None) -> dict[str, list[Piece]]:
    pieces = {kind: state.pieces(kind, buffers) for kind in kinds}
    if buffers is not None:
        buffers.wait()
    return pieces


def save_checkpoint(directory: str | Path, engine, **options: Any) -> Path:
    """Save the engine's state at once as DIRECTORY/step_XXXXXXXX. Collective; arguments as of `take_snapshot`.

    Returns:
        The checkpoint's folder, complete and on the disk.

    Raises:
        UserError: the engine is of a kind that is not supported.
        SaveFailed: see `Snapshot.write`.
    """
    return take_snapshot(directory, engine, **options).write()


def restore(checkpoint: Checkpoint, engine, *, weights_only: bool = False) -> dict[str, Any]:
    """Continue a checkpoint in an engine: weights, moments, step counts and loss scale. Collective.

    In the layout of the save the continuation is exact; in another one it differs by the rounding of the sums. Learning
    rate, decay and betas are the engine's own and stay as they are. Every rank reads only what it holds, or of a matrix
    whose columns were or are shared out, whole rows.

    Args:
        engine: fresh, or between optimizer steps (what it holds is overwritten).
        weights_only: take the weights alone, and start the optimizer anew.

    Returns:
        The global_state that was given to the save.

    Raises:
        UserError: the model has other parameters or shapes than the checkpoint, or the optimizer is another one.
        DamagedCheckpoint: a file went bad since the checkpoint was opened.
    """
    state = _engine_state(engine)
    _check_parameters(checkpoint, state.shapes)
    optimizer = checkpoint.optimizer
    if not weights_only:
        if optimizer is None:
            raise UserError(
                f"checkpoint {checkpoint.path} holds weights alone, without the state of the optimizer: "
                "it can start a new run, not continue one"
            )
        if optimizer["type"] != "adam":
            raise UserError(
                f"checkpoint {checkpoint.path} holds the state of the optimizer {optimizer['type']}, and this run's is "
                "Adam: choose that optimizer, or start a new run from the weights alone"
            )

    def load() -> None:
        for kind in (WEIGHTS,) if weights_only else (WEIGHTS, *ADAM_MOMENTS):
            state.load(kind, lambda name, part, kind=kind: checkpoint.read_part(kind, name, part))

    _, failures = host.try_together(load)
    checkpoint.close()
    if failures:
        raise failures[0][1]
    if weights_only:
        state.clear_moments()
    else:
        state.load_steps(optimizer["steps"])
        state.load_loss_scaler(optimizer["loss_scaler"])
    state.refresh_model_weights()
    return checkpoint.global_state


def _check_parameters(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse a checkpoint of another model, by the first parameters that differ."""
    differences = []
    for name in sorted(shapes.keys() | checkpoint.shapes.keys()):
        saved, here = checkpoint.shapes.get(name), shapes.get(name)
        if saved is None:
            differences.append(f"{name} is not in the checkpoint")
        elif here is None:
            differences.append(f"{name} is not in the model")
        elif saved != here:
            differences.append(f"{name} is {list(saved)} in the checkpoint and {list(here)} in the model")
    if differences:
        more = f" and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise UserError(
            f"checkpoint {checkpoint.path} is of another model: {'; '.join(differences[:SHOWN])}{more}. "
            "Use the model config it was saved with, or another run folder"
        )


def check_compatible(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to continue a run whose identity changed.

    Args:
        saved, current: what may not change over a run, by dotted name, such as {"model.num_layers": 4, ...}. Values are
            compared as the JSON they are saved in (a tuple equals a list).

    Raises:
        UserError: lists every name that differs, with both values.
    """
    missing = object()
    differences = []
    for name in sorted(saved.keys() | current.keys()):
        before, now = saved.get(name, missing), current.get(name, missing)
        if before is missing or now is missing or json.dumps(before, sort_keys=True) != json.dumps(now, sort_keys=True):
            shown = ["not set" if value is missing else json.dumps(value) for value in (before, now)]
            differences.append(f"{name} was {shown[0]} and is {shown[1]}")
    if differences:
        raise UserError(
            f"the checkpoint is of another run: {'; '.join(differences)}. "
            "Set these back to continue it, or choose another run folder"
        )
