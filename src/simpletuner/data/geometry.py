"""From an image's size to its training picture: bucket, resize, crop. Arithmetic on numbers only, no torch, no PIL.

An image goes to the target size of its (rounded) aspect, both edges multiples of the alignment: it is resized, keeping
its own aspect, until it just covers the target, and the overflow is cut off.
"""

from __future__ import annotations

import math
from dataclasses import replace

from simpletuner.data.hashing import draw, draw_unit
from simpletuner.data.records import DropReason, Geometry, Size
from simpletuner.data.spec import CropStyle, ResizeSpec, ResolutionType

MOST_ENLARGED_PX = 1 << 26
"""An image that would have to be enlarged beyond that is not used: a line of pixels would fill the memory."""

_PIXELS_PER_MEGAPIXEL = 1_000_000


def fit(size: Size, spec: ResizeSpec, *, seed: int, key: str) -> Geometry | DropReason:
    """Return how an upright image of `size` px is used under `spec`, or why it is not.

    Random crops and random aspects are functions of (seed, key): the same picture every time.
    """
    dropped = _reason_to_drop(size, spec)
    if dropped is not None:
        return dropped
    target = _target_size(size, spec, seed=seed, key=key)
    if target is None:
        return DropReason.UPSCALE
    intermediary = cover(size, target)
    if spec.crop and _is_over_maximum(size, spec):
        assert spec.target_downsample_size is not None
        shrunk = scale_to(size, spec.target_downsample_size, spec.resolution_type)
        if shrunk[0] >= target[0] and shrunk[1] >= target[1] and shrunk[0] <= size[0]:
            intermediary = shrunk
    if intermediary[0] * intermediary[1] > max(size[0] * size[1], MOST_ENLARGED_PX):
        return DropReason.UPSCALE
    crop = _crop_position(intermediary, target, spec.crop_style, seed=seed, key=key, pass_number=0)
    return Geometry(target=target, intermediary=intermediary, crop=crop)


def recrop(geometry: Geometry, *, seed: int, key: str, pass_number: int) -> Geometry:
    """Return the random crop of a later pass through the dataset, a function of (seed, key, pass_number).

    Only the place of the cut is another one. Pass 0 has the crop that `fit` gave.
    """
    crop = _crop_position(geometry.intermediary, geometry.target, "random", seed=seed, key=key, pass_number=pass_number)
    return replace(geometry, crop=crop)


def bucket_size(aspect: float, spec: ResizeSpec) -> Size:
    """Return the target size of an aspect (width / height), both edges multiples of the alignment.

    `area` and `pixel_area`: the area is near the resolution's. `pixel`: the shorter edge is the resolution.
    """
    edge = square_edge(spec)
    align = spec.aspect_bucket_alignment
    if spec.resolution_type == "pixel":
        longer = round_to(edge * max(aspect, 1 / aspect), align)
        return (longer, edge) if aspect >= 1 else (edge, longer)
    root = math.sqrt(aspect)
    return round_to(edge * root, align), round_to(edge / root, align)


def square_edge(spec: ResizeSpec) -> int:
    """Edge of the square target in px, a multiple of the alignment."""
    edge = spec.resolution if spec.resolution_type == "pixel" else math.isqrt(area_px(spec.resolution, spec))
    return round_to(edge, spec.aspect_bucket_alignment)


def rounded_aspect(size: Size, decimals: int) -> float:
    """width / height to `decimals` places: the aspect that chooses the bucket. Never 0, however tall the image."""
    return max(round(size[0] / size[1], decimals), 10.0**-decimals)


def round_to(length: float, multiple: int) -> int:
    """Return the multiple nearest to `length`, at least one; a tie goes to the even count, as Python rounds."""
    return max(round(length / multiple), 1) * multiple


def cover(size: Size, target: Size) -> Size:
    """Return the smallest size with the aspect of `size` (to the nearest pixel) that covers `target`."""
    (width, height), (target_width, target_height) = size, target
    if target_width * height >= target_height * width:
        return target_width, _divide_rounded(target_width * height, width)
    return _divide_rounded(target_height * width, height), target_height


def scale_to(size: Size, length: float, resolution_type: ResolutionType) -> Size:
    """Return `size` scaled, aspect kept, to a shorter edge or an area of `length` in units of `resolution_type`."""
    width, height = size
    if resolution_type == "pixel":
        scale = length / min(width, height)
    else:
        scale = math.sqrt(_area(length, resolution_type) / (width * height))
    return max(round(width * scale), 1), max(round(height * scale), 1)


def area_px(value: float, spec: ResizeSpec) -> int:
    """An option of an `area` or `pixel_area` dataset in px."""
    return _area(value, spec.resolution_type)


def _area(value: float, resolution_type: ResolutionType) -> int:
    return round(value * _PIXELS_PER_MEGAPIXEL) if resolution_type == "area" else round(value * value)


def _reason_to_drop(size: Size, spec: ResizeSpec) -> DropReason | None:
    if spec.minimum_image_size is not None and not _is_large_enough(size, spec.minimum_image_size, spec):
        return DropReason.TOO_SMALL
    aspect = rounded_aspect(size, spec.aspect_bucket_rounding)
    if spec.minimum_aspect_ratio is not None and aspect < spec.minimum_aspect_ratio:
        return DropReason.ASPECT
    if spec.maximum_aspect_ratio is not None and aspect > spec.maximum_aspect_ratio:
        return DropReason.ASPECT
    return None


def _is_large_enough(size: Size, minimum: float, spec: ResizeSpec) -> bool:
    if spec.resolution_type == "pixel":
        return min(size) >= minimum
    least_px = area_px(minimum, spec)
    if size[0] * size[1] < least_px:
        return False
    return not (spec.crop and spec.crop_aspect == "square") or min(size) ** 2 >= least_px


def _is_over_maximum(size: Size, spec: ResizeSpec) -> bool:
    if spec.maximum_image_size is None or spec.target_downsample_size is None:
        return False
    if spec.resolution_type == "pixel":
        return min(size) > spec.maximum_image_size
    return size[0] * size[1] > area_px(spec.maximum_image_size, spec)


def _target_size(size: Size, spec: ResizeSpec, *, seed: int, key: str) -> Size | None:
    """The bucket of an image; None if every aspect on offer would enlarge it too much."""
    own_aspect = rounded_aspect(size, spec.aspect_bucket_rounding)
    if not spec.crop or spec.crop_aspect == "preserve":
        return bucket_size(own_aspect, spec)
    if spec.crop_aspect == "square":
        edge = square_edge(spec)
        return edge, edge
    offered = [
        choice
        for choice in spec.crop_aspect_buckets
        if spec.max_upscale_threshold is None
        or _enlargement(size, bucket_size(choice.aspect, spec)) <= 1 + spec.max_upscale_threshold
    ]
    if not offered:
        return None
    if spec.crop_aspect == "closest":
        # Distance between shapes, not between numbers: 2:1 is as far from 1:1 as 1:2 is.
        return bucket_size(min((abs(math.log(c.aspect / own_aspect)), c.aspect) for c in offered)[1], spec)
    point = draw_unit(seed, "aspect", key) * sum(choice.weight for choice in offered)
    for choice in offered:
        point -= choice.weight
        if point < 0:
            return bucket_size(choice.aspect, spec)
    return bucket_size(offered[-1].aspect, spec)


def _enlargement(size: Size, target: Size) -> float:
    return max(target[0] / size[0], target[1] / size[1])


def _crop_position(
    intermediary: Size, target: Size, style: CropStyle, *, seed: int, key: str, pass_number: int
) -> tuple[int, int]:
    spare_x, spare_y = intermediary[0] - target[0], intermediary[1] - target[1]
    if style == "corner":
        return 0, 0
    if style == "center":
        return spare_x // 2, spare_y // 2
    visit = (pass_number,) if pass_number else ()
    return draw(seed, "crop x", key, *visit) % (spare_x + 1), draw(seed, "crop y", key, *visit) % (spare_y + 1)


def _divide_rounded(dividend: int, divisor: int) -> int:
    """dividend / divisor to the nearest integer, ties to even, without a float in between."""
    quotient, remainder = divmod(dividend, divisor)
    return quotient + (2 * remainder > divisor or (2 * remainder == divisor and quotient % 2 == 1))
