"""Test-time augmentation: the mean of probabilities, the same for every view of an image."""

import torch

from skinfast.evaluation.test_time_augmentation import MeanOverViews, dihedral_views
from skinfast.models import build_model


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


def test_dihedral_views_are_the_eight_symmetries_of_the_square():
    images = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    given = images.contiguous(memory_format=torch.channels_last)
    views = dihedral_views(given)
    assert torch.equal(views[0], images)
    assert all(view.stride() == given.stride() for view in views)
    symmetries = {view[0].numpy().tobytes() for view in (v.contiguous() for v in views)}
    assert len(symmetries) == 8
    # Closed under a further turn and under mirroring.
    for change in (lambda x: torch.rot90(x, 1, (1, 2)), lambda x: x.flip(2), lambda x: x.flip(1)):
        assert {change(v[0]).contiguous().numpy().tobytes() for v in views} == symmetries
