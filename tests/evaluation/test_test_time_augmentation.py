"""Test-time augmentation: the mean of probabilities, the same for every view of an image."""

import torch

from skinfast.evaluation.test_time_augmentation import MeanOverViews
from skinfast.models import build_model
from skinfast.training.augmentation import dihedral_views


def test_probabilities_are_the_mean_over_the_views():
    torch.manual_seed(0)
    model = build_model("cnn", image_size=32).eval()
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        by_view = [torch.softmax(model(view), 1) for view in dihedral_views(images)]
        mean = torch.softmax(MeanOverViews(model)(images), 1)
    torch.testing.assert_close(mean, torch.stack(by_view).mean(0))
    assert not torch.allclose(mean, by_view[0], atol=1e-5)


def test_every_view_gets_the_same_answer():
    torch.manual_seed(0)
    model = MeanOverViews(build_model("cnn", image_size=32))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        first, *others = [model(view) for view in dihedral_views(images)]
    for other in others:
        torch.testing.assert_close(first, other)


def test_batch_norm_counts_no_view_as_a_batch():
    model = build_model("logistic-regression", image_size=8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    MeanOverViews(model.train())(torch.randn(4, 3, 8, 8))
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
