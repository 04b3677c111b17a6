"""launch/check.py as one rank, in which something is wrong with a node: ranks_worker.py FAULT FOLDER ARGUMENTS..."""

import os
import runpy
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megaslm.cluster import facts, ranks

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "launch" / "check.py"


def another_source(real=facts.source_hashes):
    return real() | {"megaslm/data/order.py": "0"}


def wrong_sum(values, *arguments, real=dist.all_reduce, **options):
    real(values, *arguments, **options)
    values[-1] += 1


def hanging_deadline(meeting, name, seconds, real=ranks.Meeting.deadline):
    if name == "the all-reduce":
        time.sleep(60)
    return real(meeting, name, seconds)


def main() -> None:
    fault, folder, *arguments = sys.argv[1:]
    if os.environ["RANK"] == "0":
        if fault == "data":
            os.chdir(folder)
    elif fault == "command":
        arguments.append("train.max_steps=7")
    elif fault == "engine":
        arguments += ["--ds_config", str(ROOT / "ds_configs" / "zero2.json")]
    elif fault == "code":
        facts.source_hashes = another_source
    elif fault == "blind":
        ranks.SEEN_WITHIN_SECONDS, ranks._appears = 0, lambda path: False
    elif fault == "sums":
        dist.all_reduce = wrong_sum
    elif fault == "absent":
        time.sleep(60)
    elif fault == "hangs":
        ranks.Meeting.deadline = hanging_deadline
    sys.argv = [str(CHECK), *arguments]
    sys.path[0] = str(CHECK.parent)
    runpy.run_path(str(CHECK), run_name="__main__")


main()
