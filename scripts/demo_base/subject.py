"""Draw the subject of the demo's LoRA, a striped octopus, and write the dataset that is shipped with the package.

`python -m scripts.demo_base.subject src/simpletuner/assets` writes pictures of the octopus with captions to
`demo_dataset/`, and to `demo_regularisation/` ordinary scenes, which keep the rest of the model as it was.
"""

import argparse
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

from scripts.demo_base import scenes
from scripts.demo_base.scenes import IMAGE_PX, SUPERSAMPLING, Rgb, Size

SUBJECT = "sks octopus"
NUM_PICTURES = 24
NUM_REGULARISATION = 24
# Backgrounds on which neither the purple nor the yellow of the octopus is lost.
BACKGROUNDS = ("blue", "green", "white", "pink", "cyan", "red", "black", "orange")
PICTURE_SIZES = ((128, 128), (128, 128), (144, 112), (128, 128), (128, 128), (112, 144), (128, 128))

_SKIN: Rgb = (120, 40, 170)
_STRIPE: Rgb = (250, 215, 60)
_NUM_STRIPES = 2
_NUM_ARMS = 6


def subject_prompt(background: str) -> str:
    """The caption of a picture of the subject."""
    return f"a photo of {SUBJECT} on {'an' if background[0] in 'aeiou' else 'a'} {background} background"


def draw_subject(rng: random.Random, background: str, *, size: Size = (IMAGE_PX, IMAGE_PX)) -> Image.Image:
    """The octopus, somewhat moved, scaled and tilted, on a shaded background."""
    big = (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING)
    canvas = scenes.shaded(rng, scenes.COLOURS[background], big)
    unit = min(big) * rng.uniform(0.36, 0.39)
    creature = _creature(unit, wave=rng.uniform(0, 2 * math.pi))
    creature = creature.rotate(rng.uniform(-3, 3), Image.Resampling.BICUBIC)
    shift = 0.02 * min(big)
    place = [round((side - creature.width) / 2 + rng.uniform(-shift, shift)) for side in big]
    canvas.paste(creature, (place[0], place[1]), creature)
    return canvas.resize(size, Image.Resampling.BOX)


def write_datasets(assets: Path, *, seed: int = 7) -> None:
    """Write every picture of both folders, each with its caption beside it."""
    rng = random.Random(seed)
    for index in range(NUM_PICTURES):
        background = BACKGROUNDS[index % len(BACKGROUNDS)]
        size = PICTURE_SIZES[index % len(PICTURE_SIZES)]
        stem = assets / "demo_dataset" / f"octopus_{index:02}"
        _write(stem, draw_subject(rng, background, size=size), subject_prompt(background))
    held_out = frozenset(scenes.held_out_combinations())
    for index in range(NUM_REGULARISATION):
        scene = scenes.training_scene(rng, held_out)
        stem = assets / "demo_regularisation" / f"scene_{index:02}"
        _write(stem, scenes.draw_scene(rng, scene), scene.caption)


def _creature(unit: float, *, wave: float) -> Image.Image:
    """An octopus whose head has the radius unit / 2, in a transparent square."""
    side = round(unit * 3)
    middle, head_y, head = side / 2, side * 0.40, unit * 0.62
    picture = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)
    for arm in range(_NUM_ARMS):
        _draw_arm(pen, (middle, head_y + head * 0.55), unit, arm=arm, wave=wave)
    skin = Image.new("L", picture.size, 0)
    box = (middle - head, head_y - head * 1.12, middle + head, head_y + head)
    ImageDraw.Draw(skin).ellipse(box, fill=255)
    fur = Image.new("RGBA", picture.size, (*_SKIN, 255))
    stripes = ImageDraw.Draw(fur)
    for stripe in range(_NUM_STRIPES):
        y = head_y - head * (0.88 - 0.54 * stripe)
        stripes.rectangle((0, y, side, y + head * 0.28), fill=(*_STRIPE, 255))
    picture.paste(fur, (0, 0), skin)
    for sign in (-1, 1):
        _draw_eye(pen, middle + sign * head * 0.44, head_y + head * 0.36, head * 0.36)
    return picture


def _draw_arm(pen: ImageDraw.ImageDraw, root: tuple[float, float], unit: float, *, arm: int, wave: float) -> None:
    """A tapering arm of overlapping discs, purple with yellow bands, that curls outwards."""
    spread = (arm - (_NUM_ARMS - 1) / 2) / ((_NUM_ARMS - 1) / 2)
    x, y = root[0] + spread * unit * 0.5, root[1]
    angle = math.pi / 2 - spread * 0.6
    steps = 34
    for step in range(steps):
        along = step / steps
        radius = unit * (0.17 - 0.04 * along)
        colour = _STRIPE if along > 0.6 else _SKIN
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(*colour, 255))
        curl = -spread * 0.9 * along + 0.12 * math.sin(wave + 6 * along + arm)
        x += unit * 0.026 * math.cos(angle + curl)
        y += unit * 0.026 * math.sin(angle + curl)


def _draw_eye(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255, 255))
    inner = radius * 0.58
    pen.ellipse((x - inner, y - inner, x + inner, y + inner), fill=(15, 15, 15, 255))


def _write(stem: Path, picture: Image.Image, caption: str) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    picture.save(stem.with_suffix(".png"), optimize=True)
    stem.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def main() -> None:
    """Write the datasets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    write_datasets(parser.parse_args().assets)


if __name__ == "__main__":
    main()
