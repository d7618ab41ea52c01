"""Say which colours a picture shows: of its background, and of the object on it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scripts.demo_base import scenes

_BORDER_PX = 5
_UNLIKE = 60.0  # RGB distance from the background above which a pixel belongs to the object
_FEWEST_PIXELS = 60

Pixels = NDArray[np.float32]


def background_colour(picture: Image.Image) -> str:
    """The name of the colour nearest to the median of the picture's border."""
    return _nearest(_median(_border(_pixels(picture))))


def object_colour(picture: Image.Image) -> str | None:
    """The name of the colour nearest to the median of the pixels unlike the border; None if there is no object."""
    pixels = _pixels(picture)
    distance = np.linalg.norm(pixels - _median(_border(pixels)), axis=-1)
    different = pixels[distance > _UNLIKE]
    if len(different) < _FEWEST_PIXELS:
        return None
    # Edge pixels are mixtures; the half that differs most is the inside.
    inside = pixels[distance >= np.median(distance[distance > _UNLIKE])]
    return _nearest(_median(inside))


def likeness(picture: Image.Image, references: Sequence[Image.Image]) -> float:
    """The highest correlation of a picture's pixels, each channel centred, with those of any reference at 32 px."""
    return max(_correlation(_small(picture), _small(reference)) for reference in references)


def psnr(restored: Pixels, original: Pixels) -> float:
    """Peak signal-to-noise ratio in dB of pixels in 0..255."""
    error = float(np.mean((restored.astype(np.float64) - original.astype(np.float64)) ** 2))
    return float(10 * np.log10(255**2 / error))


def _small(picture: Image.Image) -> Pixels:
    pixels = _pixels(picture.resize((32, 32), Image.Resampling.BOX))
    centred: Pixels = pixels - pixels.mean((0, 1))
    return centred


def _correlation(one: Pixels, other: Pixels) -> float:
    return float((one * other).sum() / max(1e-6, float(np.linalg.norm(one) * np.linalg.norm(other))))


def _pixels(picture: Image.Image) -> Pixels:
    return np.asarray(picture.convert("RGB"), dtype=np.float32)


def _border(pixels: Pixels) -> Pixels:
    """The pixels of a frame, [N, 3]."""
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[_BORDER_PX:-_BORDER_PX, _BORDER_PX:-_BORDER_PX] = True
    return pixels[~inner]


def _median(pixels: Pixels) -> Pixels:
    return np.median(pixels.reshape(-1, 3), axis=0).astype(np.float32)


def _nearest(colour: Pixels) -> str:
    return min(scenes.COLOURS, key=lambda name: float(np.linalg.norm(colour - np.array(scenes.COLOURS[name]))))
