"""Damaged and odd files: each is used rightly or named with its reason, and none costs much."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from simpletuner.data.image_index import open_index
from simpletuner.data.images import UnreadableImageError, decode, read_header, without_decoder_warnings
from simpletuner.data.latents import LatentSource, PlanAgainError, cache_latents, learn_latent_keys
from simpletuner.data.records import ImageHeader, Plan
from simpletuner.data.spec import CaptionSpec, DatasetSpec, ResizeSpec
from simpletuner.data.storage import LocalStorage
from tests.data.odd_images import Bad, Shows, encoded, odd_files, write_odd_images

FILES = odd_files()
NUM_BROKEN = 12
TRAITS = {
    "alpha": {"rgba.png", "grey_alpha.png", "palette_alpha.png", "rgb_key_colour.png", "transparent.webp"},
    "animated": {"animated.gif", "animated.webp", "animated.png", "pages.tiff"},
    "cmyk": {"cmyk.jpg", "ycck.jpg", "cmyk.tif"},
    "deep": {"rgb16.png", "grey16.png", "rgba16.png", "rgb16.tif", "grey16.tif", "float.tif"},
    "grey": {"grey.jpg", "grey.png", "grey_alpha.png", "bits.png", "grey16.tif"},
    "palette": {"palette.png", "palette.bmp", "still.gif"},
    "profile": {"p3.png", "p3.jpg", "p3.webp", "p3.tif", "adobe_rgb.png", "linear_grey.png"},
    "rotated": {"turned_6.jpg", "turned_2.png", "turned_8.webp", "turned_3.tif", "late_orientation.png"},
}
PLAIN = {"wrong_ending.png", "interlaced.png", "srgb.png", "turned_1.webp", "two_pictures.jpg", "bottom_up.bmp"}


def header_of(name: str) -> ImageHeader:
    return read_header(BytesIO(FILES[name][0]))


def reasons_of(data: bytes) -> list[str]:
    """What the reader of headers and the decoder say against a file."""
    reasons = []
    for read in (lambda: read_header(BytesIO(data)), lambda: decode(data)):
        try:
            read()
        except UnreadableImageError as error:
            reasons.append(str(error))
    return reasons


def assert_shows(image: Image.Image, expected: Shows) -> None:
    pixels, wanted = np.asarray(image), expected.pixels
    assert image.mode == "RGB"
    assert pixels.shape == wanted.shape
    if not expected.is_lossy:
        assert np.abs(pixels.astype(int) - wanted.astype(int)).max() <= expected.tolerance
        return
    height, width = wanted.shape[:2]
    for y in (height // 4, height * 3 // 4):
        for x in (width // 4, width * 3 // 4):
            inside = pixels[y - 2 : y + 2, x - 2 : x + 2].reshape(-1, 3).mean(axis=0)
            assert np.abs(inside - wanted[y, x]).max() <= expected.tolerance, (inside, wanted[y, x])


@pytest.mark.parametrize("name", FILES)
def test_an_odd_file_is_used_rightly_or_refused_with_a_reason(name: str) -> None:
    data, expected = FILES[name]
    if isinstance(expected, Shows):
        height, width = expected.pixels.shape[:2]
        assert header_of(name).size == (width, height)
        assert_shows(decode(data), expected)
        return
    assert isinstance(expected, Bad)
    reasons = reasons_of(data)
    assert len(reasons) == (1 if expected.has_good_header else 2)
    assert all(reason and (not data or re.search(expected.reason, reason)) for reason in reasons), reasons


def test_the_header_tells_the_kind_of_picture() -> None:
    for trait, names in TRAITS.items():
        assert {name for name in names if trait not in header_of(name).traits} == set(), trait
        assert {name for name in PLAIN if trait in header_of(name).traits} == set(), trait


def test_broken_bytes_anywhere_raise_nothing_but_unreadable() -> None:
    random = np.random.default_rng(11)
    num_refused = 0
    small = {name: data for name, (data, expected) in FILES.items() if isinstance(expected, Shows) and len(data) < 9000}
    for data in (data for data in small.values() for _ in range(NUM_BROKEN)):
        broken = bytearray(data)
        for at in random.integers(0, len(data), random.integers(1, 9)):
            broken[at] = random.integers(0, 256)
        broken = broken[: random.integers(1, len(data) + 1)] if random.random() < 0.3 else broken
        with without_decoder_warnings():
            for reason in reasons_of(bytes(broken)):
                num_refused += 1
                assert reason
    assert num_refused > len(small)  # the breaking breaks


class CountingStream(BytesIO):
    """Counts what is read; `fails` makes every reading fail as a file system's or a server's would."""

    num_bytes = 0
    fails = False

    def read(self, size: int | None = -1) -> bytes:
        if self.fails:
            raise OSError(errno.EIO, "the server is gone")
        data = super().read(size)
        self.num_bytes += len(data)
        return data


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_header_needs_little_of_the_file(image_format: str) -> None:
    noise = np.random.default_rng(5).integers(0, 256, (700, 900, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise).convert("P") if image_format == "GIF" else noise, image_format)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = data if image_format in ("GIF", "BMP") else encoded(noise, image_format, exif=exif)
    for content in (data, turned):
        stream = CountingStream(content)
        assert read_header(stream).size in ((900, 700), (700, 900))
        assert len(content) > 200_000
        assert stream.num_bytes < 75_000


def test_a_stream_that_fails_is_not_a_damaged_image() -> None:
    for name in ("wrong_ending.png", "rgba.png", "p3.webp", "lzw.tif"):
        stream = CountingStream(FILES[name][0])
        stream.fails = True
        with pytest.raises(OSError, match="the server is gone"):
            read_header(stream)


@pytest.mark.skipif(sys.platform == "win32", reason="the peak is asked of the resource module")
def test_no_file_takes_much_time_or_memory() -> None:
    """Bombs are refused before their pixels have a place: 300 MB and a few seconds do for all files together."""
    code = """
import resource, sys, time
from io import BytesIO
sys.path.insert(0, sys.argv[1])
from simpletuner.data.image_index import open_index
from simpletuner.data.images import UnreadableImageError, decode, read_header, without_decoder_warnings
from tests.data.odd_images import odd_files
files = {name: data for name, (data, _) in odd_files().items()}
before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
for name, data in files.items():
    start = time.process_time()
    for read in (lambda: read_header(BytesIO(data)), lambda: decode(data)):
        try:
            read()
        except UnreadableImageError:
            pass
    slowest = max(slowest, time.process_time() - start)
scale = 1 if sys.platform == "darwin" else 1024
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * scale, slowest)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True)
    grown_bytes, slowest_s = done.stdout.split()
    assert int(grown_bytes) < 300_000_000
    assert float(slowest_s) < 3


def test_a_folder_of_odd_files_is_a_dataset_with_a_report(
    tmp_path: Path, make_plan: Callable[..., Plan], vae: Any
) -> None:
    """Everything is used or named, what only decoding shows after the first caching; and the folder stays as it was."""
    folder = tmp_path / "odd"
    written = write_odd_images(folder)
    before = state_of(folder)
    spec = DatasetSpec(
        id="odd",
        storage=LocalStorage(folder=folder),
        resize=ResizeSpec(resolution=32, aspect_bucket_alignment=8),
        captions=CaptionSpec(caption_strategy="instanceprompt", instance_prompts=("odd",)),
    )
    usable = {file.key for file in written if isinstance(file.expected, Shows)}
    good_header = {f.key for f in written if isinstance(f.expected, Bad) and f.expected.has_good_header}
    bad = {file.key: file.expected.reason for file in written if isinstance(file.expected, Bad)}
    assert len(usable) > 100
    assert len(bad) > 40

    first = make_plan(spec)
    assert keys_of(first) == usable | good_header
    with pytest.raises(PlanAgainError):
        cache(first, vae, tmp_path)
    plan = make_plan(spec)
    reasons = {item.key: item.reason for item in plan.datasets[0].unreadable}
    assert keys_of(plan) == usable
    assert reasons.keys() == bad.keys()
    assert [key for key in bad if not re.search(bad[key], reasons[key])] == []
    assert all(not item.key.startswith(".") for item in plan.datasets[0].unreadable)
    cache(plan, vae, tmp_path)
    with open_index(tmp_path / "cache") as index:
        assert index.images(spec.storage.id).keys() <= usable | bad.keys()
    assert state_of(folder) == before
    (folder / "closed.png").chmod(0o600)


def keys_of(plan: Plan) -> set[str]:
    return {sample.record.key for sample in plan.samples()}


def cache(plan: Plan, vae: Any, tmp_path: Path) -> None:
    keys = learn_latent_keys(plan, vae.id, cache_dir=tmp_path / "cache", on_progress=lambda done, total: None)
    cache_latents(
        plan,
        LatentSource(id=vae.id, open=vae.open),
        keys,
        directory_of=lambda _: tmp_path / "latents",
        cache_dir=tmp_path / "cache",
        batch_size=4,
        on_progress=lambda done, total: None,
        max_workers=1,
    )


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = status.st_size, status.st_mtime_ns
    return found
