"""Reading image files: upright, RGB, and honest about damage."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from simpletuner.data.images import UnreadableImageError, cut, decode, read_header, without_decoder_warnings
from simpletuner.data.records import Geometry, Size
from simpletuner.data.storage import EXTENSIONS

FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if ".avif" in EXTENSIONS else [])]


def read_size(data: bytes) -> Size:
    return read_header(BytesIO(data)).size


def encoded(image: Image.Image, image_format: str, *, orientation: int | None = None, **options: object) -> bytes:
    stream = BytesIO()
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    image.save(stream, image_format, **options)
    return stream.getvalue()


def colours(width: int, height: int) -> Image.Image:
    tiny = np.random.default_rng(1).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(tiny).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("image_format", FORMATS)
def test_size_and_pixels_are_those_of_the_upright_image(image_format: str, orientation: int | None) -> None:
    data = encoded(colours(48, 32), image_format, orientation=orientation)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    assert read_size(data) == upright.size == ((32, 48) if (orientation or 1) >= 5 else (48, 32))
    assert np.array_equal(np.asarray(decode(data)), np.asarray(upright))


def test_a_png_that_carries_its_orientation_behind_the_pixels_is_turned() -> None:
    data = encoded(colours(48, 32), "PNG", orientation=6)
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    tail = data.index(b"IEND") - 4
    moved = data[:start] + data[end:tail] + data[start:end] + data[tail:]
    assert read_size(moved) == decode(moved).size == (32, 48)


def test_a_broken_exif_block_counts_as_none() -> None:
    data = encoded(colours(48, 32), "JPEG", orientation=6)
    broken = data.replace(b"Exif\0\0MM\0*", b"Exif\0\0QQ\0*").replace(b"Exif\0\0II*\0", b"Exif\0\0QQ*\0")
    assert broken != data
    assert read_size(broken) == decode(broken).size == (48, 32)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_black(mode: str) -> None:
    image = Image.new("RGBA", (2, 1))
    image.putdata([(200, 200, 200, 255), (200, 200, 200, 0)])
    if mode == "RGBA":
        image.putpixel((0, 0), (200, 100, 50, 128))
    pixels = np.asarray(decode(encoded(image.convert(mode), "PNG")))
    expected = [100, 50, 25] if mode == "RGBA" else [200, 200, 200]
    assert np.abs(pixels[0, 0].astype(int) - expected).max() <= 1
    assert pixels[0, 1].tolist() == [0, 0, 0]


def test_every_kind_of_pixels_becomes_rgb() -> None:
    for mode in ["1", "L", "CMYK", "P"]:
        image = colours(16, 8).convert(mode)
        data = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
        assert np.array_equal(np.asarray(decode(data)), np.asarray(image.convert("RGB")))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    assert np.array_equal(
        np.asarray(decode(encoded(Image.fromarray(ramp), "PNG")))[..., 0], np.arange(256).reshape(16, 16)
    )


def test_floating_point_pixels_are_refused() -> None:
    data = encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(UnreadableImageError, match="no fixed range"):
        decode(data)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_found_from_the_header_already(image_format: str, part: float) -> None:
    data = encoded(colours(256, 256), image_format)
    with pytest.raises(UnreadableImageError):
        read_size(data[: int(len(data) * part)])


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_truncated_file_is_found_when_it_is_decoded(image_format: str) -> None:
    data = encoded(colours(256, 256), image_format)
    with pytest.raises(UnreadableImageError):
        decode(data[: len(data) * 2 // 3])


def test_bytes_after_the_end_mark_do_not_matter() -> None:
    data = encoded(colours(64, 64), "JPEG")
    assert read_size(data + bytes(10_000)) == (64, 64)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_not_an_image_says_so(data: bytes) -> None:
    for reader in (read_size, decode):
        with pytest.raises(UnreadableImageError, match=r"\w"):
            reader(data)


def test_every_extension_has_a_reader(tmp_path: Path) -> None:
    for extension in EXTENSIONS:
        path = tmp_path / f"image{extension}"
        colours(24, 16).save(path)
        assert read_size(path.read_bytes()) == (24, 16)


def test_the_cut_is_the_resized_images_window() -> None:
    image = colours(100, 60)
    geometry = Geometry(target=(32, 32), intermediary=(53, 32), crop=(7, 0))
    resized = np.asarray(image.resize((53, 32), Image.Resampling.LANCZOS))
    assert np.array_equal(cut(image, geometry), resized[:, 7:39])
    whole = Geometry(target=(100, 60), intermediary=(100, 60), crop=(0, 0))
    assert np.array_equal(cut(image, whole), np.asarray(image))


def test_a_very_large_image_is_read_without_a_warning() -> None:
    data = encoded(Image.new("1", (10_000, 10_000)), "PNG")  # 100 MP: above PIL's first limit, below its second
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Image.DecompressionBombWarning):
            read_size(data)
        with without_decoder_warnings():
            assert read_size(data) == (10_000, 10_000)
