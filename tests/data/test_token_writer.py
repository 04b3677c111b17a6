import contextlib
import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaslm.data import TokenFile, TokenFileWriter, output_lock, token_writer, verify
from megaslm.data.token_file import HEADER, file_paths
from megaslm.data.token_writer import _write_index, commit, prepared_token_file
from megaslm.errors import UserError

GOLDEN = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]


def write(prefix, documents, overwrite=False, **facts):
    with TokenFileWriter(prefix, 100, overwrite=overwrite) as writer:
        writer.extend(documents)
        return writer.finish(**facts)


def test_many_documents_at_once_are_those_one_by_one(write_tokens, tmp_path):
    one_by_one = TokenFile(write_tokens(GOLDEN)).manifest
    with TokenFileWriter(tmp_path / "flat", 60_000, "f00d") as writer:
        writer.extend_flat(np.arange(1, 5, dtype=np.uint32), np.array([3, 1]))
        writer.extend_flat(np.arange(5, 12, dtype=np.uint32), np.array([5, 2]))
        assert writer.finish() == one_by_one


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_documents_of_several_sequences(tmp_path_factory, data):
    documents = data.draw(st.lists(st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=4), max_size=10))
    prefix = str(tmp_path_factory.mktemp("sequences") / "x")
    with TokenFileWriter(prefix, 100, boundaries=True) as writer:
        for sequences in documents:
            writer.add_documents(np.array([len(sequences)]))
            writer.add_sequences(np.array([len(sequence) for sequence in sequences], np.int64))
            writer.add_tokens(np.array(sum(sequences, []), np.int64))
        writer.finish()
    file = verify(prefix)
    assert [file.document(i).tolist() for i in range(file.num_documents)] == [sum(one, []) for one in documents]
    assert [file.sequence(i).tolist() for i in range(file.num_sequences)] == sum(documents, [])


@pytest.mark.parametrize("ids", [[1, 100], [-1]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, ids):
    with pytest.raises(UserError, match=rf"token id {ids[-1]} .*vocabulary of 100"):
        with TokenFileWriter(tmp_path / "x", 100) as writer:
            writer.append(ids)


def test_an_older_file_survives_a_failed_build(write_tokens, tmp_path):
    prefix = write_tokens(GOLDEN)
    with pytest.raises(RuntimeError), TokenFileWriter(prefix, 100, overwrite=True) as writer:
        writer.append([1, 2])
        raise RuntimeError("the machine is on fire")
    with TokenFileWriter(prefix, 100, overwrite=True) as writer:
        writer.append([1, 2])  # left without finish
    assert verify(prefix).num_tokens == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx", "corpus.json"]


def test_the_users_own_json_is_not_overwritten(tmp_path):
    (tmp_path / "corpus.json").write_text('{"text": "precious"}\n')
    with pytest.raises(UserError, match="corpus.json exists"):
        TokenFileWriter(tmp_path / "corpus", 100, overwrite=True)
    assert "precious" in (tmp_path / "corpus.json").read_text()


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/corpus: .*; a part of its path is a file"):
        TokenFileWriter(tmp_path / "file" / "corpus", 100)
    with pytest.raises(UserError, match="File name too long; choose a shorter name"):
        TokenFileWriter(tmp_path / ("x" * 252), 100)
    with pytest.raises(UserError, match="File name too long; choose a shorter name"):
        TokenFileWriter(tmp_path / ("x" * 244), 100)  # only our own names beside it are too long

    def forbidden(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(token_writer.os, "open", forbidden)
    with pytest.raises(UserError, match="corpus.lock: Permission denied; choose a folder that you may write to"):
        TokenFileWriter(tmp_path / "corpus", 100)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("prefix", ["", ".", "..", "/", "out/", "out/.", "out/.."])
def test_outputs_that_are_no_prefix(tmp_path, monkeypatch, prefix):
    monkeypatch.chdir(tmp_path)
    for locked in (False, True):
        with pytest.raises(UserError, match=f"{prefix!r} is no PREFIX of token files"):
            TokenFileWriter(prefix, 100, locked=locked)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".bin", ".idx", ".json"])
def test_what_is_there_is_overwritten_only_on_request(write_tokens, tmp_path, ending):
    prefix = write_tokens(GOLDEN)
    for path in file_paths(prefix):
        if path.suffix != ending:
            path.unlink()  # any of the three may be of value
    before = Path(prefix + ending).read_bytes()
    with pytest.raises(UserError, match=rf"corpus\{ending} exists and would be overwritten.*--overwrite"):
        TokenFileWriter(prefix, 100)
    assert Path(prefix + ending).read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    write(prefix, [[7]], overwrite=True)
    assert verify(prefix).tokens.tolist() == [7]


@pytest.mark.parametrize("ending", [".bin", ".idx", ".json"])
def test_a_folder_in_the_place_of_a_file(tmp_path, ending):
    (tmp_path / f"corpus{ending}").mkdir()
    with pytest.raises(UserError, match=rf"corpus\{ending} is a folder"):
        TokenFileWriter(tmp_path / "corpus", 100, overwrite=True)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_one_message_and_leaves_an_older_file(write_tokens, tmp_path):
    prefix = write_tokens(GOLDEN)
    before = verify(prefix).manifest
    with pytest.raises(UserError, match="corpus: No space left on device; free some space"):
        with TokenFileWriter(prefix, 100, overwrite=True) as writer:
            writer._files["bin"].close()
            writer._files["bin"] = open("/dev/full", "wb")
            writer.append([1, 2])
            writer.finish()
    assert verify(prefix).manifest == before and len(list(tmp_path.iterdir())) == 3


def finished_bin(tmp_path, lengths=(3, 1, 5, 2), **others):
    """What `prepared_token_file` asks for, with the documents of GOLDEN."""
    stream = tmp_path / "work" / "tokens.bin"
    stream.parent.mkdir()
    stream.write_bytes(np.arange(1, 12, dtype="<u2").tobytes())
    np.array(lengths, "<i4").tofile(tmp_path / "lengths")
    given = {
        "dtype": np.dtype(np.uint16),
        "bin_sha256": hashlib.sha256(stream.read_bytes()).hexdigest(),
        "largest_id": 11,
        "tokenizer": {"fingerprint": "f00d", "vocab_size": 20, "folder": None},
        "facts": {"text_bytes": 40},
    }
    return prepared_token_file(tmp_path / "corpus", stream, tmp_path / "lengths", **(given | others))


def test_a_finished_bin_becomes_a_token_file(tmp_path):
    with finished_bin(tmp_path) as file:
        assert not (tmp_path / "corpus.bin").exists()
        commit([file])
    written = verify(tmp_path / "corpus")
    assert written.manifest == file.manifest and file.manifest["text_bytes"] == 40
    assert [written.document(i).tolist() for i in range(4)] == GOLDEN
    assert not list((tmp_path / "work").iterdir())


def test_what_is_prepared_may_be_left(tmp_path):
    with finished_bin(tmp_path):
        assert list(tmp_path.glob(".corpus.*"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["lengths", "tokens.bin", "work"]


@pytest.mark.parametrize("wrong", [{"lengths": (3, 1, 5, 3)}, {"facts": {"tokens": 12}}])
def test_figures_of_a_caller_that_contradict_the_file(tmp_path, wrong):
    with pytest.raises(AssertionError), finished_bin(tmp_path, **wrong):
        pass
    assert not list(tmp_path.glob("*corpus*"))


class Killed(BaseException):
    pass


@pytest.fixture
def kill_at(monkeypatch):
    """kill_at(n): the n-th rename, counted from zero, is not done, and the process ends there. Returns all names."""
    renamed: list[str] = []
    replace = os.replace

    def set_up(number):
        def rename(source, target):
            if len(renamed) == number:
                raise Killed
            renamed.append(Path(target).name)
            replace(source, target)

        monkeypatch.setattr(token_writer.os, "replace", rename)
        return renamed

    yield set_up


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_killed_while_the_files_get_their_names(write_tokens, tmp_path, kill_at, renames):
    """An older file of the same size: what opens is all old or all new, and never a mixture."""
    prefix = write_tokens(GOLDEN)
    renamed = kill_at(renames)
    with pytest.raises(Killed) if renames < 3 else contextlib.nullcontext():
        write(prefix, [[1, 2], [4, 3], GOLDEN[2], GOLDEN[3]], overwrite=True)
    assert renamed == ["corpus.bin", "corpus.json", "corpus.idx"][:renames]
    if renames < 3:
        with pytest.raises(UserError, match="corpus.idx does not exist"):
            TokenFile(prefix)
    else:
        assert verify(prefix).document(1).tolist() == [4, 3]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("renames", range(6))
def test_parts_of_an_older_split_never_stand_beside_new_ones(write_tokens, tmp_path, kill_at, renames):
    prefixes = [write_tokens([[1], [2]], name=name) for name in ("train", "validation")]
    kill_at(renames)
    with pytest.raises(Killed), contextlib.ExitStack() as stack:
        writers = [stack.enter_context(TokenFileWriter(prefix, 100, overwrite=True)) for prefix in prefixes]
        for writer in writers:
            writer.extend([[3], [4]])
        files = [writer.prepare() for writer in writers]
        assert all(verify(prefix).tokens.tolist() == [1, 2] for prefix in prefixes)
        commit(files)
    for path in tmp_path.glob("*.idx"):
        assert verify(path.with_suffix("")).tokens.tolist() == [3, 4]
    assert not list(tmp_path.glob(".*"))


def test_the_content_is_on_the_disk_before_the_names(tmp_path, kill_at, monkeypatch):
    renamed, synced = kill_at(None), {}
    fsync = os.fsync

    def record(descriptor):
        synced.setdefault(os.fstat(descriptor).st_ino, list(renamed))
        fsync(descriptor)

    monkeypatch.setattr(token_writer.os, "fsync", record)
    write(tmp_path / "corpus", GOLDEN)
    assert [synced[path.stat().st_ino] for path in file_paths(tmp_path / "corpus")] == [[], [], []]
    assert synced[tmp_path.stat().st_ino] == ["corpus.bin", "corpus.json"]  # and these before .idx, which opens them


def test_what_a_killed_writer_left_is_removed(tmp_path):
    for name in (".corpus.bin.tmp", ".corpus.boundaries.tmp", ".corpus.json.tmp", ".corpus.x.bin.tmp"):
        (tmp_path / name).write_bytes(b"half")
    write(tmp_path / "corpus", GOLDEN)
    assert [path.name for path in tmp_path.glob(".*")] == [".corpus.x.bin.tmp"]  # of another PREFIX
    assert verify(tmp_path / "corpus").num_tokens == 11


def test_names_of_files_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xf0\x9f\xa6\x8a.txt")
    manifest = write(tmp_path / os.fsdecode(b"\xe9"), GOLDEN, sources=[{"name": name, "bytes": 1}])
    assert verify(tmp_path / os.fsdecode(b"\xe9")).manifest == manifest
    assert manifest["sources"][0]["name"] == name


def test_a_document_that_the_format_cannot_count(tmp_path):
    with TokenFileWriter(tmp_path / "corpus", 100) as writer:
        writer.add_sequences(np.array([1, (1 << 31) - 1]))
        with pytest.raises(UserError, match="a document of 2,147,483,648 tokens does not fit the format"):
            writer.add_sequences(np.array([1, 1 << 31]))


def test_offsets_past_31_bits(tmp_path):
    """Byte offsets are 64-bit: an index over 2^31 tokens, written without writing the tokens."""
    np.full(5, 2**30, "<i4").tofile(tmp_path / "lengths")
    counted = _write_index(tmp_path / "long.idx", np.dtype(np.int32), tmp_path / "lengths", boundaries=None)
    assert counted[1:] == (5, 5 * 2**30)
    offsets = np.frombuffer((tmp_path / "long.idx").read_bytes(), "<i8", 5, HEADER.size + 4 * 5)
    assert offsets.tolist() == [i * 2**32 for i in range(5)]


def test_two_writers_of_one_output(tmp_path):
    with TokenFileWriter(tmp_path / "corpus", 100) as writer:
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .* is writing .*corpus"):
            TokenFileWriter(tmp_path / "corpus", 100)
        with output_lock(tmp_path / "other"), TokenFileWriter(tmp_path / "other", 100, locked=True) as nested:
            nested.finish()
        writer.append([1])
        writer.finish()
    with TokenFileWriter(tmp_path / "corpus", 100, overwrite=True):  # free again
        pass
    assert not list(tmp_path.glob(".*"))


def test_a_lock_whose_holder_was_killed_is_free(tmp_path):
    (tmp_path / ".corpus.lock").write_text("process 1 on a machine that is gone")
    with output_lock(tmp_path / "corpus"):
        assert (tmp_path / ".corpus.lock").read_text().startswith(f"process {os.getpid()} ")
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_lets_everyone_pass(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with output_lock(tmp_path / "corpus"), output_lock(tmp_path / "corpus"):
        pass


def test_a_lock_that_was_removed_between_opening_and_locking(tmp_path, monkeypatch):
    """Its holder has just ended: the lock that was got is of a file without a name, and guards nothing."""
    fcntl = pytest.importorskip("fcntl")
    flock, calls = fcntl.flock, []

    def lock(descriptor, operation):
        flock(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".corpus.lock").unlink()

    monkeypatch.setattr(fcntl, "flock", lock)
    with output_lock(tmp_path / "corpus"):
        assert len(calls) == 2 and (tmp_path / ".corpus.lock").exists()


def test_a_lock_that_another_user_left(tmp_path, monkeypatch):
    """It can be read only, which is enough to lock it, and to see that it is locked."""
    (tmp_path / ".corpus.lock").write_text("process 1 on a machine")
    opened = os.open

    def readable(path, flags, *mode):
        if flags & (os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, *mode)

    with monkeypatch.context() as patch:
        patch.setattr(token_writer.os, "open", readable)
        with output_lock(tmp_path / "corpus"):
            with pytest.raises(UserError, match="process 1 on a machine is writing .*corpus"):
                with output_lock(tmp_path / "corpus"):
                    pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_fails(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(descriptor, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="cannot write .*corpus: Input/output error"):
        TokenFileWriter(tmp_path / "corpus", 100)
