"""What a process of the memory measurement has loaded before it begins: all modules of both sides.

Tracing imports torch's machinery at its first use; that is no memory of a training step.
"""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

import skinfast.training  # noqa: F401

make_fx(lambda x: x + 1)(torch.zeros(1))
