"""Masks: paired by name, cut as their images, averaged to latents; what does not fit is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from simpletuner.data import masks as masks_module
from simpletuner.data.geometry import fit
from simpletuner.data.images import UnreadableImageError, cut, cut_mask, decode, decode_mask
from simpletuner.data.mask_pairs import MaskFiles, has_same_shape, pair_masks
from simpletuner.data.masks import MaskDraw, MaskStore, cache_masks, weights_of
from simpletuner.data.records import Geometry, Plan, Sample
from simpletuner.data.spec import DatasetSpec, ResizeSpec
from simpletuner.data.storage import LocalStorage
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import DatasetError, SimpletunerError

Told = Callable[[SimpletunerError], list[str]]
RESIZE = ResizeSpec(resolution=64, resolution_type="pixel_area", aspect_bucket_alignment=16)


def save_mask(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def left_half(size: tuple[int, int]) -> np.ndarray:
    """White on the left, [H, W] uint8."""
    pixels = np.zeros(size[::-1], dtype=np.uint8)
    pixels[:, : size[0] // 2] = 255
    return pixels


@pytest.fixture
def found(tmp_path: Path, save_image: Callable[..., Path], make_plan: Callable[..., Plan]) -> Callable[..., Plan]:
    """found(*names, size=(64, 64), resize=RESIZE): the plan of images of that size."""

    def make(*names: str, size: tuple[int, int] = (64, 64), resize: ResizeSpec = RESIZE) -> Plan:
        for number, name in enumerate(names):
            save_image(tmp_path / "images" / name, size, seed=number)
        return make_plan(DatasetSpec(id="cats", storage=LocalStorage(folder=tmp_path / "images"), resize=resize))

    return make


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[Plan], dict[str, MaskFiles]]:
    def pairs(plan: Plan) -> dict[str, MaskFiles]:
        spec = DatasetSpec(id="masks", storage=LocalStorage(folder=tmp_path / "masks"))
        return pair_masks(plan, {"cats": spec}, cache_dir=tmp_path / "cache", on_progress=lambda done, total: None)

    return pairs


@pytest.fixture
def fill(tmp_path: Path) -> Callable[..., tuple[MaskStore, list[str], list[tuple[int, int]]]]:
    """fill(plan, masks) -> (the store, codes of warnings, progress)."""

    def make(plan: Plan, masks: dict[str, MaskFiles]) -> tuple[MaskStore, list[str], list[tuple[int, int]]]:
        progress: list[tuple[int, int]] = []
        store, warnings = cache_masks(
            plan,
            masks,
            directory=tmp_path / "cache/masks",
            cache_dir=tmp_path / "cache",
            px_per_latent=8,
            on_progress=lambda done, total: progress.append((done, total)),
        )
        return store, [problem.code for problem in warnings], progress

    return make


def test_a_mask_has_the_path_and_name_of_its_image(found, pair, tmp_path):
    plan = found("cats/tom.jpg", "tom.png", "dots.in.name.webp", size=(64, 64))
    for name in ("cats/tom.png", "tom.bmp", "dots.in.name.png", "nobodys.png"):
        save_mask(tmp_path / "masks" / name, left_half((32, 32)))
    by_image = pair(plan)["cats"].by_image
    assert {image: mask.key for image, mask in by_image.items()} == {
        "cats/tom.jpg": "cats/tom.png",
        "tom.png": "tom.bmp",
        "dots.in.name.webp": "dots.in.name.png",
    }


def test_everything_that_is_wrong_with_masks_is_told_at_once(found, pair, tmp_path, told: Told):
    plan = found("none.png", "two.png", "broken.png", "wide.png", "good.png", "lost.png")
    white = np.full((64, 64), 255, dtype=np.uint8)
    for name in ("two.png", "two.bmp", "good.png"):
        save_mask(tmp_path / "masks" / name, white)
    save_mask(tmp_path / "masks/wide.png", white[:32])
    (tmp_path / "masks/broken.png").write_bytes(b"no image")
    with pytest.raises(DatasetError) as caught:
        pair(plan)
    assert told(caught.value) == ["E-MASK-MISSING", "E-MASK-TWICE", "E-MASK-UNREADABLE", "E-MASK-SHAPE"]
    names = [
        "lost.png, none.png",
        "two.bmp, two.png",
        "broken.png (not an image file)",
        "wide.png 64x32 (wide.png: 64x64",
    ]
    for problem, name in zip(caught.value.problems, names, strict=True):
        for language in LANGUAGES:
            title, _ = render_problem(problem, language)
            assert "cats" in title and name in title and str(tmp_path / "masks") in title


def test_a_folder_of_masks_that_is_not_there_is_told(found, pair, told: Told):
    with pytest.raises(DatasetError) as caught:
        pair(found("a.png"))
    assert told(caught.value) == ["E-DATASET-FOLDER-MISSING"]


@given(st.integers(1, 4000), st.integers(1, 4000), st.floats(0.05, 8))
def test_a_mask_of_another_size_fits_if_its_shape_is_the_images(width, height, scale):
    mask = (max(round(width * scale), 1), max(round(height * scale), 1))
    assert has_same_shape(mask, (width, height)) or min(mask) == 1
    assert has_same_shape((width, height), (width, height))
    assert not has_same_shape((3 * width + 2, height), (width, height)) or min(width, height) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("style", ["center", "corner", "random"])
def test_a_mask_is_cut_exactly_as_its_image(orientation, style):
    """An image that is its own mask: what is white in the one is white in the other, wherever it ends up."""
    size = (100, 70)
    rng = np.random.default_rng(orientation)
    blocks = np.kron(rng.integers(0, 2, (7, 10), dtype=np.uint8) * 255, np.ones((10, 10), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _bytes(Image.fromarray(blocks), exif=exif)
    upright = decode(path).size
    spec = replace(RESIZE, crop=True, crop_style=style)
    geometry = fit(upright, spec, seed=3, key="x")
    assert isinstance(geometry, Geometry)
    assert upright == (size if orientation < 5 else size[::-1])
    mask = decode_mask(path)
    assert mask.mode == "L" and mask.size == upright
    same_filter = mask.resize(geometry.intermediary, Image.Resampling.LANCZOS)
    (left, top), (width, height) = geometry.crop, geometry.target
    expected = np.asarray(same_filter.crop((left, top, left + width, top + height)))
    assert (cut(decode(path), geometry)[..., 0] == expected).all()
    got = cut_mask(mask, geometry)
    inside = np.abs(got.astype(int) - expected.astype(int))
    assert np.median(inside) == 0 and got.shape == (height, width), "the same places, but for the filter's edges"


def _bytes(image: Image.Image, **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def test_an_alpha_channel_counts_if_it_hides_something():
    grey = np.array([[10, 200]], dtype=np.uint8)
    alpha = np.array([[255, 64]], dtype=np.uint8)
    opaque = np.full_like(alpha, 255)
    cut_out = np.stack([grey, grey, grey, alpha], axis=-1)
    assert np.asarray(decode_mask(_bytes(Image.fromarray(cut_out)))).tolist() == alpha.tolist()
    cut_out[..., 3] = opaque
    assert np.asarray(decode_mask(_bytes(Image.fromarray(cut_out)))).tolist() == grey.tolist()
    assert np.asarray(decode_mask(_bytes(Image.fromarray(grey)))).tolist() == grey.tolist()
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.asarray(decode_mask(_bytes(deep))).tolist() == grey.tolist()
    with pytest.raises(UnreadableImageError):
        decode_mask(b"")


def test_weights_are_the_area_that_the_mask_lets_through(found, pair, fill, tmp_path):
    plan = found("a.png", size=(64, 64))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    save_mask(tmp_path / "masks/a.png", pixels)
    store, warnings, _ = fill(plan, pair(plan))
    (sample,) = plan.samples()
    assert sample.geometry.target == (64, 64)
    weights = store.weights(sample)
    means = pixels.reshape(8, 8, 8, 8).mean(axis=(1, 3))
    assert weights.shape == (1, 8, 8) and weights.dtype == torch.float32
    assert np.allclose(weights[0].numpy(), means / means.mean(), atol=1 / means.mean())
    assert warnings == []


@given(st.integers(0, 255), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_weights_have_a_mean_of_one(level, height, width, seed):
    draws = torch.Generator().manual_seed(seed)
    coverage = torch.randint(0, level + 1, (height, width), generator=draws, dtype=torch.uint8)
    weights = weights_of(coverage)
    assert weights.min() >= 0
    assert weights.mean().item() == pytest.approx(1 if coverage.any() else 0, abs=1e-5)
    assert torch.equal(weights[0] == 0, coverage == 0)


def test_a_white_mask_is_exactly_one_everywhere():
    for height, width in ((1, 1), (7, 13), (128, 96), (333, 1)):
        assert torch.equal(
            weights_of(torch.full((height, width), 255, dtype=torch.uint8)), torch.ones(1, height, width)
        )


def test_a_black_mask_is_told_and_teaches_nothing(found, pair, fill, tmp_path):
    """Black in the part that is used; that is remembered without reading it again."""
    plan = found("left.png", "right.png", size=(128, 64), resize=replace(RESIZE, crop=True, crop_style="corner"))
    save_mask(tmp_path / "masks/left.png", left_half((128, 64)))
    save_mask(tmp_path / "masks/right.png", left_half((128, 64))[:, ::-1])
    for _ in ("cold", "warm"):
        store, warnings, _ = fill(plan, pair(plan))
        assert warnings == ["W-MASK-BLACK"]
        by_name = {sample.record.key: store.weights(sample) for sample in plan.samples()}
        assert torch.equal(by_name["right.png"], torch.zeros(1, 8, 8))
        assert torch.equal(by_name["left.png"], torch.ones(1, 8, 8))


def test_the_warning_of_black_masks_has_its_words(found, pair, tmp_path, told: Told):
    plan = found("a.png")
    save_mask(tmp_path / "masks/a.png", np.zeros((64, 64), dtype=np.uint8))
    _, problems = cache_masks(
        plan,
        pair(plan),
        directory=tmp_path / "m",
        cache_dir=tmp_path / "cache",
        px_per_latent=8,
        on_progress=lambda done, total: None,
    )
    assert told(DatasetError(problems)) == ["W-MASK-BLACK"]
    assert "a.png" in render_problem(problems[0], "es")[0]


def test_masks_are_read_once_and_anew_when_they_change(found, pair, fill, tmp_path, monkeypatch):
    plan = found("a.png", "b.png")
    for name in ("a.png", "b.png"):
        save_mask(tmp_path / "masks" / name, left_half((64, 64)))
    read: list[str] = []
    original = masks_module._coverage

    def counting(px_per_latent, mask):
        read.append(mask.file.key)
        return original(px_per_latent, mask)

    monkeypatch.setattr(masks_module, "_coverage", counting)
    store, _, progress = fill(plan, pair(plan))
    assert len(read) == 1, "masks of the same content are one"
    assert (progress[0], progress[-1]) == ((0, 1), (1, 1))
    before = [store.weights(sample) for sample in plan.samples()]
    read.clear()
    store, _, progress = fill(plan, pair(plan))
    assert all(map(torch.equal, [store.weights(sample) for sample in plan.samples()], before))
    assert (read, progress) == ([], [(1, 1)])
    save_mask(tmp_path / "masks/b.png", left_half((64, 64))[:, ::-1])
    store, _, _ = fill(plan, pair(plan))
    after = {sample.record.key: store.weights(sample) for sample in plan.samples()}
    assert torch.equal(after["a.png"], before[0])
    assert torch.equal(after["b.png"], before[0].flip(-1))


def test_a_mask_of_another_crop_is_made_when_it_is_asked_for(found, pair, fill, tmp_path):
    """As the cache would hold it: which crops a run takes does not change what they count."""
    plan = found("a.png", size=(128, 64), resize=replace(RESIZE, crop=True, crop_style="center"))
    save_mask(tmp_path / "masks/a.png", np.random.default_rng(1).integers(0, 256, (64, 128), dtype=np.uint8))
    masks = pair(plan)
    store, _, _ = fill(plan, masks)
    (sample,) = plan.samples()
    uncached = MaskStore(masks, px_per_latent=8)
    assert torch.equal(uncached.weights(sample), store.weights(sample))
    moved = replace(sample, geometry=replace(sample.geometry, crop=(8, 0)))
    assert torch.equal(uncached.weights(moved), store.weights(moved))
    assert not torch.equal(store.weights(moved), store.weights(sample))


def test_a_mask_that_breaks_while_it_is_used_is_told(found, pair, fill, tmp_path, told: Told):
    plan = found("a.png")
    mask = save_mask(tmp_path / "masks/a.png", left_half((64, 64)))
    masks = pair(plan)
    mask.unlink()
    (sample,) = plan.samples()
    for use in (lambda: fill(plan, masks), lambda: MaskStore(masks, px_per_latent=8).weights(sample)):
        with pytest.raises(DatasetError) as caught:
            use()
        assert told(caught.value) == ["E-MASK-UNREADABLE"]


class Whole:
    """A store whose every sample has the same mask."""

    def weights(self, sample: Sample) -> torch.Tensor:
        return torch.ones(1, 2, 2)


def is_masked(draw: MaskDraw, index: int, rank: int = 0) -> list[bool]:
    return [weights is not None for weights in draw.weights([None] * 8, index, rank) or [None] * 8]


def test_the_share_that_is_masked_is_drawn_from_the_seed():
    draw = MaskDraw(store=Whole(), probability=0.3, seed=5)
    places = [(index, rank) for index in range(300) for rank in (0, 1)]
    drawn = [is_masked(draw, *place) for place in places]
    assert sum(map(sum, drawn)) / (8 * len(drawn)) == pytest.approx(0.3, abs=0.03)
    assert [is_masked(draw, *place) for place in reversed(places)] == drawn[::-1], "a function of where it is"
    assert drawn[::2] != drawn[1::2], "ranks differ"
    other = MaskDraw(store=Whole(), probability=0.3, seed=6)
    assert [is_masked(other, *place) for place in places] != drawn


@pytest.mark.parametrize(("probability", "is_masked"), [(0.0, False), (1.0, True)])
def test_all_or_none_is_masked(probability, is_masked):
    for index in range(50):
        weights = MaskDraw(store=Whole(), probability=probability, seed=1).weights([None] * 3, index, 0)
        assert (weights is not None) == is_masked
        assert weights is None or all(weight is not None for weight in weights)


def test_a_dataset_without_masks_has_no_weights(found):
    (sample,) = found("a.png").samples()
    store = MaskStore({}, px_per_latent=8)
    assert store.weights(sample) is None
    assert MaskDraw(store=store, probability=1.0, seed=1).weights([sample], 0, 0) is None
