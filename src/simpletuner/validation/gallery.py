"""What validation leaves on disk: images, an index of them, and a sheet that shows before and after side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from simpletuner.events.oserrors import os_errors_as_problems
from simpletuner.validation.requests import ImageRequest

FOLDER = "validation_images"
INDEX_NAME = "validation.jsonl"
SHEET_NAME = "contact_sheet.png"

_CELL_PX = 256  # shorter images are shown enlarged to it
_MARGIN_PX = 8
_TEXT_PX = 14
_MAX_SHEET_ROWS = 48


@dataclass(frozen=True, kw_only=True)
class GalleryEntry:
    """One line of the index. `file` is relative to the gallery's folder."""

    file: str
    step: int  # finished updates; 0 is the base model
    prompt_id: str
    prompt: str
    negative_prompt: str
    seed: int
    width_px: int
    height_px: int
    guidance: float  # Z-Image's scale: 0 is off
    num_inference_steps: int
    shift: float
    adapter_strength: float  # 0: base model
    is_averaged: bool = False  # the moving average of the weights, not the weights themselves

    def shows(self, request: ImageRequest) -> bool:
        """Whether this entry is that image, at whatever step."""
        return (self.prompt, self.seed, (self.width_px, self.height_px)) == (
            request.prompt.text,
            request.seed,
            request.size,
        )


class Gallery:
    """The validation images of one run directory."""

    def __init__(self, output_dir: Path, *, image_format: str = "png") -> None:
        self.folder = output_dir / FOLDER
        self._suffix = {"jpeg": ".jpg"}.get(image_format, f".{image_format}")

    @property
    def sheet(self) -> Path:
        """Where the contact sheet is, once it is drawn."""
        return self.folder / SHEET_NAME

    def path_for(self, request: ImageRequest, step: int, *, is_averaged: bool = False) -> Path:
        return self.folder / f"{request.file_stem(step)}{'_ema' if is_averaged else ''}{self._suffix}"

    def entries(self) -> list[GalleryEntry]:
        """The index, oldest first; entries whose image is gone, and a torn last line, are left out."""
        index = self.folder / INDEX_NAME
        if not index.is_file():
            return []
        found: dict[str, GalleryEntry] = {}
        for line in index.read_text(encoding="utf-8").splitlines():
            try:
                entry = GalleryEntry(**json.loads(line))
            except (ValueError, TypeError):
                continue
            if (self.folder / entry.file).is_file():
                found.pop(entry.file, None)
                found[entry.file] = entry
        return list(found.values())

    def add(self, image: Image.Image, entry: GalleryEntry) -> Path:
        """Write the image, whole or not at all, then its line in the index."""
        path = self.folder / entry.file
        with os_errors_as_problems(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            building = path.with_name(f".{path.name}")
            image.save(building, format=_pillow_format(path), quality=90)
            building.replace(path)
            with (self.folder / INDEX_NAME).open("a", encoding="utf-8") as index:
                index.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")
                index.flush()
                os.fsync(index.fileno())
        return path

    def write_contact_sheet(
        self, columns: Mapping[str, int], requests: Sequence[ImageRequest], *, averaged: Collection[str] = ()
    ) -> Path | None:
        """Draw one row per request and one column per step.

        Args:
            columns: heading -> step, left to right.
            averaged: the headings of columns that show the moving average.
        Returns:
            The sheet, or None if no column has an image.
        """
        entries = self.entries()
        rows = []
        for request in requests[:_MAX_SHEET_ROWS]:
            shown = {
                (entry.step, entry.is_averaged): self.folder / entry.file for entry in entries if entry.shows(request)
            }
            files = [shown.get((step, heading in averaged)) for heading, step in columns.items()]
            rows.append((f"{request.prompt.text}   seed {request.seed}", files))
        if not any(file for _, files in rows for file in files):
            return None
        sheet = _draw_sheet(list(columns), rows)
        path = self.sheet
        with os_errors_as_problems(path):
            building = path.with_name(f".{path.name}")
            sheet.save(building, format="PNG")
            building.replace(path)
        return path


def _draw_sheet(headings: Sequence[str], rows: Sequence[tuple[str, Sequence[Path | None]]]) -> Image.Image:
    """Blocks of one prompt each, its images side by side and its text below, in up to three columns."""
    font = ImageFont.load_default(_TEXT_PX)
    line = _TEXT_PX + _MARGIN_PX
    images = [[_load_cell(file) for file in files] for _, files in rows]
    height = line + max(image.height for row in images for image in row if image) + line + _MARGIN_PX
    width = len(headings) * (_CELL_PX + _MARGIN_PX) + _MARGIN_PX
    per_row = min(len(rows), 3 if len(rows) > 6 else 2 if len(rows) > 2 else 1)
    num_rows = -(-len(rows) // per_row)
    sheet = Image.new("RGB", (per_row * width + _MARGIN_PX, num_rows * height + _MARGIN_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for index, ((label, _), row) in enumerate(zip(rows, images, strict=True)):
        left = _MARGIN_PX + index % per_row * width
        top = _MARGIN_PX + index // per_row * height
        for column, (heading, image) in enumerate(zip(headings, row, strict=True)):
            x = left + column * (_CELL_PX + _MARGIN_PX)
            draw.text((x, top), heading, fill="#777", font=font)
            if image:
                sheet.paste(image, (x, top + line))
        tallest = max((image.height for image in row if image), default=0)
        text = _shorten(label, draw, font, width - 2 * _MARGIN_PX)
        draw.text((left, top + line + tallest + 4), text, fill="black", font=font)
    return sheet


def _load_cell(file: Path | None) -> Image.Image | None:
    if file is None:
        return None
    with Image.open(file) as image:
        picture = image.convert("RGB")
    factor = _CELL_PX / picture.width
    return picture.resize((_CELL_PX, max(1, round(picture.height * factor))), Image.Resampling.LANCZOS)


def _shorten(
    label: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    while draw.textlength(label, font) > width and len(label) > 4:
        label = label[: len(label) * 9 // 10 - 3] + "..."
    return label


def _pillow_format(path: Path) -> str:
    return {".jpg": "JPEG", ".webp": "WEBP"}.get(path.suffix, "PNG")
