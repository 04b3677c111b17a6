"""tools/convert_to_hf.py as the user runs it, on a run of some steps."""

import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megaslm.checkpoint import verify_export
from megaslm.checkpoint.format import read_manifest, write_manifest
from megaslm.data import load_tokenizer, train_bpe

pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")
from huggingface_hub.errors import RepositoryNotFoundError  # noqa: E402
from huggingface_hub.utils import filter_repo_objects  # noqa: E402

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_to_hf.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run_dir(trained, command, preset, tmp_path) -> Path:
    """A copy of a run with checkpoints of steps 2 and 4, of which the newest is no better than the other."""
    if not trained.exists():
        finished = command("--preset", preset, "--run_dir", trained, "train.max_steps=4", "checkpoint.interval=2")
        assert finished.code == 0, finished.err
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def convert(monkeypatch, capfd):
    """convert(argument, ...) -> exit code, stdout and stderr of the tool in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
        return end.value.code, *capfd.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "run")


def test_a_run_becomes_a_folder(run_dir, convert, corpus, tmp_path):
    arguments = ("--checkpoint", run_dir, "--output", tmp_path / "out", "--max_shard_size", "20KB")
    code, out, err = convert(*arguments)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"converting {run_dir / 'checkpoints' / 'step_00000004'}"
    assert [line.split(":")[0] for line in lines[2:]][0] == "fingerprint"
    assert lines[3].startswith("largest difference of a logit ") and "(bound 0.0001)" in lines[3]
    assert lines[4] == f"export: {tmp_path / 'out'} (0.00 GB, qwen3, bf16)"
    assert verify_export(tmp_path / "out") == [] and len(list((tmp_path / "out").glob("model-*"))) > 1
    assert load_tokenizer(tmp_path / "out").fingerprint == load_tokenizer(corpus.tokenizer).fingerprint
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("| steps | 4 |", "| tokens | 1,024 |", "| data | tokens |", "| learning rate | 0.01, cosine, "):
        assert fact in card, fact
    assert str(tmp_path) not in card + (tmp_path / "out" / "megaslm_export.json").read_text()
    code, _, err = convert(*arguments)
    assert code == 2 and "--overwrite" in err
    text = tmp_path / "run" / "text"
    text.write_text("a dog sees one bird, the cat runs")
    code, out, err = convert(*arguments, "--overwrite", "--dtype", "fp32", "--text", text)
    assert code == 0 and "over 32 tokens (given text)" in out, err
    assert left(tmp_path) == ["out"]


def test_the_newest_that_is_sound(run_dir, convert, tmp_path):
    """Damage is found by the conversion, which then begins anew with the one before."""
    file = run_dir / "checkpoints" / "step_00000004" / "weights_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, out, err = convert("--checkpoint", run_dir, "--output", tmp_path / "out")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "megaslm_export.json").read_text())["checkpoint"]["step"] == 2
    code, out, err = convert("--checkpoint", file.parent, "--output", tmp_path / "other")
    assert code == 2 and err.count("error:") == 1 and "weights_00000.safetensors is not what was written" in err
    assert left(tmp_path) == ["out"]


def test_mistakes_are_one_message(run_dir, convert, tmp_path):
    newest = run_dir / "checkpoints" / "step_00000004"
    small, newer, foreign = (run_dir / name for name in ("small", "newer", "foreign"))
    train_bpe(["some other text, of more symbols than the model knows"], vocab_size=300).save(small)
    shutil.copytree(newest, newer)
    manifest = read_manifest(newest)
    write_manifest(newer, {**{key: manifest[key] for key in manifest if key != "sha256"}, "version": 99})
    foreign.mkdir()
    (foreign / "pytorch_model.pt").write_bytes(b"pickle")
    missing = run_dir / "missing"
    shutil.copytree(newest, missing)
    (missing / "weights_00000.safetensors").unlink()
    good = ("--checkpoint", newest)
    for arguments, message in (
        (("--checkpoint", run_dir / "no"), "no checkpoint"),
        (("--checkpoint", newer), "99"),
        (("--checkpoint", foreign), "pickle"),
        (("--checkpoint", missing), "weights_00000.safetensors is missing"),
        ((*good, "--tokenizer", small), "is not the tokenizer"),
        ((*good, "--max_shard_size", "5 apples"), "--max_shard_size '5 apples' is no size"),
        ((*good, "--text", run_dir / "no"), "is no file"),
        ((*good, "--text", "."), "is no file"),
        ((*good, "--text", newest / "weights_00000.safetensors"), "can't be read"),
        ((*good, "--private"), "--private is of --push_to_hub"),
        ((*good, "--push_to_hub", "no/such/name"), "can't upload to no/such/name"),
        ((*good, "--push_to_hub", ""), "can't upload to"),
    ):
        code, out, err = convert(*arguments, "--output", tmp_path / "out")
        assert code == 2 and err.startswith("error:") and err.count("\n") == 1 and message in err, (arguments, err)
    assert left(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_export_leaves_nothing(run_dir, convert, tmp_path, monkeypatch, number):
    from megaslm.checkpoint.huggingface import export

    def interrupt(*_):
        os.kill(os.getpid(), number)
        signal.pause()

    monkeypatch.setattr(export, "compare_logits", interrupt)
    code, _, err = convert("--checkpoint", run_dir, "--output", tmp_path / "out")
    assert code == 130 and err == "interrupted\n" and left(tmp_path) == []


class Hub:
    """HfApi of huggingface_hub, with repositories that keep what they are given."""

    def __init__(self):
        self.repositories: dict[str, SimpleNamespace] = {}
        self.failure: Exception | None = None

    def whoami(self):
        if self.failure:
            raise self.failure
        return {"name": "somebody"}

    def repo_info(self, name):
        if name not in self.repositories:
            raise RepositoryNotFoundError("no such repository", response=requests_response())
        return self.repositories[name]

    def create_repo(self, name, private, exist_ok):
        assert exist_ok
        self.repositories.setdefault(name, SimpleNamespace(private=private, files={}))
        return f"https://hub.example/{name}"

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
        if self.failure:
            raise self.failure
        files = self.repositories[repo_id].files
        for name in list(filter_repo_objects(files, allow_patterns=delete_patterns)):  # as the hub's client does it
            del files[name]
        files.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})


def requests_response():
    """What the client's errors carry, whose library differs by version."""
    return SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.fixture
def hub(monkeypatch) -> Hub:
    one = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: one)
    return one


def test_an_upload_on_request(run_dir, convert, hub, tmp_path):
    out = tmp_path / "out"
    arguments = ("--checkpoint", run_dir, "--output", out, "--push_to_hub", "tiny")
    code, printed, err = convert(*arguments, "--private")
    assert code == 0 and printed.splitlines()[-1] == "uploaded: https://hub.example/somebody/tiny", err
    repository = hub.repositories["somebody/tiny"]
    assert repository.private and sorted(repository.files) == left(out) and "model.safetensors" in repository.files
    assert 'from_pretrained("somebody/tiny"' in (out / "README.md").read_text()
    # Over an older export: its weights, which transformers would open first, and its tokenizer's files go.
    repository.files |= {"chat_template.jinja": b"", "LICENSE": b"mine", "adapters/model.bin": b"mine"}
    code, _, err = convert(*arguments, "--overwrite", "--max_shard_size", "20KB")
    assert code == 0, err
    assert sorted(repository.files) == sorted([*left(out), "LICENSE", "adapters/model.bin"])
    assert "model.safetensors" not in repository.files and "model.safetensors.index.json" in repository.files
    hub.upload_folder = lambda **options: (_ for _ in ()).throw(OSError("connection lost\nsome more"))
    code, _, err = convert(*arguments, "--overwrite")
    assert code == 2 and "the upload to somebody/tiny failed: connection lost; the export is in" in err
    assert verify_export(out) == []


def test_an_upload_that_cannot_be_is_told_before_the_work(run_dir, convert, hub, tmp_path):
    hub.create_repo("somebody/tiny", private=False, exist_ok=True)
    arguments = ("--checkpoint", run_dir, "--output", tmp_path / "out", "--push_to_hub", "somebody/tiny")
    code, _, err = convert(*arguments, "--private")
    assert code == 2 and "somebody/tiny is there and public, and --private would not change that" in err
    hub.failure = OSError("no token")
    code, _, err = convert(*arguments)
    assert code == 2 and "can't upload to somebody/tiny: no token" in err
    assert left(tmp_path) == [] and not hub.repositories["somebody/tiny"].files
