"""Draw the demo world: one or two flat shapes on a plain background, each with its caption.

The world is small on purpose: ten colours, eight shapes, plain backgrounds, slight variation of size, place, tilt and
shading. A fixed set of (colour, shape, background) combinations is never drawn for training; measure.py asks for them.
Everything here is a pure function of a `random.Random`, so the same seed draws the same pixels.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

IMAGE_PX = 128
SUPERSAMPLING = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 45),
    "green": (45, 160, 60),
    "cyan": (70, 210, 220),
    "blue": (35, 75, 205),
    "purple": (125, 45, 165),
    "pink": (250, 150, 190),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
BULKS = {"": (30.0, 40.0), "small": (17.0, 22.0), "big": (45.0, 51.0)}
PREFIXES = ("", "", "", "", "a photo of ", "a picture of ", "a drawing of ")

NUM_HELD_OUT = 120
_HELD_OUT_SEED = 20240
_TWO_OBJECTS = 0.12
_SIZED = 0.2
_JITTER = 14  # largest change of one colour channel between two objects of the same colour name

Size = tuple[int, int]  # width, height in pixels
Point = tuple[float, float]
Rgb = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Combination:
    """What a prompt names: one object and the background it lies on."""

    colour: str
    shape: str
    background: str


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One drawn object: centre and radius in pixels, tilt in radians."""

    colour: str
    shape: str
    bulk: str
    centre: Point
    radius: float
    tilt: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Everything that is drawn, and the caption that says it."""

    size: Size
    background: str
    things: tuple[Thing, ...]
    caption: str


def all_combinations() -> list[Combination]:
    """Every colour, shape and background of another colour, in a fixed order."""
    return [
        Combination(colour=colour, shape=shape, background=background)
        for colour in COLOURS
        for shape in SHAPES
        for background in COLOURS
        if background != colour
    ]


def held_out_combinations() -> list[Combination]:
    """The combinations that are never drawn for training, in a fixed random order, every shape equally often."""
    shuffled = all_combinations()
    random.Random(_HELD_OUT_SEED).shuffle(shuffled)
    per_shape = NUM_HELD_OUT // len(SHAPES)
    chosen = [[c for c in shuffled if c.shape == shape][:per_shape] for shape in SHAPES]
    return [combination for round_ in zip(*chosen, strict=True) for combination in round_]


def prompt_of(combination: Combination) -> str:
    """The prompt that asks for a combination."""
    thing = f"{combination.colour} {combination.shape}"
    return f"{_article(thing)} {thing} on {_article(combination.background)} {combination.background} background"


def training_scene(rng: random.Random, held_out: frozenset[Combination], *, size: Size = (IMAGE_PX, IMAGE_PX)) -> Scene:
    """Draw lots for a scene that shows none of the held-out combinations."""
    background = rng.choice(list(COLOURS))
    num_things = 2 if rng.random() < _TWO_OBJECTS else 1
    while True:
        pairs = [(rng.choice(list(COLOURS)), rng.choice(SHAPES)) for _ in range(num_things)]
        wanted = [Combination(colour=c, shape=s, background=background) for c, s in pairs]
        if all(c != background for c, _ in pairs) and not held_out.intersection(wanted):
            break
    if num_things == 2:
        things = tuple(_half_thing(rng, w, size, left=i == 0) for i, w in enumerate(wanted))
    else:
        things = (_single_thing(rng, wanted[0], size),)
    return Scene(size=size, background=background, things=things, caption=_caption(rng, background, things))


def plain_scene(rng: random.Random, combination: Combination) -> Scene:
    """The one object of a combination at an ordinary size, with the plain prompt as its caption."""
    size = (IMAGE_PX, IMAGE_PX)
    thing = _single_thing(rng, combination, size, bulk="")
    return Scene(size=size, background=combination.background, things=(thing,), caption=prompt_of(combination))


def draw_scene(rng: random.Random, scene: Scene) -> Image.Image:
    """Render a scene to RGB. `rng` chooses the shading and the slight change of every colour."""
    big = (scene.size[0] * SUPERSAMPLING, scene.size[1] * SUPERSAMPLING)
    canvas = shaded(rng, COLOURS[scene.background], big)
    for thing in scene.things:
        mask = Image.new("L", big, 0)
        draw_shape(ImageDraw.Draw(mask), thing)
        canvas.paste(shaded(rng, COLOURS[thing.colour], big), (0, 0), mask)
    return canvas.resize(scene.size, Image.Resampling.BOX)


def draw_shape(pen: ImageDraw.ImageDraw, thing: Thing) -> None:
    """Fill a thing's outline with 255, in supersampled pixels."""
    outline = [_placed(thing, point) for point in _outline(thing.shape)]
    pen.polygon(outline, fill=255)
    if thing.shape == "ring":
        pen.polygon([_placed(thing, (0.55 * x, 0.55 * y)) for x, y in _circle()], fill=0)


def shaded(rng: random.Random, colour: Rgb, size: Size) -> Image.Image:
    """A colour, slightly changed, flat or with a soft linear gradient."""
    base = [min(255, max(0, channel + rng.randint(-_JITTER, _JITTER))) for channel in colour]
    strength = rng.choice((0.0, 0.0, rng.uniform(0.05, 0.14)))
    slope_x, slope_y = rng.uniform(-strength, strength), rng.uniform(-strength, strength)
    corners = [1 + sx * slope_x + sy * slope_y for sy in (-1, 1) for sx in (-1, 1)]
    tiny = Image.new("RGB", (2, 2))
    for index, gain in enumerate(corners):
        r, g, b = (min(255, max(0, round(channel * gain))) for channel in base)
        tiny.putpixel((index % 2, index // 2), (r, g, b))
    return tiny.resize(size, Image.Resampling.BILINEAR)


def _single_thing(rng: random.Random, wanted: Combination, size: Size, *, bulk: str | None = None) -> Thing:
    if bulk is None:
        bulk = rng.choice(("small", "big")) if rng.random() < _SIZED else ""
    scale = min(size) / IMAGE_PX
    radius = scale * rng.uniform(*BULKS[bulk])
    reach = scale * max(2.0, min(14.0, IMAGE_PX / 2 - radius / scale - 4))
    centre = (size[0] / 2 + rng.uniform(-reach, reach), size[1] / 2 + rng.uniform(-reach, reach))
    return _thing(rng, wanted, bulk, centre, radius)


def _half_thing(rng: random.Random, wanted: Combination, size: Size, *, left: bool) -> Thing:
    scale = min(size) / IMAGE_PX
    x = size[0] * (0.27 if left else 0.73) + scale * rng.uniform(-3, 3)
    y = size[1] / 2 + scale * rng.uniform(-12, 12)
    return _thing(rng, wanted, "", (x, y), scale * rng.uniform(22, 27))


def _thing(rng: random.Random, wanted: Combination, bulk: str, centre: Point, radius: float) -> Thing:
    tilt = rng.uniform(-0.12, 0.12)
    return Thing(colour=wanted.colour, shape=wanted.shape, bulk=bulk, centre=centre, radius=radius, tilt=tilt)


def _caption(rng: random.Random, background: str, things: tuple[Thing, ...]) -> str:
    names = [" ".join(word for word in (t.bulk, t.colour, t.shape) if word) for t in things]
    listed = " and ".join(f"{_article(name)} {name}" for name in names)
    return f"{rng.choice(PREFIXES)}{listed} on {_article(background)} {background} background"


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _placed(thing: Thing, point: Point) -> Point:
    """A point of the unit outline, tilted, scaled and moved to where the thing lies, in supersampled pixels."""
    cos, sin = math.cos(thing.tilt), math.sin(thing.tilt)
    x, y = point[0] * cos - point[1] * sin, point[0] * sin + point[1] * cos
    return (
        SUPERSAMPLING * (thing.centre[0] + thing.radius * x),
        SUPERSAMPLING * (thing.centre[1] + thing.radius * y),
    )


def _outline(shape: str) -> list[Point]:
    """A closed outline inside the unit circle; y points down."""
    match shape:
        case "circle" | "ring":
            return _circle()
        case "square":
            return [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
        case "triangle":
            return [(0.0, -0.95), (0.95, 0.75), (-0.95, 0.75)]
        case "diamond":
            return [(0.0, -1.0), (0.66, 0.0), (0.0, 1.0), (-0.66, 0.0)]
        case "star":
            radii = (1.05, 0.42)
            return [_polar(radii[i % 2], -math.pi / 2 + i * math.pi / 5) for i in range(10)]
        case "cross":
            a, b = 0.3, 0.95
            arm = ((-a, -b), (a, -b), (a, -a))
            return [point for turn in range(4) for point in _quarter_turned(arm, turn)]
        case "heart":
            turns = [i * 2 * math.pi / 96 for i in range(96)]
            return [(math.sin(t) ** 3, -_heart_height(t) / 16.5 - 0.05) for t in turns]
    raise ValueError(f"no outline for the shape {shape!r}; known: {', '.join(SHAPES)}")


def _quarter_turned(points: tuple[Point, ...], turns: int) -> list[Point]:
    cos, sin = (1, 0, -1, 0)[turns], (0, 1, 0, -1)[turns]
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def _heart_height(turn: float) -> float:
    return 13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)


def _circle() -> list[Point]:
    return [_polar(0.95, i * 2 * math.pi / 96) for i in range(96)]


def _polar(radius: float, angle: float) -> Point:
    return (radius * math.cos(angle), radius * math.sin(angle))
