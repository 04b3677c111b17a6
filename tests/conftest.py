"""A tiny corpus, a tiny run on it, and the ways to start one: in this process, as a command, as several ranks."""

import contextlib
import itertools
import json
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megaslm.commands import mute_native_exit

sys.path.insert(0, str(Path(__file__).parent))

from zygote import Zygote  # noqa: E402

# Threads that wait must not spin: the machine may have few cores. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

mute_native_exit()
# A suite in the background of a shell ignores SIGINT, and so would every program that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = ROOT / "launch" / "pretrain.py"
SEVERAL_COMMANDS = ROOT / "tests" / "launch" / "several_commands.py"
ZERO = {stage: ROOT / "ds_configs" / f"zero{stage}.json" for stage in range(4)}
# What a launcher, or a test of this process, leaves in the environment.
OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
PORTS = itertools.count(random.SystemRandom().randrange(12_000, 30_000))
# Of the metrics, what the clock and the memory of a process decide.
MEASURED = ("tokens_per_s", "ms_per_step", "tflops", "tflops_causal", "memory_bytes", "seconds")


# Files that take half a minute of a core or more, the longest first: run side by side, they must not come last.
LONGEST_FIRST = (
    "launch/test_kills.py",
    "launch/test_nodes.py",
    "training/test_tensor_parallel.py",
    "training/test_tensor_parallel_options.py",
    "launch/test_stopping.py",
    "training/test_change_of_layout.py",
    "kernels/test_compiled.py",
    "kernels/test_interpreted.py",
    "training/test_layouts.py",
    "training/test_resume.py",
    "checkpoint/test_engine_parity.py",
    "launch/test_ds_configs.py",
    "launch/test_pretrain.py",
    "tools/test_benchmark_kernels.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = item.path.relative_to(ROOT / "tests").as_posix()
        return LONGEST_FIRST.index(file) if file in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)


@dataclass(frozen=True)
class Corpus:
    """Token files (PREFIX) and the folder of the character tokenizer they were made with."""

    prefix: str
    tokenizer: str
    vocab_size: int
    text: Path


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str

    def message(self) -> str:
        """The one `error:` message of a user's mistake; everything that a traceback or a second message would break."""
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.out + self.err, self.err
        assert (self.out + self.err).count("error: ") == 1, self.err
        return self.err[self.err.index("error: ") :]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    """200 documents of words with a grammar, so that a tiny model learns something within 20 steps."""
    from megaslm.data import build_token_file, character_tokenizer
    from megaslm.data.sources import TextSource

    folder = tmp_path_factory.mktemp("corpus")
    words = random.Random(0)
    sentences = [
        " ".join(
            words.choice(("the cat", "a dog", "one bird")) + words.choice((" sees ", " runs. ")) for _ in range(12)
        )
        for _ in range(200)
    ]
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences))
    tokenizer = character_tokenizer(sentences)
    tokenizer.save(folder / "tokenizer")
    build_token_file(iter(TextSource([text])), tokenizer, str(folder / "tokens"))
    return Corpus(str(folder / "tokens"), str(folder / "tokenizer"), tokenizer.vocab_size, text)


@pytest.fixture(scope="session")
def tiny(corpus) -> dict:
    """A run config on the corpus: 27k parameters, clipping active, accumulation 4 on one rank and 2 on two."""
    return {
        "name": "tiny",
        "model": {
            "context_length": 32,
            "num_layers": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 64,
            "qk_norm": True,
        },
        "tokenizer": {"path": corpus.tokenizer},
        "data": {"train": [{"prefix": corpus.prefix}], "split": "95,5"},
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": 20, "precision": "fp32"},
        "optimizer": {"lr": 0.01, "gradient_clipping": 0.5},
        "schedule": {"warmup_steps": 4},
        "eval": {"interval": 0},
        "checkpoint": {"interval": 0},
        "logging": {"interval": 1, "tensorboard": False},
    }


@pytest.fixture(scope="session")
def preset(tiny, tmp_path_factory) -> str:
    """`tiny` as a file for --preset."""
    path = tmp_path_factory.mktemp("preset") / "tiny.json"
    path.write_text(json.dumps(tiny))
    return str(path)


@pytest.fixture(scope="session")
def _group():
    from torch.distributed import destroy_process_group

    from megaslm.parallel import init_distributed

    with pytest.MonkeyPatch.context() as patch:
        _as_one_rank(patch)
        ranks = init_distributed()
    yield ranks
    destroy_process_group()


@pytest.fixture
def ranks(_group, monkeypatch):
    """This process as the one rank of a group that lasts for the session."""
    _as_one_rank(monkeypatch)
    return _group


@pytest.fixture
def command(ranks, monkeypatch, capfd):
    """command(argument, ...) -> Finished: launch/pretrain.py in this process, which saves the 5 s of its imports."""
    import megaslm.training.report
    import megaslm.training.run

    def join(tensor_parallel_size: int):
        assert tensor_parallel_size == 1, "several ranks: fork_ranks, pretrain_in_turn"
        return ranks

    def run(*arguments) -> Finished:
        monkeypatch.setattr(sys, "argv", [str(PRETRAIN), *map(str, arguments)])
        monkeypatch.setattr(megaslm.training.run, "init_distributed", join)
        monkeypatch.setattr(megaslm.training.report, "write_curves", lambda run_dir: None)  # longer than a tiny run
        monkeypatch.setattr(os, "_exit", sys.exit)  # how a command leaves when other ranks may wait for it
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(PRETRAIN), run_name="__main__")
        out, err = capfd.readouterr()
        return Finished(end.value.code or 0, out, err)

    return run


@pytest.fixture
def run_tool(monkeypatch, capfd):
    """run_tool(name, argument, ...) -> Finished: a command of tools/ in this process."""

    def run(name: str, *arguments) -> Finished:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
        out, err = capfd.readouterr()
        return Finished(end.value.code or 0, out, err)

    return run


@pytest.fixture(scope="session", name="free_port")
def _free_port():
    """free_port() -> a port of this machine that nobody listens on."""
    return free_port


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of a command as a user starts it."""
    inherited = {key: value for key, value in os.environ.items() if key not in OF_LAUNCHERS}
    return inherited | {"DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory) -> dict[str, str]:
    """Environment of a machine without compilers, in which nothing that was compiled before is found either."""
    folder = tmp_path_factory.mktemp("without_compiler")
    tools = folder / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "env", "git", "sh", "uname"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    caches = {"TORCH_EXTENSIONS_DIR": folder / "extensions", "TORCHINDUCTOR_CACHE_DIR": folder / "inductor"}
    nothing = dict.fromkeys(("CC", "CXX", "CUDA_HOME"), "/nonexistent")
    return {"PATH": str(tools), **{name: str(path) for name, path in caches.items()}, **nothing}


@pytest.fixture
def write_json(tmp_path):
    """write_json(name, value) -> path of the file."""

    def write(name: str, value) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(value))
        return path

    return write


@pytest.fixture(scope="session")
def start(environment, tmp_path_factory):
    """start(argument, ...) -> Popen with text pipes, in a process group of its own.

    ranks: so many under `launcher`, "deepspeed" or "torchrun"; None: one, without a launcher.
    """
    started = []

    def run(*arguments, ranks=None, launcher="deepspeed", script=PRETRAIN, env=None, **options):
        count = {"deepspeed": "--num_accelerators", "torchrun": "--nproc_per_node"}[launcher]
        command = [Path(sys.executable).with_name(launcher), count, ranks, "--master_port", free_port()]
        command = [*(command if ranks else [sys.executable]), script, *arguments]
        process = subprocess.Popen(
            list(map(str, command)),
            env=environment | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=tmp_path_factory.getbasetemp(),
            **options,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()


@pytest.fixture(scope="session")
def pretrain(start):
    """pretrain(argument, ..., ranks=None) -> Finished: launch/pretrain.py as a process, see `start`."""

    def run(*arguments, **options) -> Finished:
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=240)
        return Finished(process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def fork_ranks(environment, tmp_path_factory):
    """fork_ranks(script, arguments, world_size) -> Finished: `script` as `world_size` ranks, see zygote.py.

    world_size None: one process without a launcher. `env`: on top of `environment`, there from the first import on.
    A rank that fails ends the others, and its exit code is that of all. Their folder is a new one.
    """
    zygotes: dict[tuple, Zygote] = {}

    def run(script, arguments, world_size: int | None, *, timeout: float = 240, env: dict | None = None) -> Finished:
        key = tuple(sorted((env or {}).items()))
        folder = tmp_path_factory.mktemp("ranks")
        if key not in zygotes or not zygotes[key].is_open:
            zygotes[key] = Zygote(environment | dict(key), folder / "zygote.log")
        return Finished(*zygotes[key].fork(world_size, free_port(), Path(script), arguments, folder, timeout))

    yield run
    for zygote in zygotes.values():
        zygote.close()


@pytest.fixture(scope="session")
def pretrain_in_turn(fork_ranks, tmp_path_factory):
    """pretrain_in_turn(commands, ranks): one start of the ranks for several commands, see several_commands.py."""

    def run(commands: list[dict], ranks: int | None, **options) -> Finished:
        path = tmp_path_factory.mktemp("commands") / "commands.json"
        path.write_text(json.dumps(commands, default=str))
        finished = fork_ranks(SEVERAL_COMMANDS, [path], ranks, **options)
        assert finished.code == 0, f"{finished.out}\n{finished.err}"
        return finished

    return run


@pytest.fixture(scope="session")
def metrics():
    """metrics(run_dir, kind="train") -> the records of metrics.jsonl, which must be JSON to the letter."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    def read(run_dir: Path, kind: str = "train") -> list[dict]:
        lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
        return [r for r in (json.loads(line, parse_constant=refuse) for line in lines) if r["kind"] == kind]

    return read


@pytest.fixture(scope="session")
def numbers(metrics):
    """numbers(run_dir) -> the records of metrics.jsonl, train then eval, without what the clock decides."""

    def read(run_dir: Path) -> list[dict]:
        records = [record for kind in ("train", "eval") for record in metrics(run_dir, kind)]
        return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]

    return read


def _as_one_rank(patch: pytest.MonkeyPatch) -> None:
    """For the test alone: commands that it starts, and other tests, must not take it for theirs."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **address}.items():
        patch.setenv(key, value)


def free_port() -> int:
    """Below the ports that the system gives to connections: those of other tests could take it before it is used."""
    while True:
        port = next(PORTS)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
