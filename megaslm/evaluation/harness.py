"""Tasks of lm-evaluation-harness, which is an optional package and imported here alone."""

import contextlib
import functools
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megaslm.data import Tokenizer
from megaslm.errors import UserError, first_line
from megaslm.evaluation.sets import check_names
from megaslm.model import LanguageModel

NEEDED = "lm_eval>=0.4.12"
LOCAL = (
    "a task whose data lies on this machine says so in its YAML file: dataset_path: json, dataset_kwargs: {data_files: "
    "FILE}; see --include_path"
)
SEED = 1234  # that the harness gives to NumPy, torch and the choice of examples; Python's is 0
KEPT = ("results", "groups", "n-shot", "n-samples", "versions")  # of its results


class HarnessTasks:
    """Tasks of lm-evaluation-harness with their data, ready to be run.

    Args:
        names: of tasks, groups or tags: of the YAML files in `include_path` and, if one is not among them, of the
            harness. Those of the harness have their data on the Hugging Face hub: once with a network, then cached.
        num_fewshot: examples before each question; None: what the task says. A task that says 0 keeps it.

    UserError if lm_eval is not installed or too old, there is no such task, its data cannot be loaded, or it has no
    metric that the harness knows.
    """

    def __init__(self, names: Sequence[str], *, include_path: str | Path | None = None, num_fewshot: int | None = None):
        check_names(names, "a task")
        self.names = list(names)
        TaskManager = _import_harness()["TaskManager"]
        if include_path is not None and not Path(include_path).is_dir():
            raise UserError(f"there is no folder {include_path} with the YAML files of tasks")
        with self._faults("cannot be loaded"):
            manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
            if include_path is not None and set(names) - set(manager.all_tasks):
                # The harness's own, some 14,000, take a while to be listed.
                manager = TaskManager(include_path=include_path)
        if unknown := sorted(set(names) - set(manager.all_tasks)):
            where = f", neither in {include_path} nor in the harness" if include_path else " in the harness"
            raise UserError(f"there is no task {', '.join(unknown)}{where}; {LOCAL}")
        with self._faults("cannot be loaded"), _without_bars():
            self._loaded = manager.load(self.names)
        for name, task in self._loaded["tasks"].items():
            self._check_metrics(name, task)
            if (own := task.get_config("num_fewshot")) is None or num_fewshot is not None and own != 0:
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=SEED)

    def run(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        eod_ids: Iterable[int] | None = None,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> dict[str, Any]:
        """The results as the harness gives them, without the samples.

        Args:
            eod_ids: ids that end a generation; None: the tokenizer's end-of-document token.
            limit: the first so many documents of each task alone.

        UserError for what the tasks ask that the model cannot give, and for their own mistakes.
        """
        harness = _import_harness()
        lm = harness["HarnessModel"](model, tokenizer, batch_size, not sys.stderr.isatty(), eod_ids)
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        # Not its simple_evaluate, which goes on to describe the machine, its packages and the git folder it runs in.
        with self._faults("cannot be run", lm), _without_bars():
            found = harness["evaluate"](lm, self._loaded, limit=limit, log_samples=False)
        return {key: found[key] for key in KEPT if key in found}

    def _check_metrics(self, name: str, task: Any) -> None:
        """Whatever the harness does not know it leaves out, with all numbers, and says so in its log alone."""
        metrics = getattr(task, "_metric_fn_list", {})
        own = getattr(task.config, "process_results", None) is not None
        if unknown := [metric for metric, function in metrics.items() if function is None and not own]:
            raise UserError(
                f"the harness does not know the metric {', '.join(unknown)} of the task {name}: change its metric_list"
            )

    @contextlib.contextmanager
    def _faults(self, what: str, lm: Any = None) -> Iterator[None]:
        """Whatever goes wrong in YAML, templates, the datasets library or the network is the task's; a fault while the
        model of `lm` answers is ours."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if lm is not None and lm.answering:
                raise
            reason = first_line(error, type(error).__name__)
            advice = "; change its YAML file, or the options"
            if any(map(_is_of_the_network, _causes(error))):
                advice = (
                    "; the data of the harness's own tasks is fetched from the Hugging Face hub, which needs a "
                    f"network; {LOCAL}"
                )
            raise UserError(f"the tasks {', '.join(self.names)} {what} ({reason}){advice}") from error


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
    """Load and run tasks of lm-evaluation-harness; arguments and errors as of `HarnessTasks`."""
    loaded = HarnessTasks(tasks, include_path=include_path, num_fewshot=num_fewshot)
    return loaded.run(model, tokenizer, limit=limit, batch_size=batch_size)


def task_rows(results: dict[str, Any]) -> list[list[str]]:
    """Task, metric, filter, examples, value and standard error of each number; "-" for what is not there.

    lm-evaluation-harness names them METRIC,FILTER and METRIC_stderr,FILTER.
    """
    rows = []
    for task, metrics in results["results"].items():
        shots = str(results["n-shot"].get(task, "-"))
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            error = f"{error:.4f}" if isinstance(error, float) else "-"
            rows.append([task, metric, filtered, shots, f"{value:.4f}", error])
    return rows


def _import_harness() -> dict[str, Any]:
    """What we use of it, and our model as it sees one. UserError where it is missing, or older than what we know."""
    try:
        from lm_eval import evaluate
        from lm_eval.tasks import TaskManager

        from megaslm.evaluation.harness_model import HarnessModel

        TaskManager.load  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise UserError(f'tasks need lm-evaluation-harness, {NEEDED} ({error}): pip install "{NEEDED}"') from None
    return {"evaluate": evaluate, "TaskManager": TaskManager, "HarnessModel": HarnessModel}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and those that it came of."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def _is_of_the_network(error: BaseException) -> bool:
    """By the names of its classes: those of requests, httpx and the hub are not ours to import."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(
        names
        & {
            "ConnectionError",
            "ConnectError",
            "TimeoutError",
            "Timeout",
            "TransportError",
            "OfflineModeIsEnabled",
            "LocalEntryNotFoundError",
        }
    )


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """The harness and the datasets library show bars of their own, whatever stderr is."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        yield
        return
    original = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original
