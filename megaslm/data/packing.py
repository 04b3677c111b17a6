"""Best-fit packing of documents into bins of equal length, so that few documents are cut.

Best-fit decreasing: pieces from the longest to the shortest, each into the fullest bin that it still fits in, or a new
one (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830). Pieces of one length that go
into bins of one capacity are placed together, so that the work is counted in distinct lengths and not in pieces; the
bins are those that the piece-by-piece algorithm finds.
"""

from typing import NamedTuple

import numpy as np


class Packed(NamedTuple):
    """Pieces by bins.

    pieces: [pieces] int64, numbers of the pieces: those of bin 0, longest first, then those of bin 1 ...
    counts: [bins] int64, pieces of each bin.
    """

    pieces: np.ndarray
    counts: np.ndarray


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> Packed:
    """Pack pieces of `lengths` [pieces], each in [1, capacity], into bins of `capacity`.

    Pieces of equal length keep their order. Memory per piece: 45 bytes where bins hold many, 155 where they hold one.
    """
    lengths = np.asarray(lengths, np.int64)
    assert not lengths.size or (lengths.min() >= 1 and lengths.max() <= capacity), "a piece does not fit into a bin"
    by_length = np.argsort(-lengths, kind="stable")
    groups = np.bincount(lengths, minlength=capacity + 1)
    bins = _Bins(capacity)
    placed = [
        numbers
        for length in np.flatnonzero(groups)[::-1].tolist()
        for numbers in bins.place(length, int(groups[length]))
    ]
    bin_of = np.concatenate(placed) if placed else np.empty(0, np.int64)
    counts = np.bincount(bin_of, minlength=bins.number)
    return Packed(by_length[np.argsort(bin_of, kind="stable")], counts)


class _Bins:
    """Open bins by what is left in them."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.number = 0
        self._with_room: dict[int, list[int]] = {}  # numbers of the bins that have just so much room left
        self._rooms = 0  # bit r is set where a bin has r tokens of room

    def place(self, length: int, pieces: int) -> list[np.ndarray]:
        """Put so many pieces of `length` into bins; arrays of the bins' numbers, one for each piece, in order."""
        placed = []
        while pieces:
            fitting = self._rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else self.capacity
            # A bin takes pieces until none fits any more: with one more in it, it is the fullest that they fit in.
            each = room // length
            full, rest = divmod(pieces, each)
            if fitting:
                available = len(self._with_room[room])
                if full >= available:
                    full, rest = available, 0
                taken = self._take(room, full + bool(rest))
            else:
                taken = list(range(self.number, self.number + full + bool(rest)))
                self.number += len(taken)
            numbers = np.array(taken, np.int64)
            placed.append(np.repeat(numbers[:full], each))
            self._put(room - each * length, taken[:full])
            if rest:
                placed.append(np.repeat(numbers[full:], rest))
                self._put(room - rest * length, taken[full:])
            pieces -= full * each + rest
        return placed

    def _take(self, room: int, count: int) -> list[int]:
        bins = self._with_room[room]
        taken = bins[-count:]
        del bins[-count:]
        if not bins:
            self._rooms ^= 1 << room
        return taken

    def _put(self, room: int, bins: list[int]) -> None:
        if bins and room:
            self._with_room.setdefault(room, []).extend(bins)
            self._rooms |= 1 << room


class PaddingCount:
    """Counts the padding of packed tokens as they pass by: end-of-document tokens that follow another in their bin.

    It is what training leaves out of the loss: a target equal to the end-of-document token whose input is that too.
    """

    def __init__(self, length: int, eod_id: int):
        self.length, self.eod_id = length, eod_id
        self.padding = 0
        self._position = 0  # within a bin
        self._last_was_eod = False

    def add(self, ids: np.ndarray) -> None:
        """The next tokens [n] of the stream of bins."""
        if not ids.size:
            return
        ends = np.empty(ids.size + 1, bool)
        ends[0] = self._last_was_eod
        np.equal(ids, self.eod_id, out=ends[1:])
        follows = ends[1:] & ends[:-1]
        follows[-self._position % self.length :: self.length] = False  # the first of a bin follows none
        self.padding += int(np.count_nonzero(follows))
        self._position = (self._position + ids.size) % self.length
        self._last_was_eod = bool(ends[-1])
