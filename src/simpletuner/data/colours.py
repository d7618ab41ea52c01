"""The colours of an image in sRGB: every kind of pixels, every colour profile, transparency over black. PIL and numpy.

Pictures of phones and cameras often carry a profile (Display P3, Adobe RGB, a press's CMYK): their numbers mean other
colours than the same numbers in sRGB, which is what the model was trained on.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

_PROBE_LEVELS = 9
_SAME_UP_TO = 2
"""A profile that moves no colour by more, of 255, is sRGB in another writing."""
_PROFILED_MODES = ("L", "RGB", "CMYK")


def to_srgb(image: Image.Image) -> Image.Image:
    """Return the RGB image; transparent places over black, 16-bit grey scaled to 8 bit, profiles applied.

    Args: image: loaded.
    Raises: ValueError: its pixels have no fixed range.
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        # PIL would clip instead of scale, and give a white picture.
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of kind {image.mode!r} (32 bits per channel) have no fixed range")
    if not image.has_transparency_data:
        return _colours(image, profile)
    rgba = image.convert("RGBA")
    opaque = _colours(image.getchannel("L") if image.mode == "LA" else rgba.convert("RGB"), profile).convert("RGBA")
    opaque.putalpha(rgba.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), opaque).convert("RGB")


def changes_colours(profile: bytes | None, mode: str) -> bool:
    """Whether an image of PIL's `mode` with this profile has other colours than its numbers mean in sRGB."""
    if not profile:
        return False
    return _transform(profile, mode if mode in _PROFILED_MODES else "RGB") is not None


def _colours(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An opaque image in sRGB."""
    if image.mode == "LAB":
        lab = ImageCms.buildTransform(ImageCms.createProfile("LAB"), _srgb(), "LAB", "RGB")
        return _applied(lab, image)
    if image.mode not in _PROFILED_MODES:
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = _transform(profile, image.mode) if profile else None
    if transform is None:
        return image.convert("RGB")
    if image.mode == "L":
        levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        return Image.fromarray(np.asarray(_applied(transform, levels))[0][np.asarray(image)])
    return _applied(transform, image)


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is so only for a transformation in place
    return converted


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile to sRGB; None if there is nothing to do, or the profile is damaged or for other channels."""
    # What is precalculated for grey misses dark shades by ten levels. Slow without, but it is asked 256 shades only.
    exactness = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        transform = ImageCms.buildTransform(
            source,
            _srgb(),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | exactness,
        )
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, _PROBE_LEVELS).round().astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(_PROBE_LEVELS, -1, 3)
    probe = Image.fromarray(cube if mode == "RGB" else cube[..., 0])
    plain = np.asarray(probe.convert("RGB"), dtype=np.int16)
    moved = np.abs(np.asarray(_applied(transform, probe), dtype=np.int16) - plain).max()
    return transform if moved > _SAME_UP_TO else None


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
