"""launch/quickstart.sh with stubs in the place of the commands that it starts: what it starts, and when it does not."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "quickstart.sh"
STUB = """#!/usr/bin/env bash
if [[ "$*" == *--print_config* ]]; then
    [[ "$*" != *wrong* ]] || { echo "error: no key wrong" >&2; exit 2; }
    echo '{"name": "tiny"}'
elif [ "$1" = -c ]; then
    case "$2" in *cuda*) exit 1 ;; *) cat >/dev/null; echo tiny ;; esac
else
    echo "$(basename "$0") ${*//$'\n'/ }" >>commands
fi
"""


@pytest.fixture
def quickstart(tmp_path):
    """quickstart(argument, ...) -> (exit code, stderr, commands) in a copy of the repository with stubs."""
    (tmp_path / "launch").mkdir()
    shutil.copy(SCRIPT, tmp_path / "launch")
    (tmp_path / "launch" / "install.sh").write_text("exit 0\n")
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("python", "deepspeed"):
        (tools / name).write_text(STUB)
        (tools / name).chmod(0o755)

    def run(*arguments):
        commands = tmp_path / "commands"
        commands.unlink(missing_ok=True)
        script = ["bash", tmp_path / "launch" / "quickstart.sh", *arguments]
        finished = subprocess.run(script, capture_output=True, text=True, timeout=60)
        return finished.returncode, finished.stderr, commands.read_text().splitlines() if commands.exists() else []

    return run


@pytest.mark.parametrize("arguments", [(), ("--run_dir", "runs/mine"), ("--run_dir=runs/mine", "train.max_steps=3")])
def test_it_ends_with_an_export_and_a_sample_of_it(quickstart, arguments):
    run = "runs/mine" if arguments else "runs/tiny"
    code, err, commands = quickstart(*arguments)
    assert code == 0 and err == ""
    assert [line.split()[0] for line in commands] == ["deepspeed", "python", "python"]
    assert commands[0].endswith(" ".join(["launch/pretrain.py --ds_config ds_configs/zero2.json", *arguments]))
    assert commands[1] == f"python tools/convert_to_hf.py --checkpoint {run} --output {run}/export --overwrite"
    assert commands[2].startswith(f"python tools/generate.py --model {run}/export --prompt def main():")


def test_a_wrong_override_is_one_message(quickstart):
    assert quickstart("wrong=1") == (2, "error: no key wrong\n", [])


def test_a_dry_run_exports_nothing(quickstart, tmp_path):
    (tmp_path / "runs" / "tiny" / "checkpoints").mkdir(parents=True)  # of an earlier run
    code, _, commands = quickstart("--dry_run")
    assert code == 0 and len(commands) == 1 and commands[0].startswith("deepspeed")
