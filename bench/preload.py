"""What a process of the memory measurement has loaded before it begins: all modules of both sides.

Recording a step loads torch's machinery for it at its first use; that is no memory of a training
step. Nothing is computed here: threads would not survive the fork of a child.
"""

import torch
from torch import Tensor

import skinfast.training  # noqa: F401
from skinfast.optim import Adam
from skinfast.training.capture import CapturedStep, LowPrecisionCopies

parameter = torch.zeros(1, requires_grad=True)
optimizer = Adam([parameter])
optimizer.make_states()


def step(gradient: Tensor) -> None:
    """Update the parameter."""
    parameter.grad = gradient
    optimizer.step()


CapturedStep(step, [torch.zeros(1)], optimizer, LowPrecisionCopies())
