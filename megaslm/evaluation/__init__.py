"""How good a model is: losses on tokens and text, tasks of the evaluation harness, and a check of all that it does."""

from megaslm.evaluation.harness import HarnessTasks, run_harness, task_rows
from megaslm.evaluation.likelihood import Continuation, Likelihood, score_continuations
from megaslm.evaluation.loss import LossSums, MeanLoss, evaluate_tokens, sum_losses
from megaslm.evaluation.placement import Placement, choose_placement
from megaslm.evaluation.sets import (
    EvaluationSet,
    Windows,
    evaluate_text,
    open_run_validation,
    open_sets,
    own_validation,
)
from megaslm.evaluation.validation import Check, ValidationOptions, ValidationReport, validate_model

__all__ = [
    "Check",
    "Continuation",
    "EvaluationSet",
    "HarnessTasks",
    "Likelihood",
    "LossSums",
    "MeanLoss",
    "Placement",
    "ValidationOptions",
    "ValidationReport",
    "Windows",
    "choose_placement",
    "evaluate_text",
    "evaluate_tokens",
    "open_run_validation",
    "open_sets",
    "own_validation",
    "run_harness",
    "score_continuations",
    "sum_losses",
    "task_rows",
    "validate_model",
]
