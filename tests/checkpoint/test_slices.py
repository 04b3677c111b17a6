"""A tensor saved in any parts is read in any others: blocks of tensor parallelism, cut flat among the ranks of ZeRO."""

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaslm.checkpoint import Part, Piece, format, open_checkpoint, slices, write_checkpoint
from megaslm.checkpoint.format import Checkpoint, by_key, read_manifest
from megaslm.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from megaslm.checkpoint.slices import overlaps, parts_between
from megaslm.parallel import Block

few = settings(deadline=None, max_examples=50)
SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


def values(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(float(math.prod(shape))).reshape(shape)


def select(whole: torch.Tensor, part: Part) -> np.ndarray:
    """What numpy takes for the part's elements."""
    return whole.numpy()[part.block.slices].reshape(-1)[part.start : part.stop]


def draw_cuts(draw, size: int) -> list[tuple[int, int]]:
    """[0, size) in ranges."""
    cuts = sorted(draw(st.sets(st.integers(1, size - 1), max_size=3))) if size > 1 else []
    return list(itertools.pairwise([0, *cuts, size]))


@st.composite
def partitions(draw) -> tuple[tuple[int, ...], list[Part]]:
    """A shape, and parts that make it up: a grid of blocks, each cut flat at other places."""
    shape = draw(SHAPES)
    parts = []
    for ranges in itertools.product(*(draw_cuts(draw, size) for size in shape)):
        block = Block(tuple(low for low, _ in ranges), tuple(high - low for low, high in ranges))
        parts += [Part(block, *one) for one in draw_cuts(draw, math.prod(block.shape))]
    return shape, draw(st.permutations(parts))


@st.composite
def parts_of(draw, shape: tuple[int, ...]) -> Part:
    ranges = [draw(st.tuples(*[st.integers(0, size - 1)] * 2).map(sorted)) for size in shape]
    block = Block(tuple(low for low, _ in ranges), tuple(high + 1 - low for low, high in ranges))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, math.prod(block.shape))] * 2)))
    return Part(block, start, stop)


def save(folder: Path, whole: torch.Tensor, parts: list[Part], ranks: int = 1) -> Checkpoint:
    """As the ranks of a run would, each its share of the parts."""
    shape, entries = tuple(whole.shape), []
    for rank in range(ranks):
        mine = [Piece("w", shape, part, torch.from_numpy(select(whole, part).copy())) for part in parts[rank::ranks]]
        pieces = by_key(mine)
        write_safetensors(folder / str(rank), {key: piece.stored for key, piece in pieces.items()})
        entries += [piece.entry(key, str(rank)) for key, piece in pieces.items()]
    manifest = {"step": 1, "run_config": {}, "global_state": {}, "optimizer": None}
    return Checkpoint(folder, manifest | {"tensors": {"weights": {"w": {"shape": list(shape), "pieces": entries}}}})


def find_fault(parts: list[Part], shape: tuple[int, ...]) -> str | None:
    ranges = {}
    for part in parts:
        ranges.setdefault(part.block, []).append((part.start, part.stop))
    return slices.find_fault(ranges, shape)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), saved=partitions(), ranks=st.integers(1, 3), normal=st.booleans())
def test_any_part_is_read_from_any_parts(tmp_path, data, saved, ranks, normal):
    shape, parts = saved
    whole = values(shape)
    assert find_fault(parts, shape) is None
    if normal:  # as EngineState writes them
        parts = [part.flattened(shape) for part in parts]
        assert find_fault(parts, shape) is None
    checkpoint = save(tmp_path, whole, parts, ranks)
    assert torch.equal(checkpoint.read("w"), whole)
    for _ in range(4):
        part = data.draw(parts_of(shape))
        assert checkpoint.read_part("weights", "w", part).tolist() == select(whole, part).tolist()


@few
@given(saved=partitions(), data=st.data())
def test_what_is_missing_or_twice_there_is_a_fault(saved, data):
    shape, parts = saved
    one = data.draw(st.sampled_from(parts))
    others = [part for part in parts if part is not one]
    assert find_fault(others, shape) is not None
    assert find_fault([*parts, one], shape) is not None
    if one.numel > 1:
        assert find_fault([*others, Part(one.block, one.start, one.stop - 1)], shape) is not None


def test_blocks_that_overlap_or_reach_out_are_a_fault():
    upper, lower, above = Block((0, 0), (3, 4)), Block((2, 0), (2, 4)), Block((-1, 0), (2, 4))
    assert "overlap" in find_fault([Part(upper, 0, 12), Part(lower, 0, 8)], (5, 4))
    for block in (lower, above, Block((1, 1), (-2, -4))):
        assert "reaches out" in find_fault([Part(upper, 0, 12), Part(block, 0, 8)], (3, 4))
    assert "gaps" in find_fault([Part(upper, 0, 20), Part(upper, 20, 12), Part(lower, 0, 8)], (5, 4))


@few
@given(shape=SHAPES.filter(bool), data=st.data())
def test_a_part_is_flattened_where_it_is_a_range_of_the_whole(shape, data):
    whole, part = values(shape), data.draw(parts_of(shape).filter(lambda part: part.numel > 0))
    found = part.flattened(shape)
    assert select(whole, found).tolist() == select(whole, part).tolist()
    rows = Part(Block((part.block.offset[0], *[0] * (len(shape) - 1)), (part.block.shape[0], *shape[1:])), 0, 1)
    assert rows.flattened(shape).block == Block.whole(shape)


@few
@given(shape=SHAPES.filter(bool), data=st.data())
def test_blocks_one_below_the_other_are_cut_as_their_flattened_whole(shape, data):
    """As a rank holds queries, keys and values of its own: rows of each in one parameter."""
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, shape[0])] * 2)))
    blocks = [Block((a, *[0] * (len(shape) - 1)), (b - a, *shape[1:])) for a, b in ((high, shape[0]), (0, low))]
    whole = values(shape)
    held = torch.cat([whole[block.slices] for block in blocks]).reshape(-1)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, held.numel())] * 2)))
    found = [(place, select(whole, part).tolist()) for place, part in parts_between(start, stop, blocks)]
    assert [place for place, _ in found] == list(itertools.accumulate((len(v) for _, v in found), initial=0))[:-1]
    assert [value for _, some in found for value in some] == held[start:stop].tolist()


@pytest.fixture
def touched(monkeypatch) -> Counter:
    """Elements that are looked at, by the way in which."""
    count = Counter()
    map_, read_into = SafetensorsFile.map, SafetensorsFile.read_into

    def counted_map(self, name, start, stop, dtype):
        count["mapped"] += stop - start
        count["most mapped"] = max(count["most mapped"], stop - start)
        return map_(self, name, start, stop, dtype)

    def counted_read(self, out, name, start):
        count["read"] += out.numel()
        read_into(self, out, name, start)

    monkeypatch.setattr(SafetensorsFile, "map", counted_map)
    monkeypatch.setattr(SafetensorsFile, "read_into", counted_read)
    return count


def columns(shape: tuple[int, int], count: int) -> list[Part]:
    width = shape[1] // count
    return [Part(Block((0, i * width), (shape[0], width)), 0, shape[0] * width) for i in range(count)]


def test_a_part_is_read_without_the_rest(tmp_path, touched, monkeypatch):
    shape = (40, 12)
    whole, halves, quarters = values(shape), columns(shape, 2), columns(shape, 4)

    def saved(name: str, parts: list[Part], ranks: int = 1) -> Checkpoint:
        (tmp_path / name).mkdir()
        return save(tmp_path / name, whole, parts, ranks)

    in_one, in_two = saved("one", [Part.whole(shape)]), saved("two", halves, ranks=2)
    flat = saved("flat", [Part(Block.whole(shape), *one) for one in ((0, 100), (100, 480))])
    rows = Part(Block((10, 0), (5, 12)), 3, 50)
    for checkpoint, part, expected in (
        (in_one, Part.whole(shape), {"mapped": 480, "most mapped": 480}),
        (in_one, rows, {"mapped": 47, "most mapped": 47}),  # rows are a range of the whole
        (in_two, halves[1], {"mapped": 240, "most mapped": 240}),  # as it was saved
        (in_two, Part(halves[1].block, 20, 33), {"mapped": 13, "most mapped": 13}),
        (in_two, quarters[1], {"mapped": 240, "most mapped": 240}),  # whole rows of the half that it is in
        (flat, Part.whole(shape), {"read": 480}),  # into its place, without a copy
    ):
        touched.clear()
        assert checkpoint.read_part("weights", "w", part).tolist() == select(whole, part).tolist()
        assert touched == expected
    for limit, most in ((60, 60), (5, 6)):  # a few rows at a time, and one where even that is more
        monkeypatch.setattr(format, "COPY_LIMIT", limit)
        touched.clear()
        assert torch.equal(in_two.read("w"), whole)
        assert touched == {"mapped": 480, "most mapped": most}


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((2, 600), Block((0, 300), (2, 300))),  # as they were saved: by their ranges
        ((64, 60), Block((0, 0), (64, 60))),  # by their rows
        ((64, 60), Block((0, 0), (64, 15))),  # by their columns too
    ],
)
def test_of_many_pieces_few_are_looked_at(monkeypatch, shape, block):
    """Those that have nothing of what is wanted are passed over before any rectangle is thought of."""
    held = [Part(half.block, at, at + 10) for half in columns(shape, 2) for at in range(0, half.numel, 10)]
    looked_at, rectangles = [], slices._rectangles
    monkeypatch.setattr(slices, "_rectangles", lambda *arguments: looked_at.append(1) or rectangles(*arguments))
    wanted = Part(block, 45, 75)
    found = [pair for part in held for pair in overlaps(part, wanted)]
    assert sum(source.numel for source, _ in found) == 30
    assert len(looked_at) < len(held) // 4


def test_parts_of_a_tensor_that_are_missing_are_no_values(tmp_path):
    """Where no manifest was looked at before: not what the memory held."""
    checkpoint = save(tmp_path, values((4, 6)), columns((4, 6), 2)[:1])
    with pytest.raises(AssertionError, match="pieces of weights of w are missing"):
        checkpoint.read("w")


def test_what_readers_of_version_2_understand_has_that_version(tmp_path):
    def written(name: str, *pieces: Piece) -> Path:
        options = {"step": 0, "run_config": {}, "global_state": {}, "optimizer": None}
        return write_checkpoint(tmp_path, {"weights": pieces}, name=name, **options)

    whole = values((4, 6))
    plain = written("plain", Piece.whole("w", whole))
    halves = [(part, torch.from_numpy(select(whole, part).copy())) for part in columns((4, 6), 2)]
    sliced = written("sliced", *(Piece("w", (4, 6), part, data) for part, data in halves))
    assert [read_manifest(path)["version"] for path in (plain, sliced)] == [2, 3]
    assert torch.equal(open_checkpoint(sliced).read("w"), whole)
    # A block that one rank has as a whole keeps its shape in the file.
    assert SafetensorsFile(sliced / "weights_00000.safetensors").shapes == {"w": (4, 3), "w#1": (4, 3)}
