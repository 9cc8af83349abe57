"""The fused ops. Each is a function with the argument names of its torch.nn.functional twin."""

from skinfast.ops.adam import adam_
from skinfast.ops.add_relu import add_relu
from skinfast.ops.batch_norm_add_relu import batch_norm_add_relu
from skinfast.ops.batch_norm_linear import batch_norm_linear
from skinfast.ops.batch_norm_relu import batch_norm_relu
from skinfast.ops.batch_norm_relu_conv2d import batch_norm_relu_conv2d
from skinfast.ops.batch_norm_relu_max_pool2d import batch_norm_relu_max_pool2d
from skinfast.ops.classification_totals import classification_totals_
from skinfast.ops.conv2d import conv2d
from skinfast.ops.conv2d_add_relu import conv2d_add_relu
from skinfast.ops.conv2d_relu import conv2d_relu
from skinfast.ops.conv2d_relu_max_pool2d import conv2d_relu_max_pool2d
from skinfast.ops.conv2d_statistics import conv2d_statistics
from skinfast.ops.cross_entropy import cross_entropy
from skinfast.ops.global_average_pool2d import global_average_pool2d
from skinfast.ops.image_batch import image_batch
from skinfast.ops.linear import linear
from skinfast.ops.linear_relu import linear_relu
from skinfast.ops.max_pool2d import max_pool2d

__all__ = [
    "adam_",
    "add_relu",
    "batch_norm_add_relu",
    "batch_norm_linear",
    "batch_norm_relu",
    "batch_norm_relu_conv2d",
    "batch_norm_relu_max_pool2d",
    "classification_totals_",
    "conv2d",
    "conv2d_add_relu",
    "conv2d_relu",
    "conv2d_relu_max_pool2d",
    "conv2d_statistics",
    "cross_entropy",
    "global_average_pool2d",
    "image_batch",
    "linear",
    "linear_relu",
    "max_pool2d",
]
