"""launch/pretrain.py on a disk that is full while one rank saves certain steps.

full_disk_worker.py RANK,STEP,STEP... [arguments of launch/pretrain.py]
"""

import errno
import os
import runpy
import sys
from pathlib import Path

from megaslm.checkpoint import checkpoint_name, folder
from megaslm.training import report

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"


def main() -> None:
    rank, *steps = map(int, sys.argv.pop(1).split(","))
    names = tuple(f".{checkpoint_name(step)}." for step in steps)
    write_safetensors = folder.write_safetensors

    def full(path, tensors):
        if int(os.environ["RANK"]) == rank and path.parent.name.startswith(names):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_safetensors(path, tensors)

    folder.write_safetensors = full
    report.write_curves = lambda run_dir: None  # takes longer than a tiny run
    runpy.run_path(str(PRETRAIN), run_name="__main__")


if __name__ == "__main__":
    main()
