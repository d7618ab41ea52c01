"""Make pictures with the statistics of photographs, without any photograph, for the autoencoder to learn from.

Each picture is a pile of overlapping leaves of every size, filled with clouds of 1/f noise, strokes and gratings, lit
by a soft gradient, sometimes out of focus, with muted correlated colours and a little sensor noise.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

TEXTURE_PX = 128
_NUM_CLOUDS = 3

Array = NDArray[np.float32]


def texture(rng: np.random.Generator, *, size_px: int = TEXTURE_PX) -> Image.Image:
    """One RGB picture, size_px x size_px."""
    big_px = size_px * 2
    clouds = [_coloured_cloud(rng, big_px) for _ in range(_NUM_CLOUDS)]
    canvas = clouds[0].copy()
    for _ in range(_num_leaves(rng)):
        fill = clouds[int(rng.integers(_NUM_CLOUDS))] if rng.random() < 0.6 else None
        _drop_leaf(rng, canvas, fill)
    if rng.random() < 0.35:
        _draw_strokes(rng, canvas)
    if rng.random() < 0.3:
        canvas = canvas.filter(ImageFilter.GaussianBlur(float(rng.exponential(1.5))))
    small = canvas.resize((size_px, size_px), Image.Resampling.BOX)
    return _developed(rng, small)


def _cloud(rng: np.random.Generator, size_px: int, slope: float) -> Array:
    """Noise with amplitude f^-slope, mean 0, standard deviation 1. [size, size]"""
    fy, fx = np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px)[None]
    stretch = math.exp(rng.normal(0, 0.4))
    frequency = np.sqrt((fx * stretch) ** 2 + (fy / stretch) ** 2) + 0.5 / size_px
    spectrum = np.fft.rfft2(rng.standard_normal((size_px, size_px))) * frequency**-slope
    field = np.fft.irfft2(spectrum, s=(size_px, size_px))
    normed: Array = ((field - field.mean()) / (field.std() + 1e-6)).astype(np.float32)
    return normed


def _coloured_cloud(rng: np.random.Generator, size_px: int) -> Image.Image:
    brightness = _cloud(rng, size_px, rng.uniform(0.7, 2.0))
    if rng.random() < 0.25:
        brightness = np.sin(brightness * rng.uniform(1, 5)).astype(np.float32)
    tint = _cloud(rng, size_px // 4, rng.uniform(1.2, 2.0)).repeat(4, 0).repeat(4, 1)
    base, contrast = _colour(rng), float(np.clip(rng.exponential(28), 2, 90))
    axis = rng.normal(0, 8, 3)
    pixels = base + contrast * brightness[..., None] * rng.normal(1, 0.15, 3) + tint[..., None] * axis
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _colour(rng: np.random.Generator) -> Array:
    """A mostly muted colour, 0 to 255 per channel."""
    grey = rng.uniform(10, 245)
    saturation = float(np.clip(rng.exponential(30), 0, 120)) if rng.random() < 0.8 else 150.0
    return np.clip(grey + saturation * rng.normal(0, 1, 3), 0, 255).astype(np.float32)


def _num_leaves(rng: np.random.Generator) -> int:
    return int(np.clip(rng.lognormal(3.3, 1.0), 0, 200))


def _drop_leaf(rng: np.random.Generator, canvas: Image.Image, fill: Image.Image | None) -> None:
    """Paste an ellipse or polygon with a power-law size, flat or showing a part of `fill`."""
    size_px = canvas.width
    radius = min(0.5 * size_px, 7 / (rng.random() + 0.01) ** 0.8)
    cx, cy = rng.uniform(0, size_px, 2)
    corners = int(rng.choice([3, 4, 4, 4, 5, 7, 24, 24, 24]))
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners)) if corners < 8 else np.linspace(0, 2 * math.pi, corners)
    stretch, turn = math.exp(rng.normal(0, 0.6)), rng.uniform(0, math.pi)
    ex, ey = radius * np.cos(angles) * stretch, radius * np.sin(angles) / stretch
    xs, ys = cx + ex * math.cos(turn) - ey * math.sin(turn), cy + ex * math.sin(turn) + ey * math.cos(turn)
    outline = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]
    if fill is None:
        r, g, b = (int(c) for c in _colour(rng))
        ImageDraw.Draw(canvas).polygon(outline, fill=(r, g, b))
        return
    mask = Image.new("L", canvas.size, 0)
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    if rng.random() < 0.2:
        mask = mask.filter(ImageFilter.BoxBlur(float(rng.uniform(1, 5))))
    canvas.paste(fill, (0, 0), mask)


def _draw_strokes(rng: np.random.Generator, canvas: Image.Image) -> None:
    """Hair, grass or a grating: many thin lines of related colours and directions."""
    pen, size_px = ImageDraw.Draw(canvas), canvas.width
    base, direction, spread = _colour(rng), rng.uniform(0, math.pi), rng.exponential(0.3)
    length, regular = rng.uniform(6, 90), rng.random() < 0.3
    count = int(rng.uniform(20, 220))
    x0, y0 = rng.uniform(0, size_px, 2)
    step = rng.uniform(3, 12)
    for index in range(count):
        if regular:
            x, y = (
                x0 + step * (index - count / 2) * math.sin(direction),
                y0 - step * (index - count / 2) * math.cos(direction),
            )
            angle, reach = direction, length * 2
        else:
            x, y = rng.uniform(0, size_px, 2)
            angle, reach = direction + rng.normal(0, spread), length
        r, g, b = (int(c) for c in np.clip(base + rng.normal(0, 30), 0, 255))
        dx, dy = reach * math.cos(angle), reach * math.sin(angle)
        pen.line([(x - dx, y - dy), (x + dx, y + dy)], fill=(r, g, b), width=int(rng.integers(1, 5)))


def _developed(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Light, contrast, gamma, saturation and sensor noise of an imaginary camera."""
    pixels = np.asarray(picture, dtype=np.float32) / 255
    size_px = pixels.shape[0]
    grid_y, grid_x = np.mgrid[-1 : 1 : size_px * 1j, -1 : 1 : size_px * 1j].astype(np.float32)
    light = 1 + 0.35 * (rng.normal() * grid_x + rng.normal() * grid_y)
    pixels = np.clip(pixels * np.clip(light, 0.2, 1.8)[..., None], 0, 1) ** math.exp(rng.normal(0, 0.35))
    grey = pixels.mean(-1, keepdims=True)
    pixels = grey + (pixels - grey) * rng.uniform(0.2, 1.2)
    if rng.random() < 0.3:
        pixels = pixels + rng.normal(0, rng.exponential(0.02), pixels.shape)
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
