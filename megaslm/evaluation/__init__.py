"""How good a model is: losses on tokens and text, tasks of the evaluation harness, and a check of all that it does."""

from megaslm.evaluation.harness import run_harness
from megaslm.evaluation.likelihood import Continuation, Likelihood, score_continuations
from megaslm.evaluation.loss import LossSums, MeanLoss, evaluate_text, evaluate_tokens, sum_losses
from megaslm.evaluation.placement import DTYPES, Placement, choose_placement
from megaslm.evaluation.validation import Check, ValidationOptions, ValidationReport, validate_model

__all__ = [
    "DTYPES",
    "Check",
    "Continuation",
    "Likelihood",
    "LossSums",
    "MeanLoss",
    "Placement",
    "ValidationOptions",
    "ValidationReport",
    "choose_placement",
    "evaluate_text",
    "evaluate_tokens",
    "run_harness",
    "score_continuations",
    "sum_losses",
    "validate_model",
]
