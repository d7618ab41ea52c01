"""The gallery: images, index and sheet."""

from __future__ import annotations

import pytest
from PIL import Image

from simpletuner.validation.gallery import Gallery, GalleryEntry
from simpletuner.validation.requests import ImageRequest, Prompt


def request(text="a cat", seed=1, size=(32, 16)) -> ImageRequest:
    return ImageRequest(prompt=Prompt(id="cat", text=text), size=size, seed=seed, index=0)


def add(gallery, wanted, step, colour, *, is_averaged=False):
    entry = GalleryEntry(
        file=gallery.path_for(wanted, step, is_averaged=is_averaged).name,
        step=step,
        prompt_id=wanted.prompt.id,
        prompt=wanted.prompt.text,
        negative_prompt="",
        seed=wanted.seed,
        width_px=wanted.size[0],
        height_px=wanted.size[1],
        guidance=0.0,
        num_inference_steps=8,
        shift=3.0,
        adapter_strength=1.0,
        is_averaged=is_averaged,
    )
    return gallery.add(Image.new("RGB", wanted.size, colour), entry), entry


def test_what_was_added_is_listed_once_in_order_and_only_while_its_image_is_there(tmp_path):
    gallery = Gallery(tmp_path)
    _, first = add(gallery, request(), 0, "red")
    path, second = add(gallery, request(), 10, "blue")
    add(gallery, request(), 0, "green")
    assert gallery.entries() == [second, first]
    path.unlink()
    assert gallery.entries() == [first]
    index = tmp_path / "validation_images" / "validation.jsonl"
    index.write_text(index.read_text() + '{"file": "torn')
    assert gallery.entries() == [first]


@pytest.mark.parametrize(("image_format", "suffix"), [("png", ".png"), ("webp", ".webp"), ("jpeg", ".jpg")])
def test_images_have_the_format_that_was_asked_for(tmp_path, image_format, suffix):
    path, _ = add(Gallery(tmp_path, image_format=image_format), request(), 1, "red")
    assert path.suffix == suffix
    with Image.open(path) as image:
        assert image.format == {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}[image_format]
        assert image.size == (32, 16)
    assert not list(path.parent.glob(".*"))


def test_the_sheet_shows_each_step_in_its_column(tmp_path):
    gallery = Gallery(tmp_path)
    wanted = [request(), request(text="a dog" * 200, seed=2)]
    for step, colour in ((0, (200, 0, 0)), (10, (0, 0, 200))):
        add(gallery, wanted[0], step, colour)
    assert gallery.write_contact_sheet({"base": 0, "step 10": 10}, wanted) == gallery.sheet
    with Image.open(gallery.sheet) as sheet:
        pixels = sheet.convert("RGB")
        colours = [pixels.getpixel((x, 60)) for x in (100, 364)]
    assert colours == [(200, 0, 0), (0, 0, 200)]


def test_averaged_weights_have_files_and_a_column_of_their_own(tmp_path):
    gallery = Gallery(tmp_path)
    add(gallery, request(), 10, (200, 0, 0))
    path, entry = add(gallery, request(), 10, (0, 0, 200), is_averaged=True)
    assert path.stem.endswith("_ema") and len(gallery.entries()) == 2 and gallery.entries()[1] == entry
    gallery.write_contact_sheet({"step 10": 10, "step 10 EMA": 10}, [request()], averaged=("step 10 EMA",))
    with Image.open(gallery.sheet) as sheet:
        pixels = sheet.convert("RGB")
        assert [pixels.getpixel((x, 60)) for x in (100, 364)] == [(200, 0, 0), (0, 0, 200)]


def test_no_image_no_sheet(tmp_path):
    assert Gallery(tmp_path).write_contact_sheet({"base": 0}, [request()]) is None
    assert Gallery(tmp_path).entries() == []
