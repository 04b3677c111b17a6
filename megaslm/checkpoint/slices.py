"""Parts of a tensor as ranks hold them, and what two of them have in common. Arithmetic of shapes alone.

A rank of tensor parallelism holds a block of a tensor, a rectangle; a rank of ZeRO holds a range of that, flattened: a
`Part`. A checkpoint is written in the parts of one layout and read in those of another. What two parts have in common
is at most a few rectangles, and each of them lies in both parts with a constant stride from row to row (`Window`).
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from megaslm.parallel import Block


@dataclass(frozen=True)
class Part:
    """Elements [start, stop) of the flattened `block` of a tensor."""

    block: Block
    start: int
    stop: int

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Part":
        return cls(Block.whole(shape), 0, math.prod(shape))

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @cached_property
    def rows(self) -> Block:
        """The rows of the block in which these elements lie."""
        if not self.block.shape or self.start >= self.stop:
            return self.block
        row = math.prod(self.block.shape[1:])
        first, last = self.start // row, -(-self.stop // row)
        return Block((self.block.offset[0] + first, *self.block.offset[1:]), (last - first, *self.block.shape[1:]))

    def flattened(self, shape: tuple[int, ...]) -> "Part":
        """The same elements, as a range of the whole tensor of `shape` where the block is one; else as they are."""
        block, whole = _folded(self.block, Block.whole(shape))
        if len(whole.shape) > 1:
            return self
        return Part(Block.whole(shape), block.offset[0] + self.start, block.offset[0] + self.stop)


@dataclass(frozen=True)
class Window:
    """A rectangle in a line of elements: those at `columns` of each of the rows that begin at `start`.

    shape: (number of rows, *shape of a row). columns: a slice for each dimension of a row.
    """

    start: int
    shape: tuple[int, ...]
    columns: tuple[slice, ...]

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    @property
    def numel(self) -> int:
        """Elements of the rectangle."""
        return self.shape[0] * math.prod(one.stop - one.start for one in self.columns)

    @property
    def is_contiguous(self) -> bool:
        return all(one == slice(0, size) for one, size in zip(self.columns, self.shape[1:], strict=True))

    def rows(self, first: int, last: int) -> "Window":
        """Its rows [first, last)."""
        row = math.prod(self.shape[1:])
        return Window(self.start + first * row, (last - first, *self.shape[1:]), self.columns)

    def of(self, spanned: Tensor) -> Tensor:
        """The rectangle, a view, in the elements [start, stop), (stop - start,)."""
        return spanned.view(self.shape)[(slice(None), *self.columns)]


def overlaps(held: Part, wanted: Part) -> Iterator[tuple[Window, Window]]:
    """What two parts of one tensor have in common, as rectangles; each as a window in `held` and one in `wanted`."""
    # Of a tensor in many pieces nearly all have nothing of what is wanted, which is to be seen at once.
    if held.block == wanted.block:
        if held.stop <= wanted.start or wanted.stop <= held.start:
            return
    elif _intersection(held.rows, wanted.rows) is None:
        return
    held_block, wanted_block = _folded(held.block, wanted.block)
    for place, rectangle in _rectangles(held_block, held.start, held.stop):
        for other_place, other in _rectangles(wanted_block, wanted.start, wanted.stop):
            common = _intersection(rectangle, other)
            if common is not None:
                yield (
                    _window(place - held.start, rectangle, common),
                    _window(other_place - wanted.start, other, common),
                )


def parts_between(start: int, stop: int, blocks: Iterable[Block]) -> Iterator[tuple[int, Part]]:
    """The parts in elements [start, stop) of blocks that lie flattened one after the other.

    Yields:
        (place, part): the part's first element is the one at start + place.
    """
    begin = 0
    for block in blocks:
        end = begin + math.prod(block.shape)
        first, last = max(start, begin), min(stop, end)
        if first < last:
            yield first - start, Part(block, first - begin, last - begin)
        begin = end


def find_fault(ranges: Mapping[Block, list[tuple[int, int]]], shape: tuple[int, ...]) -> str | None:
    """Why parts are not the whole tensor of `shape`, every element once; None if they are.

    Args:
        ranges: by block of the tensor, the (start, stop) of its parts, in any order.

    Raises:
        ValueError: a block has not as many dimensions as the tensor.
    """
    total = 0
    for block, found in ranges.items():
        end = 0
        for start, stop in sorted(found):
            if start != end or stop < start:
                return f"its block {block} has gaps or overlaps"
            end = stop
        if end != math.prod(block.shape):
            return f"its block {block} has gaps or overlaps"
        if any(not 0 <= low <= low + n <= size for low, n, size in zip(block.offset, block.shape, shape, strict=True)):
            return f"its block {block} reaches out of {shape}"
        total += end
    if total != math.prod(shape):
        return f"it has {total} of {math.prod(shape)} elements"
    for block, other in itertools.combinations(ranges, 2):
        if _intersection(block, other) is not None:
            return f"its blocks {block} and {other} overlap"
    return None


def _folded(a: Block, b: Block) -> tuple[Block, Block]:
    """Both with the last dimensions, as far as they are the same in both, folded into the one before.

    Where flattened blocks of many dimensions run side by side, they then have one.
    """
    kept = len(a.shape)
    while kept > 1 and a.offset[kept - 1] == b.offset[kept - 1] and a.shape[kept - 1] == b.shape[kept - 1]:
        kept -= 1
    if kept == 0:  # a scalar
        return Block((0,), (1,)), Block((0,), (1,))
    row = math.prod(a.shape[kept:])
    first, second = (
        Block((*x.offset[: kept - 1], x.offset[kept - 1] * row), (*x.shape[: kept - 1], x.shape[kept - 1] * row))
        for x in (a, b)
    )
    return first, second


def _rectangles(block: Block, start: int, stop: int) -> Iterator[tuple[int, Block]]:
    """Rectangles of which elements [start, stop) of a flattened block consist, in order; each lies in it in one run.

    Whole rows, and what comes before and after them: of a matrix at most three.

    Yields:
        (place, rectangle): place of the first element in the flattened block.
    """
    if start >= stop:
        return
    row = math.prod(block.shape[1:])
    first, last = -(-start // row), stop // row  # whole rows

    def in_row(index: int, start: int, stop: int) -> Iterator[tuple[int, Block]]:
        begin = index * row
        for place, inner in _rectangles(Block(block.offset[1:], block.shape[1:]), start - begin, stop - begin):
            yield begin + place, Block((block.offset[0] + index, *inner.offset), (1, *inner.shape))

    if first > last:
        yield from in_row(last, start, stop)
        return
    if start < first * row:
        yield from in_row(first - 1, start, first * row)
    if first < last:
        yield first * row, Block((block.offset[0] + first, *block.offset[1:]), (last - first, *block.shape[1:]))
    if last * row < stop:
        yield from in_row(last, last * row, stop)


def _intersection(a: Block, b: Block) -> Block | None:
    """None where they have nothing in common."""
    low = tuple(map(max, a.offset, b.offset))
    high = (min(x + n, y + m) for x, n, y, m in zip(a.offset, a.shape, b.offset, b.shape, strict=True))
    shape = tuple(top - bottom for top, bottom in zip(high, low, strict=True))
    return Block(low, shape) if all(size > 0 for size in shape) else None


def _window(place: int, rectangle: Block, common: Block) -> Window:
    """Where `common` lies in a rectangle whose elements are a run that begins at `place`.

    Leading dimensions in which `common` has one row are left out: alike for every rectangle that it is a part of.
    """
    inner = [low - begin for low, begin in zip(common.offset, rectangle.offset, strict=True)]
    leading = next((i for i, size in enumerate(common.shape[:-1]) if size > 1), len(common.shape) - 1)
    place += sum(inner[i] * math.prod(rectangle.shape[i + 1 :]) for i in range(leading + 1))
    columns = tuple(slice(inner[i], inner[i] + common.shape[i]) for i in range(leading + 1, len(inner)))
    return Window(place, (common.shape[leading], *rectangle.shape[leading + 1 :]), columns)
