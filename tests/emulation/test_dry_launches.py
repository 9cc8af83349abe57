"""The host code around the launches on tensors of more than 2^31 elements, which are never touched.

Memory that nothing writes takes no room, and a dry run of the emulation checks a launch without
making it: what this proves is that sizes, grids and splits are counted in enough bits, or that an
op refuses. What the kernels compute there, tests/cuda/test_cuda_large_tensors.py asks a GPU.
"""

import ctypes

import emulated
import pytest
import torch

MANY = 2**31 + 8
MEBI = 2**20
ops = torch.ops.skinfast_emulated


@pytest.fixture
def launches(emulated_ops, monkeypatch):
    """How many kernels a call would launch."""
    monkeypatch.setenv("SKINFAST_EMULATION_DRY", "1")
    counter = ctypes.CDLL(str(emulated.build_ops())).emulation_launches
    counter.restype = ctypes.c_int64

    def count(call):
        before = counter()
        call()
        return counter() - before

    return count


def last_grid():
    """Blocks of the launch before."""
    question = ctypes.CDLL(str(emulated.build_ops())).emulation_last_grid
    question.restype = ctypes.c_int64
    return question()


def untouched(*shape, dtype=torch.bfloat16, layout=torch.contiguous_format):
    """Of no value that means anything."""
    try:
        return torch.empty(shape, dtype=dtype, memory_format=layout)
    except RuntimeError:
        pytest.skip("this system reserves memory for what is never touched")


# 8 values a thread, 256 threads a block, at most 132 * 16 blocks (csrc/core/cuda.h).
@pytest.mark.parametrize(
    ("count", "blocks"),
    [(1, 1), (8 * 256, 1), (8 * 257, 2), (8 * 256 * 2112, 2112), (MANY, 2112)],
)
def test_a_grid_stride_loop_has_blocks_for_its_vectors_up_to_a_limit(launches, count, blocks):
    x = untouched(count)
    assert launches(lambda: ops.add_relu(x, x)) == 1
    assert last_grid() == blocks


def test_an_odd_start_makes_the_loop_one_over_single_values(launches):
    x = untouched(1 + 8 * 256)[1:]
    assert launches(lambda: ops.add_relu(x, x)) == 1
    assert last_grid() == 8


def test_add_relu(launches):
    x = untouched(MANY)
    assert launches(lambda: ops.add_relu(x, x)) == 1
    assert launches(lambda: ops.add_relu_backward(x, x)) == 1
    assert launches(lambda: ops.add_relu(x[1:], x[1:])) == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_max_pool2d(launches, layout):
    x = untouched(1025, 8, 512, 512, layout=layout)
    assert x.numel() > 2**31
    window = [3, 3], [2, 2], [1, 1], [1, 1], False
    result = []
    assert launches(lambda: result.append(ops.max_pool2d(x, *window))) == 1
    output, argmax = result[0]
    last = layout == torch.channels_last
    assert launches(lambda: ops.max_pool2d_backward(output, argmax, x.shape, *window, last)) == 1


# Threads for 10 planes of 64x64: of 8 windows each or their columns in one row; from an odd start,
# and for windows without a kernel of their own, of one window or one pixel.
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize(
    ("window", "threads", "windows"),
    [
        (([2, 2], [2, 2], [0, 0]), (32 * 4, 64 * 4), 32 * 32),
        (([3, 3], [3, 3], [0, 0]), (21 * 3, 64 * 3), 21 * 21),
        (([4, 4], [4, 4], [0, 0]), (16 * 2, 64 * 2), 16 * 16),
        (([3, 3], [2, 2], [1, 1]), (32 * 4, 64 * 4), 32 * 32),
        (([5, 5], [2, 2], [2, 2]), (32 * 32, 64 * 64), 32 * 32),
    ],
)
def test_rows_are_pooled_by_vectors_where_they_start_evenly(
    launches, window, threads, windows, start
):
    forward, backward = (windows, 64 * 64) if start else threads
    parameters = *window, [1, 1], False
    x = untouched(start + 10 * 64 * 64)[start:].view(1, 10, 64, 64)
    result = []
    assert launches(lambda: result.append(ops.max_pool2d(x, *parameters))) == 1
    assert last_grid() == -(-10 * forward // 256)
    output, argmax = result[0]
    grad = untouched(start + output.numel())[start:].view(output.shape)
    saved = argmax, x.shape, *parameters, False
    assert launches(lambda: ops.max_pool2d_backward(grad, *saved)) == 1
    assert last_grid() == -(-10 * backward // 256)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2**17 + 1, 4096, 2, 2), (1025, 8, 512, 512)])
def test_global_average_pool2d(launches, layout, size):
    x = untouched(*size, layout=layout)
    assert x.numel() > 2**31
    result = []
    assert launches(lambda: result.append(ops.global_average_pool2d(x))) == 1
    last = layout == torch.channels_last
    backward = ops.global_average_pool2d_backward
    assert launches(lambda: backward(result[0], x.shape, last)) == 1


@pytest.mark.parametrize(
    ("rows", "classes", "count"),
    [(0, 7, 1), (64, 7, 1), (1024, 16, 1), (1025, 7, 2), (64, 17, 2), (8, 1000, 1)],
)
def test_the_cross_entropy_of_a_batch_is_one_launch(launches, rows, classes, count):
    logits = untouched(rows, classes, dtype=torch.float32)
    target = untouched(rows, dtype=torch.int64)
    assert launches(lambda: ops.cross_entropy(logits, target, None, -100, 1, 0.0)) == count


def test_cross_entropy(launches):
    logits = untouched(MANY // 4, 4)
    target = untouched(MANY // 4, dtype=torch.int64)
    result = []
    settings = -100, 1, 0.0
    assert launches(lambda: result.append(ops.cross_entropy(logits, target, None, *settings))) == 2
    saved = logits, target, None, *result[0][1:], *settings
    grad = torch.ones((), dtype=torch.bfloat16)
    assert launches(lambda: ops.cross_entropy_backward(grad, *saved)) == 1


def test_adam(launches):
    tensors = [[untouched(MANY)] for _ in range(4)]
    settings = {
        "lr": 0.1,
        "lr_tensor": None,
        "beta1": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.0,
        "eps": 1e-8,
        "amsgrad": False,
        "maximize": False,
        "decoupled_weight_decay": False,
        "grad_scale": None,
        "found_inf": None,
    }
    step = [torch.zeros(())]
    assert launches(lambda: ops.adam_(*tensors, [], step, [], **settings)) == 2
    assert last_grid() == MANY // 4096 + 1  # elements of a block


@pytest.mark.parametrize("name", ["batch_norm_relu", "batch_norm_add_relu"])
def test_batch_norm_refuses_what_it_could_not_count(launches, name):
    x = untouched(MANY // 8, 8)
    others = [x] if name == "batch_norm_add_relu" else []
    channels = [torch.zeros(8)] * 4
    settings = [True, 1e-5, *([True] if name == "batch_norm_relu" else [])]

    def call():
        with pytest.raises(RuntimeError, match=rf"^{name}: x has {MANY} elements; .* fewer than"):
            getattr(ops, name)(x, *others, *channels, *settings)

    assert launches(call) == 0


def test_image_batch(launches):
    images = untouched(2, 1024, 1024, 3, dtype=torch.uint8)
    numbers = torch.zeros(700, dtype=torch.int64)
    clock, scale = torch.zeros(2, dtype=torch.int64), torch.ones(3)
    labels = torch.zeros(2, dtype=torch.int64)
    fetch = images, labels, numbers, numbers, clock, 700, scale, scale, None, 0
    how = True, True, 0.0, "contiguous", torch.bfloat16
    assert 700 * 3 * MEBI > 2**31
    assert launches(lambda: ops.image_batch(*fetch, *how)) == 1


def test_conv2d_relu(launches):
    x = untouched(160, 13, 1024, 1024)
    weight = untouched(2, 13, 3, 3)
    assert x.numel() > 2**31
    geometry = [1, 1], [1, 1], [1, 1], 1
    result = []
    assert launches(lambda: result.append(ops.conv2d_relu(x, weight, None, *geometry))) == 1
    y = result[0]
    wanted = True, True, True
    backward = (y, y, x, weight, *geometry, *wanted)
    # The gradient of x, the partial sums of the other two, and their sums.
    assert launches(lambda: ops.conv2d_relu_backward(*backward)) == 3


def test_linear_relu(launches):
    x, weight = untouched(MEBI, 8), untouched(2056, 8)
    y = untouched(MEBI, 2056)
    assert y.numel() > 2**31
    wanted = False, False, True
    assert launches(lambda: ops.linear_relu_backward(y, y, x, weight, *wanted)) == 1


def test_image_batch_of_bytes(launches):
    images = untouched(2, 1024, 1024, 3, dtype=torch.uint8)
    numbers = torch.zeros(700, dtype=torch.int64)
    clock, scale = torch.zeros(2, dtype=torch.int64), torch.ones(3)
    labels = torch.zeros(2, dtype=torch.int64)
    fetch = images, labels, numbers, numbers, clock, 700, scale, scale, None, 0
    how = True, True, 0.0, "contiguous", torch.uint8
    assert launches(lambda: ops.image_batch(*fetch, *how)) == 1


def test_batch_norm_linear_of_bytes(launches):
    x = untouched(2**15 + 1, 2**16, dtype=torch.uint8)
    weight = untouched(7, 2**16, dtype=torch.float32)
    one, zero, vector = torch.ones(1), torch.zeros(1), torch.zeros(2**16)
    grad_output = torch.zeros(2**15 + 1, 7)
    others = None, None, None, None, None, True, 1e-5, one, zero
    assert launches(lambda: ops.batch_norm_linear(x, weight, *others)) == 2
    others = vector, vector, weight, None, None, 1e-5, one, zero
    assert launches(lambda: ops.batch_norm_linear_backward(grad_output, x, *others)) == 1


def test_batch_norm_linear(launches):
    x, weight = untouched(2**15 + 1, 2**16), untouched(7, 2**16, dtype=torch.float32)
    assert x.numel() > 2**31
    statistics = torch.zeros(2**16)
    result = []
    assert (
        launches(
            lambda: result.append(
                ops.batch_norm_linear(
                    x, weight, None, None, None, statistics, statistics, True, 1e-5
                )
            )
        )
        == 2
    )
