"""How kernels are launched, on a GPU: streams, graphs, devices, repeated runs."""

import pytest
import torch

from skinfast.ops import add_relu
from skinfast.testing import dtypes, map_tensors, op_modules

OPS = list(op_modules())
# A tenth of a second or so: a kernel on another stream would not wait for it.
DELAY_CYCLES = 200_000_000


def samples(name, dtype=torch.float32, device="cuda"):
    return list(op_modules()[name].sample_inputs(device, dtype))


def inputs_of(sample):
    values = [*sample.args, *sample.kwargs.values()]
    return [v for v in values if isinstance(v, torch.Tensor)]


class Call:
    """An op forward and backward, with the gradient that comes in made beforehand."""

    def __init__(self, name, sample):
        self._function = getattr(op_modules()[name], name)
        self._sample = sample
        self._wanted = [t for t in inputs_of(sample) if t.requires_grad]
        generator = torch.Generator().manual_seed(1)
        self._grads = [
            torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
            for y in self._outputs()
            if y.requires_grad
        ]

    def _outputs(self):
        result = self._function(*self._sample.args, **self._sample.kwargs)
        return result if isinstance(result, tuple) else (result,)

    def __call__(self):
        outputs = self._outputs()
        differentiable = [y for y in outputs if y.requires_grad]
        grads = ()
        if differentiable and self._wanted:
            grads = torch.autograd.grad(differentiable, self._wanted, self._grads)
        return [y.detach() for y in outputs] + list(grads)


def assert_equal(actual, expected, what=""):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{what}: result {i}"


@pytest.fixture
def deterministic(monkeypatch):
    """What PyTorch's own ops need as well for two runs to be equal; fresh memory is NaN."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_current_stream(name, deterministic):
    for sample in samples(name):
        expected = Call(name, sample)()
        late = map_tensors(sample, lambda t: torch.zeros_like(t).requires_grad_(t.requires_grad))
        call = Call(name, late)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            torch.cuda._sleep(DELAY_CYCLES)
            for to, value in zip(inputs_of(late), inputs_of(sample), strict=True):
                to.copy_(value)
            with torch.enable_grad():
                actual = call()
        stream.synchronize()
        assert_equal(actual, expected, sample.name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_a_graph_replays_it_on_other_values(name, dtype, deterministic):
    for sample in samples(name, dtype):
        static = map_tensors(sample, lambda t: t.detach().clone().requires_grad_(t.requires_grad))
        call = Call(name, static)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        with torch.no_grad():
            for tensor in inputs_of(static):
                if tensor.is_floating_point():
                    tensor.mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        assert_equal(captured, call(), sample.name)


@pytest.mark.parametrize("dtype", dtypes("cuda"), ids=str)
@pytest.mark.parametrize("name", OPS)
def test_ten_runs_are_equal_to_the_bit(name, dtype, deterministic):
    for sample in samples(name, dtype):
        call = Call(name, sample)
        first = call()
        for _ in range(9):
            assert_equal(call(), first, sample.name)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("name", OPS)
def test_tensors_on_another_device_than_the_current_one(name, deterministic):
    for sample in samples(name):
        other = map_tensors(
            sample, lambda t: t.detach().to("cuda:1").requires_grad_(t.requires_grad)
        )
        results = Call(name, other)()
        assert all(result.device == torch.device("cuda:1") for result in results)
        assert_equal([r.to("cuda:0") for r in results], Call(name, sample)(), sample.name)
        assert torch.cuda.current_device() == 0


# Threads of the largest grid (grid_for in csrc/core/cuda.h); each takes up to 8 elements at once.
GRID = 132 * 16 * 256


@pytest.mark.parametrize("beyond", [-1, 0, 1, 7, 8, 9])
@pytest.mark.parametrize("width", [1, 4, 8])
def test_loops_go_on_where_the_grid_ends(width, beyond):
    x, residual = torch.randn(2, GRID * width + beyond, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(add_relu(x, residual), torch.relu(x.float() + residual.float()).bfloat16())
    assert torch.equal(add_relu(x[1:], residual[1:]), add_relu(x, residual)[1:])
