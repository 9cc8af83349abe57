"""From a trained run to figures: metrics, evaluation of a run, prediction of single images."""

from skinfast.evaluation.metrics import classification_metrics
from skinfast.evaluation.run import evaluate_run, predict, write_result

__all__ = ["classification_metrics", "evaluate_run", "predict", "write_result"]
