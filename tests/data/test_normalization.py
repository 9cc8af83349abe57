from __future__ import annotations

import numpy as np
import pytest
import torch

from skinfast.data import channel_statistics, normalization
from skinfast.errors import SkinfastError

IMAGES = torch.from_numpy(
    np.random.default_rng(0).integers(0, [100, 200, 256], (20, 9, 9, 3)).astype(np.uint8)
)


@pytest.mark.parametrize("indices", [None, [3], [5, 1, 19], np.arange(0, 20, 2)])
@pytest.mark.parametrize("chunk", [1, 200, 1 << 22])
def test_equal_to_numpy_in_float64(
    indices: object, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(normalization, "_CHUNK_PIXELS", chunk)
    mean, std = channel_statistics(IMAGES, indices)
    chosen = IMAGES.numpy()[slice(None) if indices is None else indices].reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, chosen.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, chosen.std(0), rtol=1e-12)


def test_order_changes_not_one_bit() -> None:
    assert channel_statistics(IMAGES) == channel_statistics(IMAGES.flip(0).transpose(1, 2))


def test_one_colour() -> None:
    mean, std = channel_statistics(torch.full((2, 8, 8, 3), 51, dtype=torch.uint8))
    assert mean == (0.2, 0.2, 0.2)
    assert std == (0.0, 0.0, 0.0)


def test_refusals() -> None:
    with pytest.raises(SkinfastError, match=r"give uint8 \[N, H, W, 3\]"):
        channel_statistics(IMAGES.float())
    with pytest.raises(SkinfastError, match="at least one image; the set is empty"):
        channel_statistics(IMAGES, [])
