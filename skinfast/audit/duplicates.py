"""Photographs that are there twice: byte for byte, or nearly."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from skinfast.data.layouts import Record

#: Correlation of two images' pixels from which they count as nearly identical. Measured on
#: HAM10000 at 64x64: of the candidates above 0.98 at least 97% show one lesion by the metadata, of
#: those between 0.97 and 0.98 about half, below 0.95 nearly none.
NEAR_IDENTICAL = 0.98
# Hash distance up to which a pair becomes a candidate, of 63 bits.
_HASH_RADIUS = 6
# Of the neighbours' features, which see less detail than the pixels and so correlate more.
_FEATURE_RADIUS = float(np.sqrt(2 * (1 - NEAR_IDENTICAL)))
_FEATURE_SIDE = 16
_COMPONENTS = 64
_PAIRS_AT_ONCE = 1024

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Pair:
    """Two images that are the same photograph, or nearly.

    Attributes:
        first, second: their positions, ``first < second``.
        identical: byte for byte (where images lie in an array: pixel for pixel).
        correlation: of the pixels, each colour's mean taken off, in the best orientation.
        hash_distance: bits of 63 in which the perceptual hashes differ.
        turned: quarter turns of the first against the clock that show it as the second.
        mirrored: the first is mirrored left to right before it is turned.
    """

    first: int
    second: int
    identical: bool
    correlation: float
    hash_distance: int
    turned: int
    mirrored: bool


def find_pairs(images: Images, records: Sequence[Record] | None) -> list[Pair]:
    """All pairs of identical and nearly identical images, the most alike first.

    Candidates are images whose perceptual hashes differ in few bits, and neighbours in a space of
    principal components of small, normalised images, in all eight orientations (a projection only
    brings points nearer, so it loses no neighbour). A candidate counts as a pair when its pixels
    correlate by ``NEAR_IDENTICAL`` or more, in whichever orientation. Light and contrast may
    differ; another photograph of the same lesion, from another angle, is no pair.

    Args:
        images: uint8 ``[N, H, W, 3]``, H = W a multiple of 32.
        records: of the N images, whose files are compared; None compares pixels.
    """
    identical = {
        (first, second)
        for same in _identical_groups(images, records)
        for k, first in enumerate(same)
        for second in same[k + 1 :]
    }
    hashes = perceptual_hashes(images)
    candidates: dict[tuple[int, int], set[int]] = defaultdict(set)
    for pair in identical:
        candidates[pair].add(0)
    for pair in _neighbours(hashes.astype(np.float32), None, _HASH_RADIUS**0.5 + 1e-3):
        candidates[pair].add(0)
    small = _shrink(images, _FEATURE_SIDE)
    features = _Features(small)
    here = features(small)
    for orientation in range(8):
        there = features(np.stack([oriented(image, orientation) for image in small]))
        for first, second in _neighbours(here, there, 1.05 * _FEATURE_RADIUS):
            candidates[first, second].add(orientation)
    best: dict[tuple[int, int], tuple[float, int]] = {}
    asked = [(*pair, o) for pair, found in sorted(candidates.items()) for o in sorted(found)]
    for start in range(0, len(asked), _PAIRS_AT_ONCE):
        part = asked[start : start + _PAIRS_AT_ONCE]
        turned = np.stack([oriented(images[first], o) for first, _, o in part])
        values = correlation(turned, images[[second for _, second, _ in part]])
        for (first, second, o), value in zip(part, values.tolist(), strict=True):
            if value > best.get((first, second), (-2.0, 0))[0]:
                best[first, second] = value, o
    pairs = [
        Pair(
            first,
            second,
            (first, second) in identical,
            value,
            int((hashes[first] != hashes[second]).sum()),
            o % 4,
            o >= 4,
        )
        for (first, second), (value, o) in best.items()
        if value >= NEAR_IDENTICAL or (first, second) in identical
    ]
    return sorted(pairs, key=lambda p: (not p.identical, -p.correlation, p.first, p.second))


def perceptual_hashes(images: Images) -> npt.NDArray[np.bool_]:
    """The signs, about their median, of the 63 lowest frequencies of the grey image: ``[N, 63]``.

    The usual "pHash": the discrete cosine transform of the image at 32x32, its 8x8 lowest
    frequencies without the mean.
    """
    from scipy.fft import dctn

    grey = _shrink(images, 32) @ np.array([0.299, 0.587, 0.114], np.float32)
    lowest = dctn(grey, axes=(1, 2))[:, :8, :8].reshape(len(images), 64)[:, 1:]
    return np.asarray(lowest > np.median(lowest, axis=1, keepdims=True))


def oriented(image: npt.NDArray[np.generic], orientation: int) -> npt.NDArray[np.generic]:
    """One of the eight orientations of ``[H, W, 3]``: turned by quarters, from 4 on mirrored."""
    return np.rot90(image[:, ::-1] if orientation >= 4 else image, orientation % 4)


def correlation(
    first: npt.NDArray[np.generic], second: npt.NDArray[np.generic]
) -> npt.NDArray[np.float64]:
    """The correlation of images ``[N, H, W, 3]`` with others, pair by pair, in -1 to 1: ``[N]``.

    Each colour's mean is taken off. An image of one colour correlates with nothing: 0.
    """
    a, b = (normalised(x) for x in (first, second))
    return np.asarray(np.einsum("nk,nk->n", a, b, dtype=np.float64))


def normalised(images: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """Images as vectors of length 1 with each colour's mean taken off: ``[N, 3 * H * W]``."""
    values = images.astype(np.float32)
    values = (values - values.mean(axis=(1, 2), keepdims=True)).reshape(len(images), -1)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    # An image of one colour has rounding errors for a length.
    return np.where(length > 1e-2, values / np.maximum(length, 1e-2), 0)


class _Features:
    """Principal components of normalised small images."""

    def __init__(self, small: npt.NDArray[np.float32]) -> None:
        from sklearn.decomposition import PCA

        vectors = normalised(small)
        components = min(_COMPONENTS, *vectors.shape)
        solver = "full" if components == min(vectors.shape) else "randomized"
        self._pca = PCA(components, svd_solver=solver, random_state=0).fit(vectors)

    def __call__(self, small: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.asarray(self._pca.transform(normalised(small)))


def _shrink(images: Images, side: int) -> npt.NDArray[np.float32]:
    """Means over blocks of pixels: float32 ``[N, side, side, 3]``."""
    block = images.shape[1] // side
    blocks = images.reshape(len(images), side, block, side, block, 3)
    return np.asarray(blocks.mean(axis=(2, 4), dtype=np.float32))


def _neighbours(
    points: npt.NDArray[np.float32], queries: npt.NDArray[np.float32] | None, radius: float
) -> Iterator[tuple[int, int]]:
    """Pairs (i, j), i < j, where query i lies within ``radius`` of point j."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(radius=radius, algorithm="brute").fit(points)
    found = search.radius_neighbors(points if queries is None else queries, return_distance=False)
    for i, near in enumerate(found):
        yield from ((i, int(j)) for j in near if i < j)


def _identical_groups(images: Images, records: Sequence[Record] | None) -> list[list[int]]:
    groups: defaultdict[bytes, list[int]] = defaultdict(list)
    for i in range(len(images)):
        record = None if records is None else records[i]
        if record is None or record.row is not None or record.path is None:
            content = images[i].tobytes()
        else:
            content = record.path.read_bytes()
        groups[hashlib.sha256(content).digest()].append(i)
    return [group for group in groups.values() if len(group) > 1]
