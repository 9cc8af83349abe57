"""From a trained run to figures: metrics, evaluation of a run, prediction of single images."""

from skinfast.evaluation.calibrate import calibrate_run
from skinfast.evaluation.calibration import calibration_figures
from skinfast.evaluation.metrics import classification_metrics
from skinfast.evaluation.run import evaluate_run, predict, write_result

__all__ = [
    "calibrate_run",
    "calibration_figures",
    "classification_metrics",
    "evaluate_run",
    "predict",
    "write_result",
]
