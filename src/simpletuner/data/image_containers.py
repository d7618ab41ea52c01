"""What the containers of WebP and PNG files say beside the pixels, from a few bytes of the file. No PIL.

PIL reads a WebP file whole, and decodes a PNG, to tell what stands here in plain sight.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import BinaryIO

from simpletuner.data.records import Size

_WEBP_START_BYTES = 30
_WEBP_FIRST_CHUNK = 12
_RIFF_CHUNK_HEAD_BYTES = 8
_VP8X_ANIMATED, _VP8X_XMP, _VP8X_EXIF, _VP8X_ALPHA, _VP8X_PROFILE = 0x02, 0x04, 0x08, 0x10, 0x20
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"
_PNG_METADATA = (b"eXIf", b"iTXt", b"zTXt", b"tEXt")
_PNG_TYPE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class WebpHeader:
    """A WebP file as its chunks describe it; `size` is the canvas's, not turned, px."""

    size: Size
    size_bytes: int
    """What the whole file should have at least."""
    is_animated: bool
    has_alpha: bool
    exif: bytes | None
    xmp: bytes | None
    profile: bytes | None


def is_webp(start: bytes) -> bool:
    """Whether a file that begins with `start` (12 bytes or more) is a WebP file."""
    return start[:4] == b"RIFF" and start[8:12] == b"WEBP"


def read_webp(stream: BinaryIO) -> WebpHeader:
    """Read the header of a WebP file, and of its metadata what the header announces.

    Raises: ValueError: it is none.
    """
    stream.seek(0)
    start = stream.read(_WEBP_START_BYTES)
    kind, payload = start[12:16], start[20:]
    size_bytes = int.from_bytes(start[4:8], "little") + _RIFF_CHUNK_HEAD_BYTES
    flags = 0
    if kind == b"VP8X" and len(payload) >= 10:
        flags = payload[0]
        size = int.from_bytes(payload[4:7], "little") + 1, int.from_bytes(payload[7:10], "little") + 1
    elif kind == b"VP8 " and payload[3:6] == b"\x9d\x01\x2a" and len(payload) >= 10:
        size = int.from_bytes(payload[6:8], "little") & 0x3FFF, int.from_bytes(payload[8:10], "little") & 0x3FFF
    elif kind == b"VP8L" and payload[:1] == b"\x2f" and len(payload) >= 5:
        bits = int.from_bytes(payload[1:5], "little")
        size = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        flags = _VP8X_ALPHA if bits >> 28 & 1 else 0
    else:
        raise ValueError("damaged WebP header")
    wanted = {
        name for name, flag in ((b"EXIF", _VP8X_EXIF), (b"XMP ", _VP8X_XMP), (b"ICCP", _VP8X_PROFILE)) if flags & flag
    }
    found = _read_riff_chunks(stream, wanted, size_bytes)
    return WebpHeader(
        size=size,
        size_bytes=size_bytes,
        is_animated=bool(flags & _VP8X_ANIMATED),
        has_alpha=bool(flags & _VP8X_ALPHA),
        exif=found.get(b"EXIF"),
        xmp=found.get(b"XMP "),
        profile=found.get(b"ICCP"),
    )


def png_is_whole(tail: bytes) -> bool:
    """Whether the end of a PNG file, and perhaps something behind it, is in `tail`."""
    return _PNG_END in tail


def png_of_late_metadata(tail: bytes) -> bytes | None:
    """A PNG of one pixel with the metadata that stands behind the pixels in `tail`; None if there is none.

    A chunk counts if its checksum is right, so that pixels are not mistaken for one.
    """
    chunks = [
        chunk
        for name in _PNG_METADATA
        for at in _positions(tail, name)
        if (chunk := _whole_chunk(tail, at)) is not None
    ]
    if not chunks:
        return None
    pixel = bytes([0, 0, 0, 1, 0, 0, 0, 1, 8, 0, 0, 0, 0])
    return b"".join(
        [
            _PNG_SIGNATURE,
            _chunk(b"IHDR", pixel),
            *chunks,
            _chunk(b"IDAT", zlib.compress(bytes(2))),
            _chunk(b"IEND", b""),
        ]
    )


def _read_riff_chunks(stream: BinaryIO, wanted: set[bytes], size_bytes: int) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    at = _WEBP_FIRST_CHUNK
    while wanted - found.keys() and at + _RIFF_CHUNK_HEAD_BYTES <= size_bytes:
        stream.seek(at)
        head = stream.read(_RIFF_CHUNK_HEAD_BYTES)
        if len(head) < _RIFF_CHUNK_HEAD_BYTES:
            break
        length = int.from_bytes(head[4:], "little")
        if head[:4] in wanted:
            found.setdefault(head[:4], stream.read(length))
        at += _RIFF_CHUNK_HEAD_BYTES + length + length % 2
    return found


def _positions(data: bytes, part: bytes) -> list[int]:
    positions: list[int] = []
    at = data.find(part)
    while at >= 0:
        positions.append(at)
        at = data.find(part, at + 1)
    return positions


def _whole_chunk(data: bytes, type_at: int) -> bytes | None:
    """The chunk whose type stands at `type_at`, if it lies in `data` and its checksum is right."""
    start = type_at - 4
    if start < 0:
        return None
    end = type_at + _PNG_TYPE_BYTES + int.from_bytes(data[start:type_at], "big")
    if end + 4 > len(data) or zlib.crc32(data[type_at:end]) != int.from_bytes(data[end : end + 4], "big"):
        return None
    return data[start : end + 4]


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + name + content + checksum
