"""ResNet-50 with batch norm folded into its convolutions, against the model as it was trained."""

import pytest
import torch

from skinfast.errors import SkinfastError
from skinfast.models import build_model, cnn, fold_batch_norm, resnet50
from skinfast.testing import RecordOps, devices


def trained(dtype=torch.float32, device="cpu", **arguments):
    """ResNet-50 in evaluation mode with the statistics, scales and shifts of a trained one."""
    torch.manual_seed(0)
    model = resnet50(image_size=32, **arguments).to(device, dtype)
    for name, parameter in model.named_parameters():
        if "bn" in name or "downsample.1" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    with torch.no_grad():
        for _ in range(3):  # moves the statistics to where the maps are
            model(torch.randn(8, 3, 32, 32, dtype=dtype, device=device))
    return model.eval()


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("skip_connections", [True, False])
@pytest.mark.parametrize("backend", ["skinfast", "torch"])
def test_logits_are_those_of_the_unfolded_model(backend, skip_connections, device):
    model = trained(torch.float64, device, skip_connections=skip_connections)
    images = torch.randn(4, 3, 64, 48, dtype=torch.float64, device=device)
    folded = fold_batch_norm(model, backend)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_it_is_as_near_to_float64_as_the_unfolded_model(dtype, device):
    model = trained(torch.float64, device)
    images = torch.randn(16, 3, 32, 32, dtype=torch.float64, device=device)
    exact = model(images)
    model = model.to(dtype)
    # Measured over six seeds: 1.1 to 1.3 times the unfolded model's error in float32, 0.9 to 1.1
    # times in bfloat16.
    ours, theirs = (
        (m(images.to(dtype)).double() - exact).norm().item()
        for m in (fold_batch_norm(model), model)
    )
    assert 0 < ours <= 2 * theirs


def test_no_batch_norm_is_computed_and_residuals_are_fused():
    folded = fold_batch_norm(trained())
    with RecordOps() as record:
        folded(torch.randn(2, 3, 32, 32))
    names = [overload._schema.name.removeprefix("skinfast::") for overload, _, _ in record.calls]
    assert {name: names.count(name) for name in set(names)} == {
        "conv2d": 4,
        "conv2d_relu": 33,
        "conv2d_add_relu": 16,
        "global_average_pool2d": 1,
        "max_pool2d": 1,
    }


def test_the_model_is_left_alone_and_the_copy_asks_for_no_gradient():
    model = trained()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batch_norm(model)
    for parameter in folded.parameters():
        parameter.zero_()
        assert not parameter.requires_grad
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_weights_keep_their_layout():
    folded = fold_batch_norm(build_model("resnet50", image_size=32).eval())
    assert folded.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: resnet50(), "the model is in training mode"),
        (lambda: cnn().eval(), r"needs a model of skinfast\.models\.resnet50; got"),
    ],
)
def test_what_cannot_be_folded_is_refused(build, message):
    with pytest.raises(SkinfastError, match=message):
        fold_batch_norm(build())
