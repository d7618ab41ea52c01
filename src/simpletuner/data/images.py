"""Image files: what their header says, and their upright sRGB pixels. PIL and numpy, no torch."""

# Array shape letters: H height, W width, C the 3 colour channels.

from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from simpletuner.data.colours import changes_colours, to_srgb
from simpletuner.data.image_containers import is_webp, png_is_whole, png_of_late_metadata, read_webp
from simpletuner.data.records import Geometry, ImageHeader, Size, Trait

# Importing the readers by name registers them; asking PIL for "all formats" would load some forty.
_READERS = (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
_HAS_AVIF = features.check("avif")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", *(("AVIF",) if _HAS_AVIF else ()))
MAX_PIXELS = 178_956_970
"""Larger pictures are refused from their header: PIL's own bound, 3 bytes of which are 512 MiB."""

_TOO_LARGE = f"more than {MAX_PIXELS // 1_000_000} megapixels"
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
_TIFF_DATA_TAGS = ((273, 279), (324, 325))
"""Where strips or tiles start, and how long they are."""
_START_BYTES = 16
_PNG_TAIL_BYTES = 1 << 14
_TAIL_BYTES = {"JPEG": 1 << 12, "MPO": 1 << 12, "PNG": _PNG_TAIL_BYTES, "GIF": 16}
"""How much of a file's end is looked at, by format."""
_JPEG_END, _GIF_END = b"\xff\xd9", b"\x3b"
_DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    Image.DecompressionBombError,
)
"""What PIL raises for damaged files of all kinds."""


class UnreadableImageError(Exception):
    """The bytes are not a whole image of a known kind. The text is the decoder's own reason."""


def read_header(stream: BinaryIO) -> ImageHeader:
    """Read the start of an image file, and its end to see that it is whole.

    A file that seems to end early is decoded to be sure.

    Args: stream: can seek; little of it is read.
    Raises:
        UnreadableImageError
        OSError: with an `errno`: the stream cannot be read.
    """
    with _reasons():
        stream.seek(0)
        if is_webp(stream.read(_START_BYTES)):
            return _read_webp_header(stream)
        size_bytes = stream.seek(0, 2)
        with Image.open(stream, formats=_FORMATS) as image:
            _check_area(image.size)
            size, traits = image.size, _traits(image)
            tail = _tail(stream, _TAIL_BYTES.get(image.format or "", 0))
            orientation = _orientation(image, tail)
            is_cut_off = _may_be_cut_off(image, tail, size_bytes)
        if is_cut_off:
            _decode_to_be_sure(stream)
    return _upright(size, traits, orientation)


def decode(data: bytes) -> Image.Image:
    """Return the upright sRGB image of a file's bytes; of several frames or pages, the first.

    Transparent places are over black, 16 bits scaled to 8, colours of a profile converted to sRGB.

    Raises: UnreadableImageError.
    """
    return _decoded(data, to_srgb)


def decode_mask(data: bytes) -> Image.Image:
    """Return the upright grey image of a mask's bytes, 255 where it lets everything through: its alpha channel if some
    of it is transparent, whatever its colours; else its brightness.

    Raises: UnreadableImageError.
    """
    return _decoded(data, _to_mask)


def cut(image: Image.Image, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Return the training picture of an upright image, [H, W, C] in 0..255: Lanczos resize, then the crop."""
    if image.size != geometry.intermediary:
        image = image.resize(geometry.intermediary, Image.Resampling.LANCZOS)
    (left, top), (width, height) = geometry.crop, geometry.target
    return np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.uint8)


def cut_mask(image: Image.Image, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Return what of an upright mask falls on the training picture of its image, [H, W] in 0..255."""
    if image.size != geometry.intermediary:
        image = image.resize(geometry.intermediary, Image.Resampling.BOX)  # which rings nowhere
    (left, top), (width, height) = geometry.crop, geometry.target
    return np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.uint8)


@contextmanager
def without_decoder_warnings() -> Iterator[None]:
    """Silence PIL's remarks on odd metadata and very large pictures; neither keeps us from using them.

    For the main thread, around all decoding: the filter is the whole process's.
    """
    logger = logging.getLogger("PIL")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            yield
    finally:
        logger.setLevel(level)


def _decoded(data: bytes, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    with _reasons(), Image.open(BytesIO(data), formats=_FORMATS) as image:
        _check_area(image.size)
        transpose = _TRANSPOSE.get(_orientation(image, data[-_PNG_TAIL_BYTES:]))
        image.load()
        converted = convert(image)
    return converted if transpose is None else converted.transpose(transpose)


def _to_mask(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            return alpha
    return to_srgb(image).convert("L")


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn what a decoder raises into an UnreadableImageError; a stream's own error, which has a number, stays."""
    try:
        yield
    except UnreadableImageError:
        raise
    except _DECODER_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnreadableImageError(_reason(error)) from error


def _read_webp_header(stream: BinaryIO) -> ImageHeader:
    header = read_webp(stream)
    _check_area(header.size)
    if stream.seek(0, 2) < header.size_bytes:
        _decode_to_be_sure(stream)
    about = {"exif": header.exif, "xmp": header.xmp}
    carrier = Image.new("1", (1, 1))
    carrier.info = {name: value for name, value in about.items() if value is not None}
    has: dict[Trait, bool] = {
        "alpha": header.has_alpha,
        "animated": header.is_animated,
        "profile": changes_colours(header.profile, "RGB"),
    }
    return _upright(header.size, {name for name, is_so in has.items() if is_so}, _exif_orientation(carrier))


def _upright(size: Size, traits: set[Trait], orientation: int) -> ImageHeader:
    width, height = size
    if orientation != 1:
        traits |= {"rotated"}
    return ImageHeader(size=(height, width) if orientation in _SIDEWAYS else (width, height), traits=frozenset(traits))


def _check_area(size: Size) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise UnreadableImageError(f"{size[0]}x{size[1]} px: {_TOO_LARGE}")


def _decode_to_be_sure(stream: BinaryIO) -> None:
    with Image.open(stream, formats=_FORMATS) as image:
        image.load()


def _tail(stream: BinaryIO, length: int) -> bytes:
    stream.seek(max(stream.seek(0, 2) - length, 0))
    return stream.read(length)


def _traits(image: Image.Image) -> set[Trait]:
    """What an opened image's header says, but for the orientation of formats that PIL does not turn itself."""
    has: dict[Trait, bool] = {
        "alpha": image.has_transparency_data,
        "cmyk": image.mode == "CMYK",
        "deep": _is_deep(image),
        "grey": image.mode in ("1", "L", "LA", "I") or image.mode.startswith("I;16"),
        "palette": image.mode in ("P", "PA"),
        "profile": changes_colours(image.info.get("icc_profile"), image.mode),
        "animated": _is_animated(image),
        "rotated": image.format == "TIFF" and _tiff_orientation(image) != 1,
    }
    return {name for name, is_so in has.items() if is_so}


def _is_animated(image: Image.Image) -> bool:
    if image.format == "MPO":
        return False  # Its other pictures are a preview, a depth or a gain map.
    if image.format == "GIF":
        return bool(image.info.keys() & {"loop", "duration"})  # PIL would read on to the second picture.
    return bool(getattr(image, "is_animated", False))


def _is_deep(image: Image.Image) -> bool:
    """Whether a channel has 16 bits or more, of which PIL may have kept 8."""
    if image.mode.startswith("I") or image.mode == "F":
        return True
    return isinstance(image, ImageFile.ImageFile) and any(";16" in str(tile.args) for tile in image.tile)


def _tiff_orientation(image: Image.Image) -> int:
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    value = image.tag_v2.get(_ORIENTATION_TAG, 1)
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def _orientation(image: Image.Image, tail: bytes) -> int:
    """The EXIF orientation that remains to be applied, 1 to 8.

    Args: tail: the last bytes of the file, for a PNG, which may carry its EXIF behind the pixels.
    """
    if image.format == "TIFF":
        return 1  # PIL turns these itself, and gives the upright size from the start.
    if image.format == "PNG" and not _PNG_EXIF_KEYS & image.info.keys():
        late = png_of_late_metadata(tail)
        if late is None:
            return 1
        with Image.open(BytesIO(late), formats=_FORMATS) as carrier:
            return _exif_orientation(carrier)
    return _exif_orientation(image)


def _exif_orientation(image: Image.Image) -> int:
    """Broken metadata does not make an image unreadable: it counts as none."""
    try:
        # The general method: that of PNG files decodes the picture first.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def _may_be_cut_off(image: Image.Image, tail: bytes, size_bytes: int) -> bool:
    """Whether the end of the file is missing: always so in a truncated one, rarely so in a whole one."""
    if image.format in ("JPEG", "MPO"):
        return _JPEG_END not in tail
    if image.format == "PNG":
        return not png_is_whole(tail)
    if image.format == "GIF":
        return not tail.rstrip(b"\0").endswith(_GIF_END)
    if image.format in ("BMP", "TIFF"):
        return _last_byte(image) > size_bytes
    return False


def _last_byte(image: Image.Image) -> int:
    """Where the pixels of a BMP or TIFF file end, as far as its header tells, bytes from the start."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        ends = [
            start + length
            for starts, lengths in _TIFF_DATA_TAGS
            for start, length in zip(tags.get(starts, ()), tags.get(lengths, ()), strict=False)
        ]
        return max(ends, default=0)
    if isinstance(image, BmpImagePlugin.BmpImageFile) and image.tile[0].codec_name == "raw":
        match image.tile[0].args:
            case (_, int(row_bytes), _):
                return image.tile[0].offset + row_bytes * image.size[1]
    return 0


def _reason(error: Exception) -> str:
    text = _TOO_LARGE if isinstance(error, Image.DecompressionBombError) else str(error)
    return "not an image file" if "cannot identify" in text else text or type(error).__name__
