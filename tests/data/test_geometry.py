"""Bucket arithmetic: golden values of the formula, and laws that hold for every image."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import example, given, reject
from hypothesis import strategies as st

from simpletuner.data.geometry import (
    MOST_ENLARGED_PX,
    bucket_size,
    cover,
    fit,
    recrop,
    round_to,
    rounded_aspect,
    scale_to,
)
from simpletuner.data.records import DropReason, Geometry
from simpletuner.data.spec import AspectChoice, ResizeSpec, ResolutionType

EDGES = st.integers(16, 12_000)
SIZES = st.tuples(EDGES, EDGES)
SPECS = st.builds(
    ResizeSpec,
    resolution=st.integers(128, 2048),
    resolution_type=st.sampled_from(["pixel", "pixel_area"]),
    crop=st.booleans(),
    crop_style=st.sampled_from(["random", "center", "corner"]),
    crop_aspect=st.sampled_from(["square", "preserve", "closest", "random"]),
    crop_aspect_buckets=st.just((AspectChoice(aspect=0.5), AspectChoice(aspect=1.0), AspectChoice(aspect=1.5))),
    aspect_bucket_alignment=st.sampled_from([8, 16, 32, 64]),
)


@pytest.mark.parametrize(
    ("edge", "aspect", "size"),
    [
        (1024, 1.0, (1024, 1024)),
        (1024, 1.33, (1152, 896)),
        (1024, 1.46, (1216, 832)),
        (1024, 1.5, (1280, 832)),
        (1024, 1.78, (1344, 768)),
        (1024, 0.71, (832, 1216)),
        (1024, 0.70, (832, 1216)),
        (1024, 0.68, (832, 1216)),
        (512, 1.5, (640, 448)),
    ],
)
def test_bucket_sizes_of_the_documented_aspects(edge: int, aspect: float, size: tuple[int, int]) -> None:
    assert bucket_size(aspect, ResizeSpec(resolution=edge)) == size
    megapixels = ResizeSpec(resolution=edge * edge / 1e6, resolution_type="area")
    assert bucket_size(aspect, megapixels) == size


@pytest.mark.parametrize(
    ("length", "rounded"), [(0, 64), (31, 64), (32, 64), (96, 128), (160, 128), (161, 192), (224, 256), (1056, 1024)]
)
def test_a_tie_goes_to_the_even_multiple_and_nothing_goes_to_zero(length: int, rounded: int) -> None:
    assert round_to(length, 64) == rounded


def test_pixel_mode_sets_the_shorter_edge() -> None:
    spec = ResizeSpec(resolution=500, resolution_type="pixel")
    assert bucket_size(1.0, spec) == (512, 512)
    assert bucket_size(1.5, spec) == (768, 512)
    assert bucket_size(0.5, spec) == (512, 1024)


def test_aspects_are_rounded_and_never_zero() -> None:
    assert rounded_aspect((4000, 3000), 2) == 1.33
    assert rounded_aspect((1, 1000), 2) == 0.01


def fitted(size: tuple[int, int], spec: ResizeSpec, *, seed: int, key: str) -> Geometry:
    """How the image is used. Lines of pixels that would be enlarged to a bomb are no example of it."""
    geometry = fit(size, spec, seed=seed, key=key)
    if geometry is DropReason.UPSCALE:
        assert max(size) / min(size) > 7
        reject()
    assert isinstance(geometry, Geometry)
    return geometry


@given(SIZES, SPECS, st.integers(0, 2**32), st.text(max_size=8))
@example(size=(120, 818), spec=ResizeSpec(resolution=496, aspect_bucket_alignment=32), seed=0, key="")
def test_every_picture_is_cut_from_a_faithful_resize(
    size: tuple[int, int], spec: ResizeSpec, seed: int, key: str
) -> None:
    geometry = fitted(size, spec, seed=seed, key=key)
    (target_width, target_height), (width, height) = geometry.target, geometry.intermediary
    assert target_width % spec.aspect_bucket_alignment == 0 < target_width
    assert target_height % spec.aspect_bucket_alignment == 0 < target_height
    # The resize covers the target, and is the smallest that does: one edge is the target's.
    assert width >= target_width
    assert height >= target_height
    assert width == target_width or height == target_height
    # The other edge is within half a pixel of the image's own aspect; which is the other, if both are the target's, the
    # sizes do not tell.
    by_width = abs(height - width * size[1] / size[0]) if width == target_width else math.inf
    by_height = abs(width - height * size[0] / size[1]) if height == target_height else math.inf
    assert min(by_width, by_height) <= 0.5 + 1e-6
    left, top = geometry.crop
    assert 0 <= left <= width - target_width
    assert 0 <= top <= height - target_height
    assert fit(size, spec, seed=seed, key=key) == geometry


@given(st.floats(0.25, 4.0), st.integers(256, 2048), st.sampled_from([8, 16, 32, 64]))
def test_a_bucket_is_near_its_aspect_and_area(aspect: float, edge: int, align: int) -> None:
    width, height = bucket_size(aspect, ResizeSpec(resolution=edge, aspect_bucket_alignment=align))
    # Three roundings of at most half a step each: the edge's, which scales with the root of the aspect, and its own.
    reach = align / 2 * max(math.sqrt(aspect), 1) + align / 2
    reach_other = align / 2 * max(1 / math.sqrt(aspect), 1) + align / 2
    assert abs(width - edge * math.sqrt(aspect)) <= reach + 1e-6
    assert abs(height - edge / math.sqrt(aspect)) <= reach_other + 1e-6


@given(SIZES, SIZES)
def test_cover_is_exact_integer_arithmetic(size: tuple[int, int], target: tuple[int, int]) -> None:
    covered = cover(size, target)
    assert covered[0] >= target[0]
    assert covered[1] >= target[1]
    assert covered in ((target[0], covered[1]), (covered[0], target[1]))
    assert cover(size, size) == size


def test_square_crops_of_any_image_share_one_bucket() -> None:
    spec = ResizeSpec(crop=True, crop_aspect="square", resolution=512)
    for size in [(4000, 3000), (300, 2000), (512, 512)]:
        geometry = fit(size, spec, seed=1, key="a")
        assert isinstance(geometry, Geometry)
        assert geometry.target == (512, 512)


def test_crop_styles() -> None:
    spec = ResizeSpec(crop=True, resolution=512, crop_style="center")
    center = fit((4000, 3000), spec, seed=1, key="a")
    assert center == Geometry(target=(512, 512), intermediary=(683, 512), crop=(85, 0))
    corner = fit((4000, 3000), replace(spec, crop_style="corner"), seed=1, key="a")
    assert isinstance(corner, Geometry)
    assert corner.crop == (0, 0)


def test_random_crops_differ_by_seed_and_content_and_reach_every_place() -> None:
    spec = ResizeSpec(crop=True, resolution=64)
    places = {(seed, key): fit((70, 64), spec, seed=seed, key=key) for seed in range(20) for key in "abcdefghij"}
    lefts = {geometry.crop[0] for geometry in places.values() if isinstance(geometry, Geometry)}
    assert lefts == set(range(7))
    assert len({places[0, c] for c in "abcdefghij"}) > 1
    assert len({places[s, "a"] for s in range(20)}) > 1


def test_a_large_image_is_shrunk_to_the_downsample_size_before_the_crop() -> None:
    spec = ResizeSpec(crop=True, resolution=512, maximum_image_size=1024, target_downsample_size=768)
    shrunk = fit((4000, 3000), spec, seed=1, key="a")
    assert isinstance(shrunk, Geometry)
    assert shrunk.intermediary == scale_to((4000, 3000), 768, "pixel_area") == (887, 665)
    # Not over the maximum, or not cropped: the nearest cover, as without the options.
    for size, other in [((900, 800), spec), ((4000, 3000), replace(spec, crop=False))]:
        plain = replace(other, maximum_image_size=None, target_downsample_size=None)
        assert fit(size, other, seed=1, key="a") == fit(size, plain, seed=1, key="a")


def test_a_downsample_size_below_the_target_never_leaves_a_gap() -> None:
    spec = ResizeSpec(crop=True, resolution=1024, maximum_image_size=512, target_downsample_size=512)
    geometry = fit((3000, 2000), spec, seed=1, key="a")
    assert isinstance(geometry, Geometry)
    assert min(geometry.intermediary) == 1024


@pytest.mark.parametrize(
    ("spec", "size", "reason"),
    [
        (ResizeSpec(minimum_image_size=512), (511, 512), DropReason.TOO_SMALL),
        (ResizeSpec(minimum_image_size=512), (512, 512), None),
        (ResizeSpec(minimum_image_size=512), (256, 1024), None),
        (ResizeSpec(minimum_image_size=512, crop=True), (256, 1024), DropReason.TOO_SMALL),
        (ResizeSpec(minimum_image_size=0.25, resolution=1, resolution_type="area"), (500, 500), None),
        (ResizeSpec(minimum_image_size=0.25, resolution=1, resolution_type="area"), (499, 500), DropReason.TOO_SMALL),
        (ResizeSpec(minimum_image_size=512, resolution_type="pixel"), (511, 4000), DropReason.TOO_SMALL),
        (ResizeSpec(minimum_aspect_ratio=0.5), (499, 1020), DropReason.ASPECT),
        (ResizeSpec(maximum_aspect_ratio=2.0), (2020, 1000), DropReason.ASPECT),
        (ResizeSpec(minimum_aspect_ratio=0.5, maximum_aspect_ratio=2.0), (1000, 500), None),
    ],
)
def test_what_is_left_out(spec: ResizeSpec, size: tuple[int, int], reason: DropReason | None) -> None:
    result = fit(size, spec, seed=1, key="a")
    assert result == reason if reason else isinstance(result, Geometry)


def test_closest_takes_the_nearest_shape_on_offer() -> None:
    offered = tuple(AspectChoice(aspect=aspect) for aspect in (0.5, 1.0, 2.0))
    spec = ResizeSpec(crop=True, crop_aspect="closest", crop_aspect_buckets=offered)
    for size, aspect in [((1000, 1900), 0.5), ((1000, 900), 1.0), ((1000, 600), 2.0)]:
        geometry = fit(size, spec, seed=1, key="a")
        assert isinstance(geometry, Geometry)
        assert geometry.target == bucket_size(aspect, spec)


def test_shapes_that_need_too_much_enlargement_are_not_offered() -> None:
    offered = (AspectChoice(aspect=1.0), AspectChoice(aspect=2.0))
    spec = ResizeSpec(
        crop=True, crop_aspect="random", crop_aspect_buckets=offered, resolution=512, max_upscale_threshold=0.1
    )
    for key in "abcdefgh":  # 512x512 would need 1.28, 704x384 needs 1.006
        geometry = fit((700, 400), spec, seed=1, key=key)
        assert isinstance(geometry, Geometry)
        assert geometry.target == (704, 384)
    assert fit((200, 100), spec, seed=1, key="a") is DropReason.UPSCALE


def test_random_shapes_follow_their_weights() -> None:
    offered = (AspectChoice(aspect=0.5, weight=3), AspectChoice(aspect=2.0, weight=1))
    spec = ResizeSpec(crop=True, crop_aspect="random", crop_aspect_buckets=offered, resolution=512)
    tall = 0
    for number in range(2000):
        geometry = fit((1000, 1000), spec, seed=7, key=str(number))
        assert isinstance(geometry, Geometry)
        tall += geometry.target[1] > geometry.target[0]
    assert 1400 < tall < 1600  # 1500 expected, standard deviation 19


@given(SIZES, SPECS, st.integers(0, 9), st.integers(1, 99))
def test_another_pass_moves_a_random_crop_and_nothing_else(
    size: tuple[int, int], spec: ResizeSpec, seed: int, epoch: int
) -> None:
    first = fitted(size, replace(spec, crop_style="random"), seed=seed, key="a")
    assert recrop(first, seed=seed, key="a", pass_number=0) == first
    later = recrop(first, seed=seed, key="a", pass_number=epoch)
    assert (first.target, first.intermediary) == (later.target, later.intermediary)
    spare = [whole - part for whole, part in zip(later.intermediary, later.target, strict=True)]
    assert all(0 <= place <= room for place, room in zip(later.crop, spare, strict=True))


def test_random_crops_reach_every_place_over_the_passes() -> None:
    spec = ResizeSpec(crop=True, resolution=64)
    first = fit((70, 64), spec, seed=1, key="a")
    assert isinstance(first, Geometry)
    crops = [recrop(first, seed=1, key="a", pass_number=number) for number in range(60)]
    assert {crop.crop[0] for crop in crops} == set(range(7))


@given(SIZES, SPECS)
def test_a_picture_of_its_targets_size_is_used_as_it_is(size: tuple[int, int], spec: ResizeSpec) -> None:
    once = fitted(size, spec, seed=1, key="a")
    again = fitted(once.target, spec, seed=1, key="a")
    if again.target == once.target:  # always so for squares and given shapes; the aspect of others is rounded again
        assert again == Geometry(target=once.target, intermediary=once.target, crop=(0, 0))
    else:
        assert not (spec.crop and spec.crop_aspect in ("square", "random"))


@given(
    SIZES,
    st.sampled_from(["pixel", "pixel_area", "area"]),
    st.integers(64, 4000),
    st.booleans(),
    st.floats(0.2, 1),
    st.floats(1, 5),
)
def test_what_is_used_is_within_every_limit(
    size: tuple[int, int], kind: ResolutionType, edge: int, crop: bool, low: float, high: float
) -> None:
    minimum = edge * edge / 1e6 if kind == "area" else edge
    spec = ResizeSpec(
        resolution=0.25 if kind == "area" else 512,
        resolution_type=kind,
        crop=crop,
        minimum_image_size=minimum,
        minimum_aspect_ratio=low,
        maximum_aspect_ratio=high,
    )
    result = fit(size, spec, seed=1, key="a")
    is_large = min(size) >= edge if kind == "pixel" else size[0] * size[1] >= edge * edge
    is_large = is_large and (not crop or min(size) >= edge)
    if isinstance(result, Geometry):
        assert is_large
        assert low <= rounded_aspect(size, 2) <= high
    else:
        assert result is (DropReason.ASPECT if is_large else DropReason.TOO_SMALL)


@given(SIZES, SPECS, st.integers(256, 3000), st.integers(256, 3000))
def test_shrinking_first_never_leaves_a_gap_nor_enlarges(
    size: tuple[int, int], spec: ResizeSpec, maximum: int, target: int
) -> None:
    shrinking = replace(spec, crop=True, maximum_image_size=maximum, target_downsample_size=target)
    plain, shrunk = (fitted(size, one, seed=1, key="a") for one in (replace(spec, crop=True), shrinking))
    assert shrunk.target == plain.target
    assert all(length >= least for length, least in zip(shrunk.intermediary, shrunk.target, strict=True))
    if shrunk.intermediary != plain.intermediary:
        assert shrunk.intermediary[0] <= size[0], "an image is not enlarged to be shrunk"
        assert shrunk.intermediary == scale_to(size, target, spec.resolution_type)


@pytest.mark.parametrize(
    ("size", "spec"),
    [
        ((5000, 1), ResizeSpec(crop=True)),
        ((1, 5000), ResizeSpec(crop=True)),
        ((5000, 1), ResizeSpec(resolution_type="pixel")),
        ((65_535, 1), ResizeSpec()),
    ],
)
def test_a_line_of_pixels_is_left_out_before_it_fills_the_memory(size: tuple[int, int], spec: ResizeSpec) -> None:
    assert fit(size, spec, seed=1, key="a") is DropReason.UPSCALE


@given(SIZES, SPECS)
def test_no_picture_takes_more_memory_than_the_bound_or_the_image(size: tuple[int, int], spec: ResizeSpec) -> None:
    geometry = fit(size, spec, seed=1, key="a")
    if isinstance(geometry, Geometry):
        assert math.prod(geometry.intermediary) <= max(math.prod(size), MOST_ENLARGED_PX)
