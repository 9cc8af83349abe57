"""Experiments of many runs: the paper's tables, class imbalance, cross-validation."""

from skinfast.experiments.cross_validation import cross_validate
from skinfast.experiments.imbalance import compare_imbalance_methods
from skinfast.experiments.reproduction import reproduce
from skinfast.experiments.runs import NamedRun, Outcome, run_all

__all__ = [
    "NamedRun",
    "Outcome",
    "compare_imbalance_methods",
    "cross_validate",
    "reproduce",
    "run_all",
]
