"""What is measured: a training step of one network, by this project's engine or by one that users know."""

from dataclasses import dataclass
from typing import Any

from megaslm.config import (
    BatchLayout,
    DatasetConfig,
    RunConfig,
    TokenizerConfig,
    check_tensor_parallel,
    default_engine_config,
    load_engine_config,
    load_run_config,
    resolve_batch,
    with_expected_vocabulary,
)
from megaslm.errors import UserError
from megaslm.parallel import check_sizes
from megaslm.throughput.peers import check_peer


@dataclass(frozen=True)
class Case:
    """One thing to measure, in processes of its own. What is None is as the run config, or the engine config, says.

    kind: "megaslm", or one of the PEERS.
    engine_file: the engine config; None: that of a run without --ds_config. Peers have none.
    token_file: PREFIX of the tokens to read; None: the run config names the data.
    global_batch_size: sequences of a step on all ranks.
    world_size: ranks, on this machine.
    """

    preset: str
    kind: str = "megaslm"
    compiled: bool | None = None
    overrides: tuple[str, ...] = ()
    engine_file: str | None = None
    token_file: str | None = None
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    world_size: int = 1
    precision: str | None = None

    def __str__(self) -> str:
        return f"{self.preset}, {self.kind}{', compiled' if self.compiled else ''}"

    def run_config(self) -> RunConfig:
        """The run whose step is measured.

        Raises UserError: a preset or an override that is wrong.
        """
        run = load_run_config(self.preset, list(self.overrides))
        train = {
            "compile": self.compiled,
            "micro_batch_size": self.micro_batch_size,
            "global_batch_size": self.global_batch_size,
            "precision": self.precision,
        }
        given = {name: value for name, value in train.items() if value is not None}
        changes: dict[str, Any] = {"train": run.train.model_copy(update=given)}
        if self.token_file is not None:
            train_on = [DatasetConfig(prefix=self.token_file)]
            own = {"input": [], "train": train_on, "validation": [], "split": "90,10"}
            changes |= {
                "data": run.data.model_copy(update=own),
                "model": with_expected_vocabulary(run).model,
                "tokenizer": TokenizerConfig(),
                "eval": run.eval.model_copy(update={"sample_prompt": ""}),
            }
        return run.model_copy(update=changes)

    def engine_config(self) -> dict[str, Any]:
        """As in the file, with "auto" still in it."""
        return load_engine_config(self.engine_file) if self.engine_file else default_engine_config()

    def copies(self, run: RunConfig) -> int:
        """Of the model, on all ranks together."""
        return self.world_size // run.parallel.tensor_parallel_size

    def batch(self, run: RunConfig) -> BatchLayout:
        """How the global batch is cut. Raises UserError where the micro-batch asked for does not divide it."""
        copies = self.copies(run)
        layout = resolve_batch(run.train.global_batch_size, run.train.micro_batch_size, copies)
        if self.micro_batch_size not in (None, layout.micro_batch_size):
            share = run.train.global_batch_size // copies
            sizes = ", ".join(map(str, divisors(share)))
            raise UserError(
                f"--micro_batch {self.micro_batch_size} does not divide {share}, a rank's share of the global batch of "
                f"{run.train.global_batch_size}: take one of {sizes}, or give train.global_batch_size=N"
            )
        return layout

    def check(self) -> None:
        """Raise UserError for what the configs alone show to be wrong; `examine` asks the machine."""
        run = self.run_config()
        if run.expected_vocab_size is None and names_data(run):
            # Known once the data is open; any will do to look at the rest.
            run = run.model_copy(update={"model": run.model.model_copy(update={"vocab_size": 128})})
        run = with_expected_vocabulary(run)
        size = run.parallel.tensor_parallel_size
        if self.world_size % size:
            raise UserError(f"parallel.tensor_parallel_size={size} does not divide --world_size {self.world_size}")
        check_sizes(run.model, size)
        check_tensor_parallel(self.engine_config(), size)
        self.batch(run)
        if self.kind != "megaslm":
            check_peer(self.kind, run)


def names_data(run: RunConfig) -> bool:
    """Whether the run config, or an override, says what to read."""
    return bool(run.data.train or run.data.input)


def divisors(number: int) -> list[int]:
    """From 1 on."""
    return [size for size in range(1, number + 1) if number % size == 0]
