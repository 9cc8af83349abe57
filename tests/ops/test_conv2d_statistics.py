"""conv2d_statistics: its two parts, what has a gradient, who uses it, bad input."""

import copy

import pytest
import torch

import skinfast.nn
from skinfast.models import build_model
from skinfast.ops import conv2d, conv2d_statistics
from skinfast.ops.conv2d_statistics import is_chosen
from skinfast.testing import RecordOps

ONES = torch.ones
LAST = torch.channels_last


def arguments(dtype=torch.float32, layout=LAST):
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 32, 3, 3), (40, 32, 1, 1)]
    return [
        torch.randn(shape, generator=generator)
        .to(dtype)
        .contiguous(memory_format=layout)
        .requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_conv2d_and_the_moments_of_its_output(dtype, layout):
    x, weight = arguments(dtype, layout)
    output, statistics = conv2d_statistics(x, weight)
    assert torch.equal(output, conv2d(x, weight))
    assert output.is_contiguous(memory_format=layout)
    assert statistics.dtype == torch.promote_types(dtype, torch.float32)
    values = output.detach().double().transpose(0, 1).flatten(1)
    expected = torch.stack([values.mean(1), values.var(1, correction=0)])
    torch.testing.assert_close(statistics.double(), expected, rtol=1e-5, atol=1e-6)


def test_statistics_have_no_gradient_and_the_output_has_conv2ds():
    x, weight = arguments()
    output, statistics = conv2d_statistics(x, weight)
    assert not statistics.requires_grad
    grad = torch.randn(output.shape)
    ours = torch.autograd.grad(output, [x, weight], grad)
    theirs = torch.autograd.grad(conv2d(x, weight), [x, weight], grad)
    assert all(map(torch.equal, ours, theirs))


def test_only_the_wanted_gradients_are_computed():
    x, weight = arguments()
    x.requires_grad_(False)
    conv2d_statistics(x, weight)[0].sum().backward()
    assert weight.grad is not None and x.grad is None


def test_is_chosen_nowhere_but_on_a_gpu(monkeypatch):
    monkeypatch.setenv("SKINFAST_CONV2D", "persistent128x64")
    x, weight = (t.bfloat16() for t in arguments())
    for of_gradient in (False, True):
        assert not is_chosen(x, weight, (1, 1), (0, 0), (1, 1), 1, of_gradient=of_gradient)


@pytest.mark.parametrize("of_gradient", [False, True])
def test_the_table_of_choices_is_asked_with_the_convolutions_sizes(of_gradient):
    from skinfast import _host

    def chooses(wish, *, r=1, stride=1, channels=64):
        padding = r // 2
        side = (16 + 2 * padding - r) // stride + 1
        sizes = (256, channels, 16, 16, 256, r, r, side, side, stride, stride, padding, padding)
        return _host.chooses_conv2d_statistics(wish, "a device", sizes, of_gradient)

    assert chooses("persistent128x64")
    assert not chooses("")  # the table has no such device
    assert not chooses("tile128x64") and not chooses("cudnn") and not chooses("persistent128x128")
    assert not chooses("persistent128x64", r=3) and not chooses("persistent128x64", stride=2)
    assert not chooses("persistent128x64", channels=60)


def small_resnet(dtype=torch.float64):
    torch.manual_seed(0)
    model = build_model("resnet50", image_size=32).to(dtype).train()
    model.layer2, model.layer3, model.layer4 = model.layer2[:1], model.layer3[:1], model.layer4[:1]
    return model


def one_step(model):
    """Logits, gradients and running statistics."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    logits = model(images.contiguous(memory_format=LAST))
    logits.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), **gradients, **dict(model.named_buffers())}


@pytest.mark.parametrize("wanted", [{False}, {True}, {False, True}], ids=str)
def test_a_model_whose_convolutions_give_statistics_and_sums_is_the_same(monkeypatch, wanted):
    """Of six blocks, in training: of the outputs, of the gradients of inputs, or of both."""
    model = small_resnet()
    plain = one_step(copy.deepcopy(model))
    asked = []

    def chosen(input, weight, stride, padding, dilation, groups, of_gradient):
        asked.append(of_gradient)
        return weight.shape[2] == 1 and of_gradient in wanted

    monkeypatch.setattr(skinfast.nn, "conv2d_statistics_is_chosen", chosen)
    with RecordOps() as record:
        fused = one_step(model)
    names = [call[0]._schema.name.removeprefix("skinfast::") for call in record.calls]
    sums = 6 if True in wanted else 0
    statistics = 12 if False in wanted else 0  # both 1x1 convolutions of a block
    assert names.count("batch_norm_relu_conv2d") == sums
    assert names.count("batch_norm_relu_conv2d_backward") == sums
    assert names.count("conv2d_statistics") == (6 if len(wanted) == 2 else statistics)
    assert len(asked) == 4 * 6
    assert fused.keys() == plain.keys()
    for name, value in fused.items():
        torch.testing.assert_close(value, plain[name], msg=lambda m, n=name: f"{n}: {m}")
    model.eval()(torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    assert len(asked) == 4 * 6


@pytest.mark.parametrize("name", ["bn2", "conv3"])
@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_a_module_with_a_hook_is_called(monkeypatch, name, register):
    monkeypatch.setattr(skinfast.nn, "conv2d_statistics_is_chosen", lambda *_, **__: True)
    model = small_resnet()
    calls = []
    for block in (model.layer1[0], model.layer2[0]):
        getattr(getattr(block, name), register)(lambda *args: calls.append(args[0]))
    one_step(model)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((ONES(1, 4, 8, 8), ONES(10, 3, 1, 1)), "input has 4 channels and needs"),
        ((ONES(1, 3, 8, 8), ONES(10, 3, 1, 1).double()), "weight has dtype float64 and input has"),
    ],
)
def test_bad_input_is_refused_by_name(args, message):
    with pytest.raises(RuntimeError, match=f"^conv2d_statistics: .*{message}"):
        conv2d_statistics(*args)
