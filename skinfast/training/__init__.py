"""Training: configuration, the step, the loop, checkpoints and the run folder."""

from skinfast.training.config import TrainConfig
from skinfast.training.loop import train
from skinfast.training.model_file import load_model, save_model
from skinfast.training.presets import PRESETS, preset
from skinfast.training.problem import Problem, prepare
from skinfast.training.step import TrainStep

__all__ = [
    "PRESETS",
    "Problem",
    "TrainConfig",
    "TrainStep",
    "load_model",
    "prepare",
    "preset",
    "save_model",
    "train",
]
