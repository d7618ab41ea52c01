"""Damaged and odd image files, each with what must become of it.

The expectation is independent of the program and, where that matters, of PIL: the picture is four fields of known
colours, and the odd formats (16 bits, palettes with transparency, interlacing, TIFF and BMP variants, ICC profiles,
inverted CMYK) are written here byte by byte.
"""

# Array shape letters: H height, W width, C channels.

from __future__ import annotations

import os
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, features

Pixels = npt.NDArray[np.uint8]

WIDTH, HEIGHT = 40, 24
FIELDS = ((200, 40, 40), (40, 160, 60), (50, 60, 190), (230, 220, 90))
"""Colours of the upper left, upper right, lower left and lower right quarter, sRGB."""
GREYS = (30, 90, 150, 220)


@dataclass(frozen=True, kw_only=True)
class Shows:
    """The file is used, and this is its upright picture, [H, W, C]."""

    pixels: Pixels
    tolerance: int = 0
    """Largest difference of a channel; of lossy formats, of the mean inside of each field."""
    is_lossy: bool = False


@dataclass(frozen=True, kw_only=True)
class Bad:
    """The file is not used, and this is said about it (a regular expression)."""

    reason: str
    has_good_header: bool = False
    """Its fault shows only when it is decoded."""


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """It is no image at all: it is neither used nor an error."""


Expected = Shows | Bad | PassedOver


@dataclass(frozen=True, kw_only=True)
class OddFile:
    """One file and what must become of it."""

    key: str
    expected: Expected


def picture(fields: tuple[tuple[int, int, int], ...] = FIELDS, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Pixels:
    """Four fields of a colour each, [H, W, C]."""
    pixels = np.empty((size[1], size[0], 3), np.uint8)
    rows, columns = slice(0, size[1] // 2), slice(0, size[0] // 2)
    below, right = slice(size[1] // 2, None), slice(size[0] // 2, None)
    for (y, x), colour in zip(((rows, columns), (rows, right), (below, columns), (below, right)), fields, strict=True):
        pixels[y, x] = colour
    return pixels


def grey_picture() -> Pixels:
    """Four fields of grey, [H, W, C]."""
    return picture(tuple((value, value, value) for value in GREYS))


def encoded(pixels: Pixels | Image.Image, image_format: str, **options: object) -> bytes:
    """A file written by PIL."""
    stream = BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, image_format, **options)
    return stream.getvalue()


def odd_files() -> dict[str, tuple[bytes, Expected]]:
    """Every kind of content, by file name."""
    files: dict[str, tuple[bytes, Expected]] = {}
    for part in (_damaged, _jpegs, _pngs, _turned, _animated, _tiffs, _bmps, _profiles, _edges):
        for name, entry in part().items():
            assert name not in files
            files[name] = entry
    return files


def write_odd_images(folder: Path) -> tuple[OddFile, ...]:
    """Write every kind of odd file below `folder`, and every odd name and kind of directory entry."""
    written: list[OddFile] = []

    def write(key: str, data: bytes, expected: Expected) -> None:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        written.append(OddFile(key=key, expected=expected))

    for key, (data, expected) in odd_files().items():
        write(key, data, expected)
    plain, shown = encoded(picture(), "PNG"), Shows(pixels=picture())
    for key in _odd_names():
        write(key, plain, shown)
    for key in (".hidden.png", "._appledouble.jpg", ".git/inside.png"):
        write(key, plain, PassedOver())
    write("directory.png/inside.png", plain, shown)
    (folder / "empty_directory.jpg").mkdir()
    if sys.platform != "win32":
        (folder / "loop").symlink_to(folder, target_is_directory=True)
        (folder / "self.png").symlink_to(folder / "self.png")
        (folder / "broken_link.png").symlink_to(folder / "nowhere.png")
        (folder / "link.png").symlink_to(folder / "directory.png" / "inside.png")
        os.mkfifo(folder / "pipe.jpg")
        written += [
            OddFile(key="self.png", expected=Bad(reason="broken link")),
            OddFile(key="broken_link.png", expected=Bad(reason="broken link")),
            OddFile(key="link.png", expected=shown),
            OddFile(key="pipe.jpg", expected=Bad(reason="not a regular file")),
        ]
        closed = Bad(reason="ermission") if os.geteuid() else shown
        write("closed.png", plain, closed)
        (folder / "closed.png").chmod(0)
    return tuple(written)


def _odd_names() -> list[str]:
    names = [
        "UPPER.PNG",
        "Mixed.JpEg",  # the content decides, not the ending
        "ñandú 猫 🐙.png",
        "e\u0301 decomposed.png",
        "two.dots.png",
        "  spaces  .png",
        "same.png",
        "same.webp",
        "percent%20+&#.png",
    ]
    if sys.platform != "win32":  # there a path has 260 letters at most, and not every sign
        names += ["n" * 240 + ".png", "d" * 100 + "/" + "e" * 100 + "/deep.png"]
        names += ["new\nline.png", "quote\"s'.png", "back\\slash.png", "question?*.png"]
    return names


def _damaged() -> dict[str, tuple[bytes, Expected]]:
    smooth = np.random.default_rng(3).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    large = Image.fromarray(smooth).resize((400, 300), Image.Resampling.BICUBIC)
    jpeg, png, webp = encoded(large, "JPEG", quality=95), encoded(large, "PNG"), encoded(large, "WEBP")
    gif, tiff, bmp = encoded(large.convert("P"), "GIF"), encoded(large, "TIFF"), encoded(large, "BMP")
    plain = encoded(picture(), "PNG")
    idat = plain.index(b"IDAT")
    bad_checksum = bytearray(plain)
    bad_checksum[plain.index(b"IHDR") + 4 + 13] ^= 0xFF
    bad_pixels = bytearray(png)
    bad_pixels[len(png) // 2 : len(png) // 2 + 40] = bytes(40)
    text = b"this is not an image, though it is named like one\n" * 20
    files: dict[str, tuple[bytes, Expected]] = {
        "zero.jpg": (b"", Bad(reason="empty")),
        "one_byte.png": (b"\x89", Bad(reason="not an image")),
        "zeros.jpg": (bytes(5000), Bad(reason="not an image")),
        "text.jpg": (text, Bad(reason="not an image")),
        "page.png": (b"<!DOCTYPE html><html><body>403 Forbidden</body></html>", Bad(reason="not an image")),
        "film.png": (b"\0\0\0\x20ftypisom" + bytes(500), Bad(reason="not an image")),
        "vector.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', Bad(reason="not an image")),
        "archive.jpg": (b"PK\x03\x04" + bytes(200), Bad(reason="not an image")),
        "magic_only.jpg": (b"\xff\xd8\xff\xe0", Bad(reason="not an image")),
        "magic_only.png": (b"\x89PNG\r\n\x1a\n", Bad(reason=r"\w")),
        "magic_only.webp": (b"RIFF\x20\0\0\0WEBP", Bad(reason=r"\w")),
        "png_header_crc.png": (bytes(bad_checksum), Bad(reason=r"\w")),
        "png_pixels.png": (bytes(bad_pixels), Bad(reason=r"\w", has_good_header=True)),
        "png_without_pixels.png": (plain[: idat - 4] + plain[-12:], Bad(reason=r"\w", has_good_header=True)),
        "png_without_end.png": (plain[:-12], Shows(pixels=picture())),
        "png_and_junk.png": (plain + b"junk" * 5000, Shows(pixels=picture())),
        "bomb.png": (
            png_bytes(60_000, 60_000, bit_depth=8, colour_type=2, rows=b"\0" * 1000),
            Bad(reason="more than 178 megapixels"),
        ),
        "bomb_text.png": (
            png_bytes(
                1,
                1,
                bit_depth=8,
                colour_type=0,
                rows=b"\0\0",
                before=[(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000)))],
            ),
            Bad(reason="too large"),
        ),
        "bomb.webp": (webp_header(16_384, 16_384) + bytes(1000), Bad(reason="more than 178 megapixels")),
        "zero_edge.png": (png_bytes(0, 5, bit_depth=8, colour_type=2, rows=b""), Bad(reason=r"\w")),
    }
    for name, data in (("jpeg.jpg", jpeg), ("png.png", png), ("webp.webp", webp), ("gif.gif", gif)):
        stem, ending = name.split(".")
        for percent in (1, 10, 50, 90, 99):
            files[f"cut_{stem}_{percent}.{ending}"] = (data[: len(data) * percent // 100], Bad(reason=r"\w"))
    for name, data in (("tiff.tif", tiff), ("bmp.bmp", bmp)):
        files[f"cut_{name}"] = (data[: len(data) // 2], Bad(reason=r"\w"))
    return files


def _jpegs() -> dict[str, tuple[bytes, Expected]]:
    plain = picture()
    jpeg = encoded(plain, "JPEG", quality=95, subsampling=0)
    shown = Shows(pixels=plain, tolerance=6, is_lossy=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(plain, "JPEG", quality=95, subsampling=0, exif=exif)
    thumbnail = b"\xff\xe1\x10\x02Exif\0\0" + b"\xff\xd9" * 2044
    return {
        "wrong_ending.png": (jpeg, shown),
        "camera.jfif": (jpeg, shown),
        "progressive.jpg": (encoded(plain, "JPEG", quality=95, subsampling=0, progressive=True), shown),
        "subsampled.jpg": (encoded(plain, "JPEG", quality=95, subsampling=2), shown),
        "grey.jpg": (
            encoded(grey_picture()[..., 0], "JPEG", quality=95),
            Shows(pixels=grey_picture(), tolerance=3, is_lossy=True),
        ),
        "junk_after_end.jpg": (jpeg + b"\0junk" * 4000, shown),
        "no_end_mark.jpg": (jpeg[:-2], Bad(reason="truncated")),
        "cmyk.jpg": (_cmyk_jpeg(), shown),
        # Strictly inks, not their complement; but browsers show it so, and so did who saved it.
        "cmyk_without_mark.jpg": (_without_adobe_mark(_cmyk_jpeg()), shown),
        "ycck.jpg": (_ycck_jpeg(), shown),
        "empty_exif.jpg": (encoded(plain, "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0"), shown),
        "broken_exif.jpg": (turned.replace(b"MM\0*", b"QQ\0*").replace(b"II*\0", b"QQ*\0"), shown),
        "exif_nonsense.jpg": (_with_orientation(encoded, 99), shown),
        "marks_in_exif.jpg": (jpeg[:2] + thumbnail + jpeg[2:], shown),
        "two_pictures.jpg": (_mpo(), shown),
    }


def _pngs() -> dict[str, tuple[bytes, Expected]]:
    plain = picture()
    deep = plain.astype(np.uint16) * 257
    grey = np.arange(WIDTH * HEIGHT, dtype=np.uint32).reshape(HEIGHT, WIDTH) * 65_535 // (WIDTH * HEIGHT - 1)
    grey_8 = np.repeat((grey / 257).astype(np.uint8)[..., None], 3, axis=2)
    bits = (np.indices((HEIGHT, WIDTH)).sum(axis=0) // 5 % 2).astype(np.uint8)
    bits_rgb = np.repeat(bits[..., None] * 255, 3, axis=2)
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[:, ::2] = 0
    half = np.full((HEIGHT, WIDTH, 1), 128, np.uint8)
    over_black = np.where(alpha > 0, plain, 0).astype(np.uint8)
    half_black = np.round(plain * (128 / 255)).astype(np.uint8)
    numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
    numbers[: HEIGHT // 2, WIDTH // 2 :], numbers[HEIGHT // 2 :, : WIDTH // 2] = 1, 2
    numbers[HEIGHT // 2 :, WIDTH // 2 :] = 3
    palette = bytes(np.array(FIELDS, np.uint8))
    grey_plain = grey_picture()[..., :1]

    def png(rows: npt.NDArray[np.generic], colour_type: int, bit_depth: int = 8, **options: object) -> bytes:
        return png_of(rows, colour_type=colour_type, bit_depth=bit_depth, **options)  # type: ignore[arg-type]

    def field(keep: tuple[bool, ...]) -> Pixels:
        """The picture with some of its four fields black."""
        return picture(tuple(c if kept else (0, 0, 0) for c, kept in zip(FIELDS, keep, strict=True)))

    return {
        "rgb16.png": (png(deep, 2, 16), Shows(pixels=plain, tolerance=1)),
        "grey16.png": (png(grey[..., None].astype(np.uint16), 0, 16), Shows(pixels=grey_8, tolerance=1)),
        "grey_alpha16.png": (
            png(np.concatenate([grey_plain, alpha], 2).astype(np.uint16) * 257, 4, 16),
            Shows(pixels=np.where(alpha > 0, grey_picture(), 0).astype(np.uint8), tolerance=1),
        ),
        "rgba16.png": (
            png(np.concatenate([plain, alpha], 2).astype(np.uint16) * 257, 6, 16),
            Shows(pixels=over_black, tolerance=1),
        ),
        "bits.png": (png(np.packbits(bits, axis=1)[..., None], 0, 1, size=(WIDTH, HEIGHT)), Shows(pixels=bits_rgb)),
        "grey.png": (png(grey_plain, 0), Shows(pixels=grey_picture())),
        "grey_alpha.png": (
            png(np.concatenate([grey_plain, alpha], 2), 4),
            Shows(pixels=np.where(alpha > 0, grey_picture(), 0).astype(np.uint8)),
        ),
        "rgba.png": (png(np.concatenate([plain, alpha], 2), 6), Shows(pixels=over_black)),
        "rgba_half.png": (png(np.concatenate([plain, half], 2), 6), Shows(pixels=half_black, tolerance=1)),
        "palette.png": (png(numbers[..., None], 3, before=[(b"PLTE", palette)]), Shows(pixels=plain)),
        "palette_alpha.png": (
            png(numbers[..., None], 3, before=[(b"PLTE", palette), (b"tRNS", bytes([255, 0, 255, 0]))]),
            Shows(pixels=field((True, False, True, False))),
        ),
        "palette_one_transparent.png": (
            png(numbers[..., None], 3, before=[(b"PLTE", palette), (b"tRNS", b"\0")]),
            Shows(pixels=field((False, True, True, True))),
        ),
        "rgb_key_colour.png": (
            png(plain, 2, before=[(b"tRNS", struct.pack(">3H", *FIELDS[1]))]),
            Shows(pixels=field((True, False, True, True))),
        ),
        "grey_key_colour.png": (
            png(grey_plain, 0, before=[(b"tRNS", struct.pack(">H", GREYS[3]))]),
            Shows(pixels=picture(tuple((g, g, g) for g in (*GREYS[:3], 0)))),
        ),
        "interlaced.png": (interlaced_png(plain), Shows(pixels=plain)),
        "many_chunks.png": (png(plain, 2, chunk_bytes=7), Shows(pixels=plain)),
        "late_orientation.png": (
            png(np.rot90(plain).copy(), 2, after=[(b"eXIf", _exif_block(6))]),
            Shows(pixels=plain),
        ),
        "broken_text.png": (png(plain, 2, before=[(b"tEXt", b"no keyword")]), Shows(pixels=plain)),
    }


def _turned() -> dict[str, tuple[bytes, Expected]]:
    """Every orientation in every format that can carry it; the stored pixels are turned by numpy."""
    plain = picture()
    files: dict[str, tuple[bytes, Expected]] = {}
    stored = {
        1: plain,
        2: plain[:, ::-1],
        3: plain[::-1, ::-1],
        4: plain[::-1],
        5: plain.swapaxes(0, 1),
        6: np.rot90(plain, 1),
        7: plain[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(plain, -1),
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = np.ascontiguousarray(pixels)
        lossy = Shows(pixels=plain, tolerance=6, is_lossy=True)
        exact = Shows(pixels=plain)
        jpeg = encoded(pixels, "JPEG", quality=95, subsampling=0, exif=exif)
        files[f"turned_{orientation}.jpg"] = jpeg, lossy
        files[f"turned_{orientation}.png"] = encoded(pixels, "PNG", exif=exif), exact
        files[f"turned_{orientation}.webp"] = encoded(pixels, "WEBP", lossless=True, exif=exif), exact
        files[f"turned_{orientation}.tif"] = encoded(pixels, "TIFF", tiffinfo={0x0112: orientation}), exact
    if features.check("avif"):
        files["plain.avif"] = encoded(plain, "AVIF", quality=95), Shows(pixels=plain, tolerance=8, is_lossy=True)
    return files


def _animated() -> dict[str, tuple[bytes, Expected]]:
    frames = [Image.fromarray(np.roll(picture(), shift, axis=1)) for shift in (0, 10, 20)]
    options = {"save_all": True, "append_images": frames[1:], "duration": 100, "loop": 0}
    transparent = Image.new("RGBA", (WIDTH, HEIGHT), (9, 8, 7, 0))
    transparent.paste(frames[0].crop((0, 0, WIDTH // 2, HEIGHT)), (0, 0))
    half = picture()
    half[:, WIDTH // 2 :] = 0
    return {
        "animated.gif": (encoded(frames[0], "GIF", **options), Shows(pixels=picture())),
        "still.gif": (encoded(frames[0], "GIF"), Shows(pixels=picture())),
        "transparent.gif": (encoded(transparent, "GIF"), Shows(pixels=half)),
        "gif_without_end.gif": (encoded(frames[0], "GIF")[:-1], Shows(pixels=picture())),
        "animated.webp": (encoded(frames[0], "WEBP", lossless=True, **options), Shows(pixels=picture())),
        "animated.png": (encoded(frames[0], "PNG", **options), Shows(pixels=picture())),
        "transparent.webp": (encoded(transparent, "WEBP", lossless=True, exact=True), Shows(pixels=half)),
    }


def _tiffs() -> dict[str, tuple[bytes, Expected]]:
    plain = picture()
    shown = Shows(pixels=plain)
    other = Image.fromarray(np.zeros_like(plain))
    pages = encoded(plain, "TIFF", save_all=True, append_images=[other, other])
    cmyk = np.concatenate([255 - plain, np.zeros_like(plain[..., :1])], axis=2)
    return {
        "pages.tiff": (pages, shown),
        "lzw.tif": (encoded(plain, "TIFF", compression="tiff_lzw"), shown),
        "jpeg_inside.tif": (
            encoded(plain, "TIFF", compression="jpeg", quality=95),
            Shows(pixels=plain, tolerance=6, is_lossy=True),
        ),
        "rgb16.tif": (tiff_bytes(plain.astype("<u2") * 257, photometric=2), Shows(pixels=plain, tolerance=1)),
        "grey16.tif": (
            tiff_bytes(grey_picture()[..., :1].astype("<u2") * 257, photometric=1),
            Shows(pixels=grey_picture()),
        ),
        "cmyk.tif": (tiff_bytes(cmyk, photometric=5), shown),
        "lab.tif": (tiff_bytes(_lab(plain), photometric=8), Shows(pixels=plain, tolerance=4)),
        "ycbcr.tif": (tiff_bytes(_ycc(plain), photometric=6), Shows(pixels=plain, tolerance=2)),
        "float.tif": (
            tiff_bytes((grey_picture()[..., :1] / 255).astype("<f4"), photometric=1, sample_format=3),
            Bad(reason="no fixed range", has_good_header=True),
        ),
        "int32.tif": (
            tiff_bytes(grey_picture()[..., :1].astype("<i4"), photometric=1, sample_format=2),
            Bad(reason="no fixed range", has_good_header=True),
        ),
    }


def _bmps() -> dict[str, tuple[bytes, Expected]]:
    plain = picture()
    numbers = np.repeat(np.repeat(np.array([[0, 1], [2, 3]], np.uint8), HEIGHT // 2, 0), WIDTH // 2, 1)
    blue_first = plain[..., ::-1]
    padded = np.concatenate([blue_first, np.full_like(plain[..., :1], 255)], axis=2)
    five_six_five = (
        (plain[..., 0].astype("<u2") >> 3 << 11) | (plain[..., 1].astype("<u2") >> 2 << 5) | plain[..., 2] >> 3
    ).astype("<u2")
    palette = b"".join(bytes([b, g, r, 0]) for r, g, b in FIELDS)
    return {
        "bottom_up.bmp": (bmp_bytes(blue_first[::-1], bits=24), Shows(pixels=plain)),
        "top_down.bmp": (bmp_bytes(blue_first, bits=24, top_down=True), Shows(pixels=plain)),
        "bits32.bmp": (bmp_bytes(padded[::-1], bits=32), Shows(pixels=plain)),
        "palette.bmp": (bmp_bytes(numbers[::-1], bits=8, palette=palette), Shows(pixels=plain)),
        "bits16.bmp": (
            bmp_bytes(five_six_five[::-1], bits=16, masks=(0xF800, 0x07E0, 0x001F)),
            Shows(pixels=plain, tolerance=8),
        ),
    }


def _profiles() -> dict[str, tuple[bytes, Expected]]:
    plain, grey = picture(), grey_picture()
    p3, adobe = wide_profile("p3"), wide_profile("adobe")
    shown = Shows(pixels=plain)
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[:, ::2] = 0
    p3_plain = _to_profile(plain, "p3")
    rgba = np.concatenate([p3_plain, alpha], axis=2)
    linear = np.round(255 * _linear(grey / 255)).astype(np.uint8)
    return {
        "p3.png": (encoded(p3_plain, "PNG", icc_profile=p3), Shows(pixels=plain, tolerance=3)),
        "p3.jpg": (
            encoded(p3_plain, "JPEG", quality=95, subsampling=0, icc_profile=p3),
            Shows(pixels=plain, tolerance=8, is_lossy=True),
        ),
        "p3.webp": (encoded(p3_plain, "WEBP", lossless=True, icc_profile=p3), Shows(pixels=plain, tolerance=3)),
        "p3.tif": (encoded(p3_plain, "TIFF", icc_profile=p3), Shows(pixels=plain, tolerance=3)),
        "p3_alpha.png": (
            encoded(rgba, "PNG", icc_profile=p3),
            Shows(pixels=np.where(alpha > 0, plain, 0).astype(np.uint8), tolerance=3),
        ),
        "adobe_rgb.png": (
            encoded(_to_profile(plain, "adobe"), "PNG", icc_profile=adobe),
            Shows(pixels=plain, tolerance=3),
        ),
        "srgb.png": (encoded(plain, "PNG", icc_profile=wide_profile("srgb")), shown),
        "linear_grey.png": (
            encoded(linear[..., 0], "PNG", icc_profile=grey_profile(1.0)),
            Shows(pixels=grey, tolerance=4),
        ),
        "grey_profile_on_rgb.png": (encoded(plain, "PNG", icc_profile=grey_profile(1.0)), shown),
        "rgb_profile_on_grey.png": (encoded(grey[..., 0], "PNG", icc_profile=p3), Shows(pixels=grey)),
        "nonsense_profile.png": (encoded(plain, "PNG", icc_profile=b"no profile" * 30), shown),
        "cut_profile.png": (encoded(plain, "PNG", icc_profile=p3[:200]), shown),
    }


def _edges() -> dict[str, tuple[bytes, Expected]]:
    def flat(width: int, height: int) -> Pixels:
        return np.full((height, width, 3), (90, 120, 150), np.uint8)

    sizes = {"one_pixel.png": (1, 1), "tall.png": (1, 5000), "wide.png": (5000, 1), "two.png": (2, 3)}
    return {name: (encoded(flat(*size), "PNG"), Shows(pixels=flat(*size))) for name, size in sizes.items()}


def png_bytes(
    width: int,
    height: int,
    *,
    bit_depth: int,
    colour_type: int,
    rows: bytes,
    interlace: int = 0,
    before: list[tuple[bytes, bytes]] | None = None,
    after: list[tuple[bytes, bytes]] | None = None,
    chunk_bytes: int | None = None,
) -> bytes:
    """A PNG of `rows` (with their filter bytes); `before` and `after` are chunks around the pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packed = zlib.compress(rows)
    step = chunk_bytes or len(packed)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, interlace)),
            *(chunk(name, content) for name, content in before or []),
            *(chunk(b"IDAT", packed[at : at + step]) for at in range(0, len(packed), step)),
            *(chunk(name, content) for name, content in after or []),
            chunk(b"IEND", b""),
        ]
    )


def png_of(
    pixels_HWC: npt.NDArray[np.generic],
    *,
    colour_type: int,
    bit_depth: int,
    size: tuple[int, int] | None = None,
    before: list[tuple[bytes, bytes]] | None = None,
    after: list[tuple[bytes, bytes]] | None = None,
    chunk_bytes: int | None = None,
) -> bytes:
    """A PNG of an array, big-endian, without row filters."""
    height, width = pixels_HWC.shape[:2]
    big = pixels_HWC.astype(">u2") if bit_depth == 16 else pixels_HWC
    rows = b"".join(b"\0" + big[y].tobytes() for y in range(height))
    width, height = size or (width, height)
    return png_bytes(
        width,
        height,
        bit_depth=bit_depth,
        colour_type=colour_type,
        rows=rows,
        before=before,
        after=after,
        chunk_bytes=chunk_bytes,
    )


def interlaced_png(pixels_HWC: Pixels) -> bytes:
    """A PNG in the seven passes of Adam7."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = b"".join(
        b"\0" + row.tobytes() for left, top, dx, dy in passes for row in pixels_HWC[top::dy, left::dx] if row.size
    )
    height, width = pixels_HWC.shape[:2]
    return png_bytes(width, height, bit_depth=8, colour_type=2, rows=rows, interlace=1)


def webp_header(width: int, height: int) -> bytes:
    """The start of an extended WebP file with a canvas of this size."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + (1000).to_bytes(4, "little") + b"WEBPVP8X" + (10).to_bytes(4, "little") + bytes(4) + canvas


def tiff_bytes(pixels_HWC: npt.NDArray[np.generic], *, photometric: int, sample_format: int = 1) -> bytes:
    """An uncompressed little-endian TIFF in one strip."""
    height, width, channels = pixels_HWC.shape
    bits = pixels_HWC.dtype.itemsize * 8
    data = pixels_HWC.tobytes()
    at_extra = 8 + len(data)
    extra = struct.pack(f"<{channels}H", *[bits] * channels) + struct.pack(f"<{channels}H", *[sample_format] * channels)
    extra += struct.pack("<HH", 1, 1)
    short, long = 3, 4

    def shorts(tag: int, count: int, value: int, offset: int) -> tuple[int, int, int, int]:
        return tag, short, count, value if count * 2 <= 4 else offset

    entries = [
        (256, long, 1, width),
        (257, long, 1, height),
        shorts(258, channels, bits if channels == 1 else bits | bits << 16, at_extra),
        (259, short, 1, 1),
        (262, short, 1, photometric),
        (273, long, 1, 8),
        (277, short, 1, channels),
        (278, long, 1, height),
        (279, long, 1, len(data)),
        (284, short, 1, 1),
        shorts(
            339,
            channels,
            sample_format if channels == 1 else sample_format | sample_format << 16,
            at_extra + 2 * channels,
        ),
    ]
    if photometric == 6:
        entries.append((530, short, 2, 1 | 1 << 16))
    entries.sort()
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", at_extra + len(extra)) + data + extra + directory + bytes(4)


def bmp_bytes(
    rows: npt.NDArray[np.generic],
    *,
    bits: int,
    top_down: bool = False,
    palette: bytes = b"",
    masks: tuple[int, ...] = (),
) -> bytes:
    """A BMP whose rows are stored as given (the first is the lowest, but for `top_down`)."""
    height, width = rows.shape[:2]
    data = b"".join(row.tobytes().ljust(-(-width * bits // 32) * 4, b"\0") for row in rows)
    fields = b"".join(mask.to_bytes(4, "little") for mask in masks)
    offset = 14 + 40 + len(fields) + len(palette)
    header = struct.pack(
        "<IiiHHIIiiII",
        40,
        width,
        -height if top_down else height,
        1,
        bits,
        3 if masks else 0,
        len(data),
        2835,
        2835,
        len(palette) // 4,
        0,
    )
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + header + fields + palette + data


# Colour profiles ------------------------------------------------------------------------------------------------

_COLORANTS = {
    # Columns: red, green, blue; rows: X, Y, Z; relative to D50, as profiles have them.
    "srgb": ((0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410)),
    "p3": ((0.51512, 0.29198, 0.15710), (0.24120, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407)),
    "adobe": ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457)),
}
_ADOBE_GAMMA = 563 / 256
_D50 = (0.9642, 1.0, 0.8249)


def wide_profile(name: str) -> bytes:
    """A display profile of three colourants and a curve."""
    curve = _curve_of_gamma(_ADOBE_GAMMA) if name == "adobe" else _curve_of_srgb()
    columns = np.array(_COLORANTS[name]).T
    tags = {b"wtpt": _xyz(_D50)}
    for letter, column in zip("rgb", columns, strict=True):
        tags[f"{letter}XYZ".encode()] = _xyz(tuple(column))
        tags[f"{letter}TRC".encode()] = curve
    return _profile(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    """A profile of one grey channel."""
    return _profile(b"GRAY", {b"wtpt": _xyz(_D50), b"kTRC": _curve_of_gamma(gamma)})


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"desc": _description(b"odd"), b"cprt": b"text\0\0\0\0none\0", **tags}
    at = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content = content.ljust(-(-len(content) // 4) * 4, b"\0")
        table += name + struct.pack(">II", at + len(data), len(content))
        data += content
    header = struct.pack(">I4sI4s4s4s", at + len(data), b"\0\0\0\0", 0x04000000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(4 + 4 + 4 + 4 + 8 + 4)
    header += b"".join(_fixed(value) for value in _D50)
    return header.ljust(128, b"\0") + table + data


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65_536))


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(_fixed(value) for value in values)


def _curve_of_gamma(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def _curve_of_srgb() -> bytes:
    values = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + b"".join(_fixed(value) for value in values)


def _description(text: bytes) -> bytes:
    utf16 = text.decode().encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(utf16), 28) + utf16


def _linear(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """sRGB's curve, from code values to light, both 0..1."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _encoded_srgb(light: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055)


def _to_profile(pixels_HWC: Pixels, name: str) -> Pixels:
    """The numbers that mean the colours of sRGB `pixels_HWC` in another profile."""
    matrix = np.linalg.inv(np.array(_COLORANTS[name])) @ np.array(_COLORANTS["srgb"])
    light = np.clip(_linear(pixels_HWC / 255) @ matrix.T, 0, 1)
    values = light ** (1 / _ADOBE_GAMMA) if name == "adobe" else _encoded_srgb(light)
    return np.round(values * 255).astype(np.uint8)


def _lab(pixels_HWC: Pixels) -> Pixels:
    """CIE L*a*b* (D50) as TIFF stores it: L in 0..255, a and b as signed bytes."""
    xyz = _linear(pixels_HWC / 255) @ np.array(_COLORANTS["srgb"]).T / np.array(_D50)
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    lightness = 116 * root[..., 1] - 16
    a, b = 500 * (root[..., 0] - root[..., 1]), 200 * (root[..., 1] - root[..., 2])
    return np.stack([np.round(lightness * 2.55), np.round(a) % 256, np.round(b) % 256], axis=2).astype(np.uint8)


def _ycc(pixels_HWC: Pixels) -> Pixels:
    """JPEG's luma and chroma of RGB."""
    red, green, blue = (pixels_HWC[..., i].astype(float) for i in range(3))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    blueness, redness = 128 + (blue - luma) / 1.772, 128 + (red - luma) / 1.402
    return np.clip(np.round(np.stack([luma, blueness, redness], axis=2)), 0, 255).astype(np.uint8)


# JPEGs that PIL would not write by itself ------------------------------------------------------------------------


def _cmyk_of(pixels_HWC: Pixels) -> Pixels:
    """Inks (0 none, 255 full) that show `pixels_HWC` without black."""
    return np.concatenate([255 - pixels_HWC, np.zeros_like(pixels_HWC[..., :1])], axis=2)


def _raw_cmyk_jpeg(stored_HWC: Pixels) -> bytes:
    """A JPEG of four channels with these numbers in it, and Adobe's mark. PIL writes the complement of what it gets."""
    image = Image.frombytes("CMYK", (stored_HWC.shape[1], stored_HWC.shape[0]), (255 - stored_HWC).tobytes())
    return encoded(image, "JPEG", quality=98, subsampling=0)


def _cmyk_jpeg() -> bytes:
    """The complement of the inks, as Adobe's programs store them."""
    return _raw_cmyk_jpeg(255 - _cmyk_of(picture()))


def _ycck_jpeg() -> bytes:
    """The inks' complement as luma and chroma, black apart; Adobe's mark says so with transform 2.

    A decoder makes R, G, B of the first three and takes 255 minus them for inks, which are the complement again.
    """
    inks = _cmyk_of(picture())
    stored = np.concatenate([_ycc(inks[..., :3]), 255 - inks[..., 3:]], axis=2)
    data = bytearray(_raw_cmyk_jpeg(stored))
    mark = data.index(b"Adobe")
    data[mark + 11] = 2
    return bytes(data)


def _without_adobe_mark(data: bytes) -> bytes:
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


def _mpo() -> bytes:
    first, second = Image.fromarray(picture()), Image.new("RGB", (WIDTH, HEIGHT))
    return encoded(first, "MPO", save_all=True, append_images=[second], quality=95, subsampling=0)


def _exif_block(orientation: int) -> bytes:
    return b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + bytes(4)


def _with_orientation(encode: Callable[..., bytes], orientation: int) -> bytes:
    exif = b"Exif\0\0" + _exif_block(orientation)
    return encode(picture(), "JPEG", quality=95, subsampling=0, exif=exif)
