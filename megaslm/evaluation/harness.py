"""Tasks of lm-evaluation-harness, which is an optional package and imported here alone."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaslm.data import Tokenizer
from megaslm.errors import UserError
from megaslm.model import LanguageModel

INSTALL = 'pip install "lm_eval"'
LOCAL = (
    "a task whose data lies on this machine says so in its YAML file: dataset_path: json, dataset_kwargs: {data_files: "
    "FILE}; see --include_path"
)


def run_harness(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Run `tasks` of lm-evaluation-harness on `model`; its results as it gives them, without the samples.

    Args:
        tasks: names of tasks, groups or tags: of the YAML files in `include_path` and, if one is not among them, of the
            harness. Those of the harness have their data on the Hugging Face hub: once with a network, then cached.
        num_fewshot: examples before each question; None: what the task says. A task that says 0 keeps it.
        limit: the first so many documents of each task alone.

    UserError if lm_eval is not installed, there is no such task, or its data cannot be loaded.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"tasks need lm-evaluation-harness ({error}): {INSTALL}") from None
    from megaslm.evaluation.harness_model import HarnessModel

    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"there is no folder {include_path} with the YAML files of tasks")

    class Tasks(TaskManager):
        def load(self, task_list):
            try:
                return super().load(task_list)
            except Exception as error:  # of YAML, of the datasets library, of the network: all kinds
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise UserError(
                    f"the tasks {', '.join(tasks)} cannot be loaded ({reason}); the data of the harness's own tasks is "
                    f"fetched from the Hugging Face hub, which needs a network; {LOCAL}"
                ) from error

    manager = Tasks(include_path=include_path, include_defaults=include_path is None)
    if set(tasks) - set(manager.all_tasks) and include_path is not None:
        manager = Tasks(include_path=include_path)  # the harness's own, some 14,000, take a while to be listed
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        where = f", neither in {include_path} nor in the harness" if include_path else " in the harness"
        raise UserError(f"there is no task {', '.join(unknown)}{where}; {LOCAL}")
    lm = HarnessModel(model, tokenizer, batch_size, quiet=not sys.stderr.isatty())
    return simple_evaluate(
        lm,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
