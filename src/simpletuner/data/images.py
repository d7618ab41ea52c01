"""Image files: what their header says, and their upright RGB pixels. PIL and numpy, no torch.

Everything works on a file's bytes, which the caller has read once (and hashed).
"""

# Array shape letters: H height, W width, C the 3 colour channels.

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from simpletuner.data.records import Geometry, Size

# Importing the readers by name registers them; asking PIL for "all formats" would load some forty.
_READERS = (AvifImagePlugin, BmpImagePlugin, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)
_HAS_AVIF = features.check("avif")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", *(("AVIF",) if _HAS_AVIF else ()))
EXTENSIONS = (".bmp", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", *((".avif",) if _HAS_AVIF else ()))
"""File name endings that count as images, in lower case."""

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_PNG_EXIF_KEYS = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}
_PNG_TEXT = {b"eXIf", b"iTXt", b"zTXt"}
_PNG_SIGNATURE_BYTES = 8
_PNG_CHUNK_BYTES = 12
_DECODER_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
_METADATA_ERRORS = (*_DECODER_ERRORS, KeyError, IndexError, TypeError, OverflowError)


class UnreadableImageError(Exception):
    """The bytes are not a whole image of a known kind. The text is the decoder's own reason."""


def read_size(data: bytes) -> Size:
    """Return the upright size of an image from its header, px.

    A file that seems to end early is decoded to be sure.

    Raises: UnreadableImageError.
    """
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if _orientation(image, data) in _SIDEWAYS:
                width, height = height, width
            if _may_be_cut_off(image.format, data):
                image.load()
    except _DECODER_ERRORS as error:
        raise UnreadableImageError(_reason(error)) from error
    return width, height


def decode(data: bytes) -> Image.Image:
    """Return the upright RGB image; transparent places over black, 16-bit grey scaled to 8 bit.

    Raises: UnreadableImageError.
    """
    try:
        with Image.open(BytesIO(data), formats=_FORMATS) as image:
            transpose = _TRANSPOSE.get(_orientation(image, data))
            image.load()
            rgb = _to_rgb(image)
    except _DECODER_ERRORS as error:
        raise UnreadableImageError(_reason(error)) from error
    return rgb if transpose is None else rgb.transpose(transpose)


def cut(image: Image.Image, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Return the training picture of an upright image, [H, W, C] in 0..255: Lanczos resize, then the crop."""
    if image.size != geometry.intermediary:
        image = image.resize(geometry.intermediary, Image.Resampling.LANCZOS)
    (left, top), (width, height) = geometry.crop, geometry.target
    return np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.uint8)


@contextmanager
def without_decoder_warnings() -> Iterator[None]:
    """Silence PIL's remarks on odd metadata and very large pictures; neither keeps us from using them.

    For the main thread, around all decoding: the filter is the whole process's.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _orientation(image: Image.Image, data: bytes) -> int:
    """The EXIF orientation that remains to be applied, 1 to 8. Broken metadata does not make an image unreadable."""
    if image.format == "TIFF":
        return 1  # PIL turns these itself, and gives the upright size from the start.
    if image.format == "PNG" and not _PNG_EXIF_KEYS & image.info.keys() and not _PNG_TEXT & set(_png_chunks(data)):
        return 1  # Spares a decode: PIL looks for a PNG's EXIF behind its pixels too.
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _METADATA_ERRORS:
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def _may_be_cut_off(image_format: str | None, data: bytes) -> bool:
    """Whether the end mark of the format is missing: always so in a truncated file, rarely so in a whole one."""
    if image_format in ("JPEG", "MPO"):
        return b"\xff\xd9" not in data[-4096:]
    if image_format == "PNG":
        return b"IEND" not in _png_chunks(data)
    if image_format == "WEBP":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    return False


def _png_chunks(data: bytes) -> list[bytes]:
    """The types of a PNG's chunks in order, without reading what is in them."""
    types: list[bytes] = []
    at = _PNG_SIGNATURE_BYTES
    while at + _PNG_CHUNK_BYTES <= len(data):
        types.append(data[at + 4 : at + 8])
        at += _PNG_CHUNK_BYTES + int.from_bytes(data[at : at + 4], "big")
    return types


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # PIL would clip instead of scale, and give a white picture.
        image = Image.fromarray((np.asarray(image, dtype=np.uint32) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of kind {image.mode!r} (32 bits per channel) have no fixed range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    text = str(error)
    return "not an image file" if "cannot identify" in text else text or type(error).__name__
