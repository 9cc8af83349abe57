"""Invented dermatoscopic photographs, for trying everything out without the real ones.

A lesion is drawn as light takes it: skin reflects, and pigments in it absorb. Melanin takes blue
most (brown), blood takes green (red), pigment deep in the skin takes red (blue-grey); scales and
scars reflect white. A class is a mean vector of ``TRAITS``: how much of each pigment, how patchy,
how ragged a border, dots, vessels, a pale centre. A lesion's own traits scatter about its class's
and lean towards a class that it is mistaken for, more or less far. So melanoma, nevus and benign
keratosis overlap as they do in life, and no classifier is right about all of them.

These pictures test programs, not diagnoses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from skinfast.data.classes import CLASSES, HAM10000_COUNTS
from skinfast.data.dataset import LesionDataset
from skinfast.errors import SkinfastError

Array = npt.NDArray[np.floating[Any]]

#: Every class has at least this many images, however few there are in all.
MINIMUM_PER_CLASS = 5

TRAITS = (
    "radius",  # of the lesion; the picture reaches from -1 to 1
    "ragged",  # how far the border strays from an ellipse
    "soft",  # width of the border's fading
    "melanin",
    "blood",
    "blue",
    "white",
    "patchy",  # how unevenly pigments are spread
    "network",  # strength of the fine pigment net
    "dark_dots",
    "pale_dots",
    "vessels",
    "pale_centre",
)

# fmt: off
_CLASS_TRAITS = {
    #          rad   rag   soft  mel   blood blue  white patch net   dark  pale  vess  centre
    "akiec": (0.55, 0.30, 0.22, 0.30, 0.60, 0.00, 0.25, 0.60, 0.05, 0.10, 0.20, 0.15, 0.00),
    "bcc":   (0.42, 0.28, 0.12, 0.12, 0.55, 0.20, 0.12, 0.45, 0.00, 0.55, 0.00, 0.80, 0.10),
    "bkl":   (0.46, 0.20, 0.06, 0.55, 0.05, 0.18, 0.18, 0.35, 0.05, 0.15, 0.75, 0.00, 0.00),
    "df":    (0.42, 0.12, 0.20, 0.40, 0.50, 0.00, 0.00, 0.20, 0.10, 0.00, 0.00, 0.05, 1.00),
    "mel":   (0.52, 0.36, 0.08, 1.15, 0.12, 0.60, 0.08, 0.65, 0.40, 0.35, 0.00, 0.05, 0.00),
    "nv":    (0.40, 0.12, 0.12, 0.95, 0.22, 0.04, 0.00, 0.25, 0.35, 0.10, 0.05, 0.00, 0.00),
    "vasc":  (0.34, 0.14, 0.06, 0.20, 1.70, 0.40, 0.00, 0.20, 0.00, 0.10, 0.00, 0.00, 0.00),
}
_SCATTER = np.array(
              (0.12, 0.08, 0.04, 0.20, 0.15, 0.12, 0.08, 0.14, 0.12, 0.15, 0.15, 0.15, 0.15)
)
# fmt: on

#: What each class is mistaken for.
_LOOKS_LIKE = {
    "akiec": ("bkl", "bcc"),
    "bcc": ("akiec", "df", "vasc"),
    "bkl": ("nv", "mel", "akiec"),
    "df": ("nv", "bcc"),
    "mel": ("nv", "nv", "bkl"),
    "nv": ("mel", "bkl", "df"),
    "vasc": ("bcc", "mel"),
}
#: How far a lesion leans towards the other class: Beta(1, 3), times this.
_LEAN = 0.6

# Absorbance of one unit of pigment for red, green and blue light.
_MELANIN = np.array((0.55, 1.05, 1.35), np.float32)
_BLOOD = np.array((0.22, 0.95, 0.70), np.float32)
_BLUE = np.array((1.00, 0.85, 0.55), np.float32)
_WHITE = np.array((0.93, 0.84, 0.83), np.float32)
_HAIR = np.array((0.26, 0.18, 0.15), np.float32)
# Skin between these: fair pink, lilac under the lamp, tan, brown.
_SKIN = np.array(((0.91, 0.71, 0.70), (0.82, 0.70, 0.76), (0.84, 0.64, 0.50), (0.66, 0.45, 0.36)))

# Of HAM10000's 10,015 images 7,470 are the first of their lesion, which is 1.34 images each.
_VIEWS = np.array((1, 2, 3))
_VIEWS_PROBABILITY = np.array((0.76, 0.15, 0.09))


class SyntheticLesions(LesionDataset):
    """``num_images`` invented photographs, in HAM10000's class proportions.

    Some lesions are photographed two or three times, from other angles and in other light, and
    share a lesion_id. The pictures follow from ``seed`` alone, bit for bit, and lesions look the
    same at every ``image_size``.

    Args:
        num_images: at least 5 for each of the seven classes: 35.
        image_size: side in pixels, 8 to 1024.
        seed: 0 or more.

    Raises:
        SkinfastError: an argument out of range.
    """

    def __init__(self, num_images: int = 3000, image_size: int = 64, seed: int = 0) -> None:
        if num_images < MINIMUM_PER_CLASS * len(CLASSES):
            raise SkinfastError(
                f"{num_images} synthetic images are too few for {len(CLASSES)} classes; "
                f"choose {MINIMUM_PER_CLASS * len(CLASSES)} or more"
            )
        if not 8 <= image_size <= 1024:
            raise SkinfastError(f"image size {image_size}: choose 8 to 1024")
        if seed < 0:
            raise SkinfastError(f"seed is {seed}; choose 0 or more")
        labels, lesions = _draw_lesions(num_images, np.random.default_rng([seed, 0]))
        images = np.empty((num_images, image_size, image_size, 3), np.uint8)
        for i, (label, lesion) in enumerate(zip(labels, lesions, strict=True)):
            # A generator of its own for each lesion and each view: image i needs no other image.
            drawn = _Lesion.draw(CLASSES[label], np.random.default_rng([seed, 1, lesion]))
            images[i] = _photograph(drawn, image_size, np.random.default_rng([seed, 2, i]))
        super().__init__(
            torch.from_numpy(images),
            torch.from_numpy(labels),
            image_ids=[f"SYN_{i:07d}" for i in range(num_images)],
            lesion_ids=[f"SYN_L{lesion:06d}" for lesion in lesions],
            source=f"synthetic images (seed {seed})",
        )


def class_sizes(num_images: int) -> dict[str, int]:
    """Share ``num_images`` out by HAM10000's proportions (largest remainder), 5 each at least."""
    counts = np.array([HAM10000_COUNTS[name] for name in CLASSES])
    quotas = num_images * counts / counts.sum()
    sizes = np.floor(quotas).astype(np.int64)
    for label in np.argsort(sizes - quotas)[: num_images - sizes.sum()]:
        sizes[label] += 1
    lifted = np.maximum(sizes, MINIMUM_PER_CLASS)
    # With few images the small classes are lifted at the cost of whichever is largest by then.
    while lifted.sum() > num_images:
        lifted[lifted.argmax()] -= 1
    return dict(zip(CLASSES, lifted.tolist(), strict=True))


def _draw_lesions(
    num_images: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Label and lesion number of every image, in shuffled order, int64 ``[N]`` each."""
    labels, lesions, first = [], [], 0
    for label, size in enumerate(class_sizes(num_images).values()):
        views = rng.choice(_VIEWS, size, p=_VIEWS_PROBABILITY)
        lesions.append(first + np.repeat(np.arange(size), views)[:size])
        labels.append(np.full(size, label))
        first += size
    order = rng.permutation(num_images)
    return np.concatenate(labels)[order], np.concatenate(lesions)[order]


@dataclass(frozen=True)
class _Waves:
    """A smooth random field: a sum of plane waves, mean 0, variance about 1, defined everywhere.

    Unlike noise on a grid it can be looked at from any angle and at any resolution.
    """

    frequency: Array  # [K, 2], radians per unit of length
    phase: Array  # [K]

    @classmethod
    def draw(cls, rng: np.random.Generator, low: float, high: float, count: int = 10) -> _Waves:
        angle = rng.uniform(0, 2 * np.pi, count)
        length = np.exp(rng.uniform(np.log(low), np.log(high), count))
        frequency = np.stack((length * np.cos(angle), length * np.sin(angle)), axis=1)
        phase = rng.uniform(0, 2 * np.pi, count)
        return cls(frequency.astype(np.float32), phase.astype(np.float32))

    def at(self, x: Array, y: Array) -> Array:
        total = np.zeros_like(x)
        for (fx, fy), phase in zip(self.frequency, self.phase, strict=True):
            total += np.sin(fx * x + fy * y + phase)
        return total * np.float32(np.sqrt(2 / len(self.phase)))


@dataclass(frozen=True)
class _Lesion:
    """What stays the same from one photograph of a lesion to the next."""

    traits: dict[str, float]
    skin: Array  # [3]
    elongation: float
    border: Array  # [2, K]: cosine and sine amplitudes of the border's harmonics 2 to K + 1
    fringe: _Waves
    patches: _Waves
    second_patches: _Waves
    grain: _Waves
    skin_grain: _Waves
    dots: (
        Array  # [D, 4]: x, y, radius, and a rank from 0 to 1: the more dots, the higher ranks show
    )
    vessels: Array  # [V, 3]: centre x, y and radius of the circle that the vessel is an arc of

    @classmethod
    def draw(cls, name: str, rng: np.random.Generator) -> _Lesion:
        own = np.array(_CLASS_TRAITS[name])
        other = np.array(_CLASS_TRAITS[str(rng.choice(_LOOKS_LIKE[name]))])
        lean = _LEAN * rng.beta(1, 3)
        mean = (1 - lean) * own + lean * other
        # Scatter shrinks where there is little to scatter: absence of a sign is a sign.
        values = mean + rng.normal(size=len(mean)) * _SCATTER * np.minimum(1, 0.3 + mean)
        traits = dict(zip(TRAITS, np.maximum(values, 0).tolist(), strict=True))
        traits["radius"] = max(traits["radius"], 0.15)
        harmonics = np.arange(2, 6)
        border = rng.normal(size=(2, len(harmonics))) * (0.1 + 0.5 * traits["ragged"]) / harmonics
        a, b = _SKIN[rng.choice(len(_SKIN), 2, p=(0.45, 0.3, 0.2, 0.05))]
        skin = a + rng.uniform() * (b - a) + rng.normal(size=3) * 0.02
        spread = rng.normal(size=(24, 2)) * 0.7 * traits["radius"]
        dots = np.column_stack((spread, rng.uniform(0.02, 0.06, 24), np.linspace(0.05, 1, 24)))
        turn, bend = rng.uniform(0, 2 * np.pi, 5), rng.uniform(0.3, 1.2, 5)
        offset = bend + rng.normal(size=5) * 0.25
        vessels = np.column_stack((offset * np.cos(turn), offset * np.sin(turn), bend))
        return cls(
            traits=traits,
            skin=skin.astype(np.float32),
            elongation=float(np.exp(rng.normal() * 0.18)),
            border=border.astype(np.float32),
            fringe=_Waves.draw(rng, 4, 22),
            patches=_Waves.draw(rng, 3, 16),
            second_patches=_Waves.draw(rng, 3, 14),
            grain=_Waves.draw(rng, 22, 60, count=18),
            skin_grain=_Waves.draw(rng, 3, 60, count=18),
            dots=dots.astype(np.float32),
            vessels=vessels.astype(np.float32),
        )


def _photograph(
    lesion: _Lesion, image_size: int, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """One view of a lesion, uint8 ``[image_size, image_size, 3]``."""
    axis = (np.arange(image_size, dtype=np.float32) + 0.5) * (2 / image_size) - 1
    screen_y, screen_x = np.meshgrid(axis, axis, indexing="ij")
    shift_x, shift_y = rng.normal(size=2).astype(np.float32) * 0.14
    angle, zoom = rng.uniform(0, 2 * np.pi), np.exp(rng.normal() * 0.08)
    cos, sin = np.float32(np.cos(angle) / zoom), np.float32(np.sin(angle) / zoom)
    x = cos * (screen_x - shift_x) + sin * (screen_y - shift_y)
    y = cos * (screen_y - shift_y) - sin * (screen_x - shift_x)

    picture = _draw_lesion(lesion, x, y)
    _add_hairs(picture, screen_x, screen_y, rng)
    _add_light(picture, screen_x, screen_y, rng)
    picture += rng.normal(size=picture.shape).astype(np.float32) * np.float32(
        rng.uniform(0.006, 0.02)
    )
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _draw_lesion(lesion: _Lesion, x: Array, y: Array) -> Array:
    """Skin with the lesion on it, in even light: float32 ``[H, W, 3]``, 1 is white."""
    t = lesion.traits
    stretched_x, stretched_y = x * lesion.elongation, y / lesion.elongation
    distance = np.hypot(stretched_x, stretched_y)
    border = np.full_like(x, t["radius"])
    turn = np.arctan2(stretched_y, stretched_x)
    for k, (a, b) in enumerate(lesion.border.T, start=2):
        border += t["radius"] * (a * np.cos(k * turn) + b * np.sin(k * turn))
    patches = lesion.patches.at(x, y)
    border += 0.7 * t["ragged"] * t["radius"] * lesion.fringe.at(x, y)
    inside = _step((border - distance) / (0.02 + 0.5 * t["soft"]))

    uneven = np.exp(t["patchy"] * patches - 0.5 * t["patchy"] ** 2)
    second = _step(lesion.second_patches.at(x, y) - 0.3, 3.0)
    grain = lesion.grain.at(x, y)
    melanin = t["melanin"] * uneven * np.maximum(1 + 0.6 * t["network"] * grain, 0)
    blood = t["blood"] * (1 - t["patchy"] * 0.5 + t["patchy"] * second)
    blue = t["blue"] * second * 1.6
    pale = 0.6 * t["white"] * _step(grain - 0.8, 4.0)
    for dot_x, dot_y, radius, rank in lesion.dots:
        spot = _step(1 - ((x - dot_x) ** 2 + (y - dot_y) ** 2) / radius**2, 2.0)
        if rank < t["dark_dots"]:
            blue = blue + 0.7 * spot
        elif 1 - rank < t["pale_dots"]:
            pale = pale + 0.5 * spot
    for centre_x, centre_y, radius in lesion.vessels:
        line = np.abs(np.hypot(x - centre_x, y - centre_y) - radius)
        blood = blood + 0.9 * t["vessels"] * _step(1 - line / 0.025, 2.0)
    centre = np.exp(-((distance / (0.45 * t["radius"])) ** 2))
    pale = pale + 0.75 * t["pale_centre"] * centre
    melanin = melanin * (1 - 0.6 * np.minimum(t["pale_centre"], 1) * centre)

    absorbed = (
        (inside * melanin)[..., None] * _MELANIN
        + (inside * blood)[..., None] * _BLOOD
        + (inside * blue)[..., None] * _BLUE
    )
    skin = lesion.skin * (1 + 0.02 * lesion.skin_grain.at(x, y))[..., None]
    picture = skin * np.exp(-absorbed)
    covered = np.clip(inside * pale, 0, 0.8)[..., None]
    return (picture + covered * (_WHITE - picture)).astype(np.float32)


def _add_hairs(picture: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    if rng.uniform() > 0.25:
        return
    for _ in range(rng.integers(1, 7)):
        radius, turn = rng.uniform(1.0, 5), rng.uniform(0, 2 * np.pi)
        offset = radius + rng.normal() * 0.7
        arc = np.hypot(x - offset * np.cos(turn), y - offset * np.sin(turn)) - radius
        cover = rng.uniform(0.2, 0.7) * _step(1 - np.abs(arc) / rng.uniform(0.008, 0.02), 3.0)
        picture += cover[..., None].astype(np.float32) * (_HAIR - picture)


def _add_light(picture: Array, x: Array, y: Array, rng: np.random.Generator) -> None:
    """The lamp's strength, tint and slope; sometimes the dark edge of the dermatoscope's tube."""
    tint = 1 + rng.normal(size=3) * 0.05
    slope_x, slope_y = rng.normal(size=2) * 0.05
    lamp = rng.normal(1.0, 0.08) + slope_x * x + slope_y * y - 0.06 * (x**2 + y**2)
    if rng.uniform() < 0.3:
        lamp = lamp * (0.06 + 0.94 * _step((rng.uniform(1.12, 1.4) - np.hypot(x, y)) / 0.05))
    picture *= (lamp[..., None] * tint).astype(np.float32)


def _step(value: Array, steepness: float = 1.0) -> Array:
    """From 0 to 1, smoothly: the logistic function, in a form that cannot overflow."""
    return 0.5 * (1 + np.tanh(0.5 * steepness * value))
