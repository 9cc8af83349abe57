"""The three models against their pure PyTorch twins."""

import pytest
import torch

from skinfast.errors import SkinfastError
from skinfast.models import MODELS, build_model, cnn, logistic_regression, resnet50
from skinfast.nn import CrossEntropyLoss
from skinfast.testing import devices


def twins(name, image_size, dtype=torch.float64, device="cpu"):
    models = []
    for backend in ("skinfast", "torch"):
        torch.manual_seed(0)
        models.append(build_model(name, image_size=image_size, backend=backend).to(device, dtype))
    return models


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize(
    ("name", "image_gradient"), [*((name, True) for name in MODELS), ("logistic-regression", False)]
)
def test_outputs_and_all_gradients_equal_pure_pytorch(name, image_gradient, image_size, device):
    generator = torch.Generator().manual_seed(1)
    # Eight, since layer 4 of ResNet-50 has 1x1 maps at 32x32: its batch norms over two or three
    # values amplify the last bit of a float64 by many orders of magnitude.
    images = torch.randn(8, 3, image_size, image_size, generator=generator, dtype=torch.float64)
    labels = torch.arange(8, device=device) % 7
    results = []
    for model in twins(name, image_size, device=device):
        x = images.to(device).requires_grad_(image_gradient)
        logits = model(x)
        loss = CrossEntropyLoss()(logits, labels)
        wanted = [x, *model.parameters()] if image_gradient else list(model.parameters())
        gradients = torch.autograd.grad(loss, wanted)
        results.append([logits, *gradients, *model.buffers()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_mode_equals_pure_pytorch(name):
    ours, theirs = twins(name, 32)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for model in (ours, theirs):
        model(x)  # moves the running statistics away from their start
        model.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_float32_loss_equals_pure_pytorch(name):
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 7
    ours, theirs = (
        torch.nn.functional.cross_entropy(model(x), labels)
        for model in twins(name, 32, torch.float32)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_state_dicts_are_interchangeable(name):
    ours, theirs = twins(name, 32)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_resnet50_has_torchvisions_keys_and_size():
    state = resnet50(num_classes=1000).state_dict()
    # 53 convolutions, 53 batch norms of 5 tensors, a dense layer of 2.
    assert len(state) == 53 + 53 * 5 + 2
    assert sum(p.numel() for p in resnet50(num_classes=1000).parameters()) == 25_557_032
    for key, shape in {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.0.downsample.1.num_batches_tracked": (),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer3.5.bn3.bias": (1024,),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        "fc.weight": (1000, 2048),
    }.items():
        assert tuple(state[key].shape) == shape, key


@pytest.mark.parametrize(("image_size", "flattened"), [(64, 40), (32, 10), (24, 10), (65, 40)])
def test_cnn_flattens_to_the_papers_sizes(image_size, flattened):
    model = cnn(image_size=image_size)
    assert model.fc1.in_features == flattened
    assert model(torch.randn(2, 3, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize("image_size", [32, 33, 64, 96])
def test_resnet50_takes_any_image_size(image_size):
    model = resnet50().eval()
    assert model(torch.randn(1, 3, image_size, image_size)).shape == (1, 7)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cnn(image_size=23), "image_size is 23; the CNN's three pools need at least 24"),
        (lambda: logistic_regression(image_size=0), "image_size is 0"),
        (lambda: build_model("vgg"), "there is no model 'vgg'; choose one of resnet50, cnn"),
        (lambda: resnet50(backend="jax"), "backend is 'jax'"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(SkinfastError, match=message):
        build()


def test_resnet50_without_skip_connections_is_the_same_but_for_them():
    torch.manual_seed(0)
    plain = resnet50(image_size=32, skip_connections=False)
    with_skips = resnet50(image_size=32).state_dict()
    assert plain.state_dict().keys() == {k for k in with_skips if "downsample" not in k}
    assert all(t.shape == with_skips[k].shape for k, t in plain.state_dict().items())
    assert sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in plain.modules()) == 50


def test_resnet50_without_skip_connections_equals_pure_pytorch():
    results = []
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    for backend in ("skinfast", "torch"):
        torch.manual_seed(0)
        model = resnet50(image_size=32, backend=backend, skip_connections=False).double()
        logits = model(x)
        gradients = torch.autograd.grad(logits.square().mean(), list(model.parameters())[-60:])
        results.append([logits, *gradients])
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


def test_a_plain_block_is_three_layers_one_after_the_other():
    block = resnet50(image_size=32, backend="torch", skip_connections=False).layer1[1].eval()
    x = torch.randn(2, 256, 4, 4)
    expected = x
    for k in "123":
        norm = getattr(block, f"bn{k}")
        expected = torch.relu(
            torch.nn.functional.batch_norm(
                getattr(block, f"conv{k}")(expected), norm.running_mean, norm.running_var
            )
        )
    torch.testing.assert_close(block(x), expected)
