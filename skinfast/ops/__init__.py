"""The fused ops. Each is a function with the argument names of its torch.nn.functional twin."""

from skinfast.ops.add_relu import add_relu

__all__ = ["add_relu"]
