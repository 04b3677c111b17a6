"""The two orders over open token files: from a sample's number to the pieces of the files that it consists of.

WindowSamples and MegatronSamples have one interface, which TrainingData reads through:

    name, version       what a checkpoint keeps of them
    samples_per_epoch   [datasets] samples in which each dataset is read once, 1 or more; 0 of one that takes no part
    realised_weights    [datasets] shares of the samples
    num_samples         numbers from here on are not in the order; None: it has no end
    locate(samples)     -> dataset, and number within it, of each sample [N]
    pieces(dataset, numbers)         -> Pieces of a dataset's samples [N]
    documents_within(dataset, pieces) -> documents that start within pieces, as DocumentStarts.within gives them
    state(), load_state(state, samples_consumed)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megaslm.data.megatron_order import (
    MEGATRON_ORDER_VERSION,
    MegatronOrder,
    choose_datasets,
    count_per_dataset,
    normalized,
    samples_to_build,
)
from megaslm.data.order import ORDER_VERSION, Blend, Segment, WindowsOrder
from megaslm.data.token_range import TokenRange
from megaslm.errors import UserError


class Pieces(NamedTuple):
    """Stretches of tokens that make up samples of S + 1 tokens each: all [P] int64."""

    samples: np.ndarray  # which of the samples asked for, ascending; their pieces in order
    starts: np.ndarray  # first token, in the part of the file
    lengths: np.ndarray  # tokens, above zero


class WindowSamples:
    """Our order: windows of each file's stream of tokens, see order.py. Every sample is one piece."""

    name, version = "windows", ORDER_VERSION
    num_samples = None

    def __init__(self, parts: Sequence[TokenRange], weights: Sequence[float], seq_length: int, seed: int):
        self.parts, self.weights, self.seq_length, self.seed = parts, weights, seq_length, seed
        self.blend = Blend.of_weights(seed, weights)
        self.orders = [
            WindowsOrder(len(part), seq_length, seed, index, part.prefix, packed=part.bin_length is not None)
            for index, part in enumerate(parts)
        ]
        self.samples_per_epoch = [order.num_windows for order in self.orders]

    @property
    def realised_weights(self) -> list[float]:
        """As whole slots of a block give them."""
        return self.blend.realised_weights

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.blend.locate(samples)

    def pieces(self, dataset: int, numbers: np.ndarray) -> Pieces:
        starts = self.orders[dataset].starts(numbers)
        return Pieces(np.arange(len(numbers)), starts, np.full(len(numbers), self.seq_length + 1))

    def documents_within(self, dataset: int, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
        part = self.parts[dataset]
        return part.documents.within(part.first + pieces.starts, pieces.lengths)

    def state(self) -> dict:
        return {"segments": [segment.to_json() for segment in self.blend.segments]}

    def load_state(self, state: dict, samples_consumed: int) -> None:
        """Go on with the state's segments; where the weights are others, with a new one from here on."""
        segments = [Segment.from_json(segment) for segment in state["segments"]]
        self.blend = Blend(self.seed, segments).with_weights(samples_consumed, self.weights)


class MegatronSamples:
    """Megatron's order, see megatron_order.py: every sample consists of pieces of shuffled sequences.

    It is made for a run of `num_samples` samples. Of Megatron-LM's ways to name data these give its order:

    - One dataset: as `--data-path PREFIX`. With a weight, `--data-path 1 PREFIX`, Megatron-LM builds it for SURPLUS
      times the samples, which may be another number of epochs, and so another order.
    - Several: as `--data-path WEIGHT PREFIX WEIGHT PREFIX`. Without weights they are equal here, and by size there.
    - A dataset of weight 0 is left out here, and refused there.

    UserError for a packed file, and for a seed that NumPy's RandomState refuses.
    """

    name, version = "megatron", MEGATRON_ORDER_VERSION

    def __init__(
        self, parts: Sequence[TokenRange], weights: Sequence[float], seq_length: int, seed: int, num_samples: int
    ):
        self.parts, self.weights, self.num_samples = parts, weights, num_samples
        if not 0 <= seed < 2**32:
            raise UserError(f"Megatron's order takes a seed from 0 to 2^32 - 1, not {seed}: set train.seed")
        blended = [index for index, weight in enumerate(weights) if weight > 0]
        if not blended or min(weights) < 0 or not np.isfinite(weights).all():
            raise UserError(f"weights of the datasets are {list(weights)}: they must be 0 or more, and one above 0")
        for part in (parts[index] for index in blended):
            if part.bin_length is not None:
                raise UserError(
                    f"{part.prefix} is packed, and Megatron's order would cut across its bins: set data.order=windows"
                )
        self.samples_per_epoch = [
            max(1, (len(part) - 1) // seq_length) if weight > 0 else 0
            for part, weight in zip(parts, weights, strict=True)
        ]
        shares = normalized([weights[index] for index in blended])
        wanted, chosen = [num_samples], np.zeros(num_samples, np.int16)
        if len(blended) > 1:
            wanted = [samples_to_build(num_samples, share) for share in shares.tolist()]
            chosen = choose_datasets(normalized(shares), num_samples)  # Megatron normalizes twice
        self._chosen = np.array(blended, np.int16)[chosen]
        self._counts, self._numbers = count_per_dataset(self._chosen, len(parts))
        self.orders: list[MegatronOrder | None] = [None] * len(parts)
        for index, count in zip(blended, wanted, strict=True):
            sequences, file = parts[index].sequences, parts[index].file
            lengths = file.sequence_lengths[sequences.start : sequences.stop].copy()
            self.orders[index] = MegatronOrder(lengths, seq_length, count, seed, parts[index].prefix)
            # No dataset is ever more than a sample ahead of its share, and the surplus is one at least.
            assert len(self.orders[index]) >= self._counts[index], f"too few samples of {parts[index].prefix}"

    @property
    def realised_weights(self) -> list[float]:
        """Shares in the samples of the run."""
        return (self._counts / self.num_samples).tolist()

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._chosen[samples].astype(np.int64), self._numbers[samples].astype(np.int64)

    def pieces(self, dataset: int, numbers: np.ndarray) -> Pieces:
        part = self.parts[dataset]
        samples, sequences, starts, lengths = self.orders[dataset].pieces(numbers)
        firsts = part.file.token_bounds(part.sequences.start + sequences)
        return Pieces(samples, firsts - part.first + starts, lengths)

    def documents_within(self, dataset: int, pieces: Pieces) -> tuple[np.ndarray, np.ndarray]:
        """None: a piece lies in one sequence, and the others of its document are elsewhere."""
        return np.empty(0, np.int64), np.empty(0, np.int64)

    def state(self) -> dict:
        return {"num_samples": self.num_samples, "shuffles": [self._shuffle_of(order) for order in self.orders]}

    @staticmethod
    def _shuffle_of(order: MegatronOrder | None) -> dict | None:
        """All that a dataset's order takes from the length of the run."""
        return order and {"epochs": order.epochs, "last_epoch_apart": order.last_epoch_apart}

    def load_state(self, state: dict, samples_consumed: int) -> None:
        """UserError where the samples would not go on as they began: other datasets, weights, or epochs."""
        weights = [dataset["weight"] for dataset in state["datasets"]]
        if len(weights) != len(self.weights) or (normalized(weights) != normalized(self.weights)).any():
            raise UserError(
                f"the checkpoint's datasets have the weights {weights}, this run's {list(self.weights)}: Megatron's "
                "order is laid out for one blend; set them back, or start a new run from the checkpoint's weights"
            )
        for part, old, new in zip(self.parts, state["shuffles"], self.state()["shuffles"], strict=True):
            if old != new:
                raise UserError(
                    f"the checkpoint's run was one of {state['num_samples']:,} samples, this one of "
                    f"{self.num_samples:,}: Megatron's order shuffles all epochs of a run together, for {part.prefix} "
                    f"{_epochs_text(old)} then and {_epochs_text(new)} now, so that the samples would not go on; give "
                    "the run its first length (train.max_steps), or start a new one from the checkpoint's weights"
                )


def _epochs_text(shuffle: dict) -> str:
    return f"{shuffle['epochs']} epochs" + (" (the last by itself)" if shuffle["last_epoch_apart"] else "")
