"""Builds that are stopped: what stays, what is done again, and that the outputs are those of one run."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megaslm.data import Assembly, BuildOptions, TextSource, TokenFile, pipeline, preprocess, token_writer, work
from megaslm.data.sources import source as sources
from megaslm.data.unit_encoder import UnitEncoder
from megaslm.errors import UserError

TEXTS = [f"document {i} " + "some words, " * (i * 7 % 23) + "end" for i in range(80)]


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))


def outputs(folder, name="x"):
    """Contents of the finished files of PREFIX folder/name."""
    return {
        path.name[len(name) :]: path.read_bytes() for path in sorted(Path(folder).glob(f"{name}*.*")) if path.is_file()
    }


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """Four files, read in the order of the list, of ten units or so each."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 300)
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        write_lines(folder / f"{i}.jsonl", TEXTS[i * 20 : i * 20 + 20])
    return [file.path for file in TextSource([folder]).files]


@pytest.fixture
def encoded(monkeypatch):
    """The units that were encoded, by the name of their first file."""
    names = []
    right = UnitEncoder.__call__

    def counting(self, unit):
        names.append(unit[0].file.name)
        return right(self, unit)

    monkeypatch.setattr(UnitEncoder, "__call__", counting)
    return names


def build(inputs, bpe, prefix, **options):
    return preprocess(TextSource(inputs), bpe, prefix, workers=0, **options)


def stop_at(unit):
    def progress(done):
        if done.units == unit:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def whole(inputs, bpe, tmp_path):
    """What one run writes, and how many units it has."""
    done = []
    build(inputs, bpe, tmp_path / "whole" / "x", progress=done.append)
    return outputs(tmp_path / "whole"), done[-1].units


@pytest.mark.parametrize("options", [BuildOptions(), BuildOptions(assembly=Assembly(True, "50,50", 3, 32))])
def test_stopped_after_any_unit(inputs, bpe, tmp_path, encoded, options):
    build(inputs, bpe, tmp_path / "whole" / "x", options=options)
    num_units = len(encoded)
    encoded.clear()
    for unit in (0, 1, num_units // 2, num_units // 2, num_units - 1, num_units):
        with pytest.raises(KeyboardInterrupt):
            build(inputs, bpe, tmp_path / "x", options=options, progress=stop_at(unit))
        if unit:  # what a kill between two writes leaves
            for name in (work.TOKENS, work.LENGTHS, work.JOURNAL):
                with open(tmp_path / "x.work" / name, "ab") as file:
                    file.write(b'{"unit": "torn')
    said = []
    build(inputs, bpe, tmp_path / "x", options=options, report=said.append)
    assert len(encoded) == num_units and any(line.startswith("going on from") for line in said)
    assert outputs(tmp_path) == outputs(tmp_path / "whole") and not (tmp_path / "x.work").exists()


def test_a_damaged_stream_is_cut_back(inputs, bpe, tmp_path, whole, encoded):
    files, num_units = whole
    for name, where in ((work.TOKENS, 0.5), (work.LENGTHS, 0.7), (work.JOURNAL, 0.6)):
        with pytest.raises(KeyboardInterrupt):
            build(inputs, bpe, tmp_path / "x", progress=stop_at(num_units - 1))
        path = tmp_path / "x.work" / name
        data = bytearray(path.read_bytes())
        data[int(len(data) * where)] ^= 1
        path.write_bytes(data)
        encoded.clear()
        build(inputs, bpe, tmp_path / "x")
        assert 0.2 * num_units < len(encoded) < 0.7 * num_units
        assert outputs(tmp_path) == files
        for path in tmp_path.glob("x*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(KeyboardInterrupt):
        build(inputs, bpe, tmp_path / "x", progress=stop_at(num_units - 1))
    os.truncate(tmp_path / "x.work" / work.TOKENS, 0)
    said = []
    build(inputs, bpe, tmp_path / "x", report=said.append)
    assert any(line.startswith(f"{num_units - 1} more units in ") for line in said) and outputs(tmp_path) == files


def test_on_after_a_fault_was_mended(inputs, bpe, tmp_path, whole, encoded):
    files, num_units = whole
    faulty = inputs[2]
    mended = faulty.read_text()
    lines = mended.splitlines()
    faulty.write_text("\n".join([*lines[:12], lines[12][:-5], *lines[13:]]) + "\n")
    encoded.clear()
    with pytest.raises(UserError, match=rf"{faulty.name}:13: broken JSON.*--on_error skip leaves such records out"):
        build(inputs, bpe, tmp_path / "x")
    assert encoded[-1] == faulty.name and not (tmp_path / "x.bin").exists()
    encoded.clear()
    with pytest.raises(UserError, match=rf"{faulty.name}:13: broken JSON"):
        build(inputs, bpe, tmp_path / "x")
    assert len(encoded) == 1  # the one with the fault
    faulty.write_text(mended)
    encoded.clear()
    build(inputs, bpe, tmp_path / "x")
    assert set(encoded) == {faulty.name, inputs[3].name} and outputs(tmp_path)[".bin"] == files[".bin"]


def test_on_after_a_fault_by_leaving_it_out(inputs, bpe, tmp_path, whole, encoded):
    faulty = inputs[1]
    lines = faulty.read_text().splitlines()
    faulty.write_text("\n".join([*lines[:5], "[]", *lines[6:15], '{"text": ""}', *lines[16:]]) + "\n")
    with pytest.raises(UserError, match=rf"{faulty.name}:6: "):
        build(inputs, bpe, tmp_path / "x")
    with pytest.raises(KeyboardInterrupt):
        build(inputs, bpe, tmp_path / "x", on_error="skip", progress=stop_at(whole[1] - 2))
    encoded.clear()
    smaller = TextSource(inputs, max_document_bytes=1 << 20)
    for source, on_error, what in (
        (TextSource(inputs), "stop", "records left out by --on_error skip, and "),
        (smaller, "skip", ""),
    ):
        with pytest.raises(UserError, match=f"holds work with {what}documents of up to 67,108,864 .* as before"):
            preprocess(source, bpe, tmp_path / "x", workers=0, on_error=on_error)
    build(inputs, bpe, tmp_path / "x", on_error="skip")
    assert len(encoded) == 1 and TokenFile(tmp_path / "x").num_documents == 78
    listed = [json.loads(line)["where"] for line in (tmp_path / "x.skipped.jsonl").read_text().splitlines()]
    assert listed == [f"{faulty}:6", f"{faulty}:16"]


def test_a_journal_that_a_full_disk_cut_short(inputs, bpe, tmp_path, whole):
    for start in (b"", b'{"format": "mega'):
        (tmp_path / "x.work").mkdir()
        (tmp_path / "x.work" / work.JOURNAL).write_bytes(start)
        build(inputs, bpe, tmp_path / "x", overwrite=True)
        assert outputs(tmp_path) == whole[0]


def test_other_options_do_not_touch_what_is_done(inputs, bpe, tmp_path, whole, encoded):
    with pytest.raises(KeyboardInterrupt):
        build(inputs, bpe, tmp_path / "x", progress=stop_at(5))
    for options, name in (
        (BuildOptions(append_eod=False), "append_eod"),
        (BuildOptions(min_chars=5, max_tokens=90), "min_chars, max_tokens"),
        (BuildOptions(assembly=Assembly(dedup=True)), "dedup, split, shuffle or pack"),
    ):
        with pytest.raises(UserError, match=rf"x.work holds 5 units .* another value of: {name}\. .*--overwrite"):
            build(inputs, bpe, tmp_path / "x", options=options)
    encoded.clear()
    with pytest.raises(KeyboardInterrupt):  # the same ids
        build(inputs, bpe, tmp_path / "x", options=BuildOptions(encoder="huggingface"), progress=stop_at(8))
    assert len(encoded) == 3
    said = []
    options = BuildOptions(append_eod=False)
    with pytest.raises(KeyboardInterrupt):
        build(inputs, bpe, tmp_path / "x", options=options, overwrite=True, progress=stop_at(4), report=said.append)
    assert any(line.endswith("was of a build with another append_eod, and is started over") for line in said)
    encoded.clear()
    build(inputs, bpe, tmp_path / "x", options=options)
    assert len(encoded) == whole[1] - 4


def test_an_option_that_the_work_did_not_depend_on(tmp_path):
    def opened(**build):
        return contextlib.closing(work.Work(tmp_path / "x.work", build, ()))

    with opened(a=1) as first:
        assert not first.found.units and list(first.resume(iter([]), str, bool)) == []
        first.commit("unit", [(work.TOKENS, b"12")], work.BuildProgress(units=1), {})
    for build in ({"a": 1, "b": 2}, {"a": 1}, {"b": 2}):
        with opened(**build) as found:
            assert found.found.units == 1 and list(found.resume(iter(["unit"]), str, lambda _: True)) == []
    for build in ({"a": 2}, {"a": 1, "b": 3}):
        with pytest.raises(UserError, match="another value of: [ab]\\. "), opened(**build):
            pass


def test_a_key_of_records_where_there_are_none(bpe, tmp_path, monkeypatch, encoded):
    monkeypatch.setattr(sources, "UNIT_BYTES", 300)
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(TEXTS[11] * 2)
    paths = list(tmp_path.glob("*.txt"))
    with pytest.raises(KeyboardInterrupt):
        preprocess(TextSource(paths, "text"), bpe, tmp_path / "x", workers=0, progress=stop_at(4))
    first = preprocess(TextSource(paths, "body"), bpe, tmp_path / "x", workers=0)
    assert len(encoded) == 6 and preprocess(TextSource(paths, template="{q}"), bpe, tmp_path / "x", workers=0) == first
    with pytest.raises(UserError, match="stdin_format text is given, but standard input is not among the inputs"):
        TextSource(paths, stdin_format="text")


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(errno.EIO, os.strerror(errno.EIO))], ids=repr)
def test_stopped_while_what_is_done_is_checked(inputs, bpe, tmp_path, whole, encoded, monkeypatch, fault):
    with pytest.raises(KeyboardInterrupt):
        build(inputs, bpe, tmp_path / "x", progress=stop_at(whole[1] - 1))

    def refuse(*_):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(work.hashlib, "sha256", lambda: SimpleNamespace(copy=refuse))
        with pytest.raises((KeyboardInterrupt, UserError)):
            build(inputs, bpe, tmp_path / "x")
    encoded.clear()
    build(inputs, bpe, tmp_path / "x")
    assert len(encoded) == 1 and outputs(tmp_path) == whole[0]


def test_nobody_listens_any_more(inputs, bpe, tmp_path, whole, monkeypatch):
    """A closed standard output is no fault of the disk."""
    monkeypatch.setattr(pipeline, "REPORT_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        build(inputs, bpe, tmp_path / "x", progress=stop_at(3))
    for at in ("checking ", "checked ", "going on "):

        def report(line, at=at):
            if line.startswith(at):
                raise BrokenPipeError

        with pytest.raises(BrokenPipeError):
            build(inputs, bpe, tmp_path / "x", report=report)
    said = []
    build(inputs, bpe, tmp_path / "x", report=said.append)
    assert any(line.startswith("going on from") and ": 3 units are done" in line for line in said)

    def fail(line):
        if line.startswith("putting the outputs together"):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        build(inputs, bpe, tmp_path / "y", options=BuildOptions(assembly=Assembly(shuffle_seed=1)), report=fail)


def test_inputs_that_come_and_go(inputs, bpe, tmp_path, whole, encoded):
    for first, then in ((inputs[:3], inputs), (inputs, [*inputs[:2], inputs[3]])):
        with pytest.raises(KeyboardInterrupt):
            build(first, bpe, tmp_path / "x", progress=stop_at(25))
        encoded.clear()
        said = []
        build(then, bpe, tmp_path / "x", report=said.append)
        num_encoded = len(encoded)
        build(then, bpe, tmp_path / "again" / "x")
        assert outputs(tmp_path) == outputs(tmp_path / "again") and 5 < num_encoded < len(encoded) - num_encoded - 5
        if then != inputs:
            assert any("more units in " in line and "the input is read again from there" in line for line in said)
        for path in [*tmp_path.glob("x*"), tmp_path / "again"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_nothing_is_left_where_nothing_was_done(inputs, bpe, tmp_path, encoded):
    inputs[0].write_text("[]\n")
    with pytest.raises(UserError, match=":1: "):
        build(inputs, bpe, tmp_path / "x")
    with pytest.raises(KeyboardInterrupt):
        build(inputs[1:], bpe, tmp_path / "x", progress=stop_at(0))
    (tmp_path / "x.tokenizer").mkdir()
    (tmp_path / "x.tokenizer" / "tokenizer.json").write_text("{}")
    encoded.clear()
    with pytest.raises(UserError, match="x.tokenizer exists and is not the tokenizer"):
        build(inputs[1:], bpe, tmp_path / "x")
    assert encoded == [] and not list(tmp_path.glob("x.work")) and not list(tmp_path.glob("x.[bij]*"))


def test_a_full_disk(inputs, bpe, tmp_path, whole, monkeypatch, encoded):
    written, right = 0, work.write_all

    def refuse_after_some(file, data):
        nonlocal written
        written += 1
        if written == 40:
            right(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "x.work" / "tokens.bin"))
        return right(file, data)

    monkeypatch.setattr(work, "write_all", refuse_after_some)
    with pytest.raises(
        UserError, match="tokens.bin: No space left on device; free some space.*goes on from what is done"
    ):
        build(inputs, bpe, tmp_path / "x")
    done = len(encoded)
    build(inputs, bpe, tmp_path / "x")
    assert len(encoded) == done + whole[1] - 9 and outputs(tmp_path) == whole[0]


@pytest.mark.parametrize("renamed", [0, 1, 2, 3])
def test_killed_while_the_files_are_put_in_place(inputs, bpe, tmp_path, whole, monkeypatch, encoded, renamed):
    right, done = os.replace, 0

    def killed(source, target):
        nonlocal done
        if done == renamed:
            raise KeyboardInterrupt
        done += 1
        right(source, target)

    monkeypatch.setattr(token_writer.os, "replace", killed)
    monkeypatch.setattr(pipeline.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt) if renamed < 3 else contextlib.nullcontext():
        build(inputs, bpe, tmp_path / "x")
    monkeypatch.undo()
    monkeypatch.setattr(sources, "UNIT_BYTES", 300)
    encoded.clear()
    build(inputs, bpe, tmp_path / "x")
    assert encoded == [] and outputs(tmp_path) == whole[0] and not (tmp_path / "x.work").exists()


def test_a_finished_output_is_not_what_the_next_build_writes_to(inputs, bpe, tmp_path, whole, monkeypatch):
    """The work folder of a finished build has its .bin under a second name, if it could not be removed in time."""
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.shutil, "rmtree", lambda *_, **__: None)
        build(inputs, bpe, tmp_path / "x")
    write_lines(inputs[3], TEXTS[:3])
    with pytest.raises(KeyboardInterrupt):
        build(inputs, bpe, tmp_path / "x", overwrite=True, progress=stop_at(3))
    assert outputs(tmp_path) == whole[0]


def test_memory_that_runs_out(inputs, bpe, tmp_path, whole, encoded, monkeypatch):
    right = UnitEncoder.__call__

    def exhausted(self, unit):
        if len(encoded) == 5:
            raise MemoryError
        return right(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(UnitEncoder, "__call__", exhausted)
        with pytest.raises(UserError, match="memory ran out: the same command with fewer --workers, .*goes on"):
            build(inputs, bpe, tmp_path / "x")
    build(inputs, bpe, tmp_path / "x")
    assert len(encoded) == whole[1] and outputs(tmp_path) == whole[0]


def test_keys_tell_texts_apart(inputs, bpe, tmp_path, monkeypatch):
    """What the assembly reads: a key and the bytes of every document."""

    class Read(Exception):
        pass

    def read(stream, *_, **__):
        raise Read(stream)

    monkeypatch.setattr(pipeline, "assemble", read)
    with pytest.raises(Read) as raised:
        build(inputs, bpe, tmp_path / "x", options=BuildOptions(assembly=Assembly(dedup=True)))
    stream = raised.value.args[0]
    keys, text_bytes, lengths = (stream.read(name, 0, 80) for name in (work.KEYS, work.TEXT_BYTES, work.LENGTHS))
    assert keys.shape == (80, 2) and len(np.unique(keys, axis=0)) == 80
    assert text_bytes.sum() == sum(len(text.encode()) for text in TEXTS)
    assert lengths.sum() == stream.num_tokens == stream.tokens_path.stat().st_size // 2
