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

from megaslm.checkpoint import Piece, format, open_checkpoint, write_checkpoint
from megaslm.checkpoint.format import Checkpoint, read_manifest
from megaslm.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from megaslm.checkpoint.slices import Part, cut, find_fault
from megaslm.parallel import Block

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
        pieces = {}
        for i, part in enumerate(parts[rank::ranks]):
            key = f"w#{i}" if i else "w"
            pieces[key] = Piece.of(key, "w", shape, part, torch.from_numpy(select(whole, part).copy()))
        write_safetensors(folder / str(rank), {key: piece.stored for key, piece in pieces.items()})
        entries += [piece.entry(key, str(rank)) for key, piece in pieces.items()]
    manifest = {"step": 1, "run_config": {}, "global_state": {}, "optimizer": None}
    return Checkpoint(folder, manifest | {"tensors": {"weights": {"w": {"shape": list(shape), "pieces": entries}}}})


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
    upper, lower = Block((0, 0), (3, 4)), Block((2, 0), (2, 4))
    assert "overlap" in find_fault([Part(upper, 0, 12), Part(lower, 0, 8)], (5, 4))
    assert "reaches out" in find_fault([Part(upper, 0, 12), Part(lower, 0, 8)], (3, 4))


@given(shape=SHAPES.filter(bool), data=st.data())
def test_a_part_is_flattened_where_it_is_a_range_of_the_whole(shape, data):
    whole, part = values(shape), data.draw(parts_of(shape).filter(lambda part: part.numel > 0))
    found = part.flattened(shape)
    assert select(whole, found).tolist() == select(whole, part).tolist()
    rows = Part(Block((part.block.offset[0], *[0] * (len(shape) - 1)), (part.block.shape[0], *shape[1:])), 0, 1)
    assert rows.flattened(shape).block == Part.whole(shape).block


@given(shape=SHAPES.filter(bool), data=st.data())
def test_blocks_one_below_the_other_are_cut_as_their_flattened_whole(shape, data):
    """As a rank holds queries, keys and values of its own: rows of each in one parameter."""
    low, high = sorted(data.draw(st.tuples(*[st.integers(0, shape[0])] * 2)))
    blocks = [Block((a, *[0] * (len(shape) - 1)), (b - a, *shape[1:])) for a, b in ((high, shape[0]), (0, low))]
    whole = values(shape)
    held = torch.cat([whole[block.slices] for block in blocks]).reshape(-1)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, held.numel())] * 2)))
    found = [(place, select(whole, part).tolist()) for place, part in cut(blocks, start, stop)]
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
    in_one, in_two = (tmp_path / name for name in ("one", "two"))
    in_one.mkdir()
    in_two.mkdir()
    in_one, in_two = save(in_one, whole, [Part.whole(shape)]), save(in_two, whole, halves, ranks=2)
    rows = Part(Block((10, 0), (5, 12)), 3, 50)
    for checkpoint, part, expected in (
        (in_one, Part.whole(shape), {"mapped": 480, "most mapped": 480}),
        (in_one, rows, {"mapped": 47, "most mapped": 47}),  # rows are a range of the whole
        (in_two, halves[1], {"mapped": 240, "most mapped": 240}),  # as it was saved
        (in_two, Part(halves[1].block, 20, 33), {"mapped": 13, "most mapped": 13}),
        (in_two, quarters[1], {"mapped": 240, "most mapped": 240}),  # whole rows of the half that it is in
    ):
        touched.clear()
        assert checkpoint.read_part("weights", "w", part).tolist() == select(whole, part).tolist()
        assert touched == expected
    monkeypatch.setattr(format, "COPIED", 60)
    touched.clear()
    assert torch.equal(in_two.read("w"), whole)
    assert touched == {"mapped": 480, "most mapped": 60}  # a few rows at a time


def test_what_readers_of_version_2_understand_has_that_version(tmp_path):
    def written(name: str, pieces: dict[str, Piece]) -> Path:
        options = {"step": 0, "run_config": {}, "global_state": {}, "optimizer": None}
        return write_checkpoint(tmp_path, {"weights": pieces}, name=name, **options)

    whole = values((4, 6))
    plain = written("plain", {"w": Piece.whole(whole)})
    halves = [Piece.of(key, "w", (4, 6), part, torch.from_numpy(select(whole, part).copy()))
              for key, part in zip(("w", "w#1"), columns((4, 6), 2), strict=True)]  # fmt: skip
    sliced = written("sliced", {"w": halves[0], "w#1": halves[1]})
    assert [read_manifest(path)["version"] for path in (plain, sliced)] == [2, 3]
    assert torch.equal(open_checkpoint(sliced).read("w"), whole)
    # A block that one rank has as a whole keeps its shape in the file.
    assert SafetensorsFile(sliced / "weights_00000.safetensors").shapes == {"w": (4, 3), "w#1": (4, 3)}
