"""The drawn world: the same seed gives the same pixels, and nothing held out is ever drawn."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from scripts.demo_base import judge, scenes, subject
from scripts.demo_base.textures import texture


def drawn(seed: int, size: scenes.Size = (128, 128)) -> tuple[bytes, str]:
    rng = random.Random(seed)
    scene = scenes.training_scene(rng, frozenset(scenes.held_out_combinations()), size=size)
    return scenes.draw_scene(rng, scene).tobytes(), scene.caption


@pytest.mark.parametrize("size", [(128, 128), (160, 96), (112, 144)])
def test_a_seed_draws_the_same_scene_again(size):
    assert drawn(3, size) == drawn(3, size)
    assert drawn(3, size) != drawn(4, size)


def test_a_seed_draws_the_same_subject_and_texture_again():
    assert subject.draw_subject(random.Random(1), "blue") == subject.draw_subject(random.Random(1), "blue")
    first, second = (np.asarray(texture(np.random.default_rng(5), size_px=32)) for _ in range(2))
    assert (first == second).all()


def test_held_out_combinations_show_every_shape_equally_often():
    held_out = scenes.held_out_combinations()
    assert len(set(held_out)) == scenes.NUM_HELD_OUT
    assert len(set(Counter(c.shape for c in held_out).values())) == 1


def test_no_training_scene_shows_a_held_out_combination():
    rng, held_out = random.Random(0), frozenset(scenes.held_out_combinations())
    for _ in range(3000):
        scene = scenes.training_scene(rng, held_out)
        shown = {scenes.Combination(colour=t.colour, shape=t.shape, background=scene.background) for t in scene.things}
        assert not shown & held_out


def test_a_caption_names_what_is_drawn():
    rng = random.Random(2)
    for _ in range(200):
        scene = scenes.training_scene(rng, frozenset())
        words = scene.caption.split()
        assert scene.caption.endswith(f"{scene.background} background")
        assert all(f"{thing.colour} {thing.shape}" in scene.caption for thing in scene.things)
        assert all(following[0] in "aeiou" for word, following in itertools.pairwise(words) if word == "an")


def test_the_judge_names_the_colours_of_drawn_scenes():
    rng = random.Random(5)
    for combination in rng.sample(scenes.all_combinations(), 40):
        picture = scenes.draw_scene(rng, scenes.plain_scene(rng, combination))
        assert judge.background_colour(picture) == combination.background
        assert judge.object_colour(picture) == combination.colour


def test_an_empty_picture_has_no_object():
    assert judge.object_colour(scenes.shaded(random.Random(0), (40, 40, 200), (128, 128))) is None


def test_an_unknown_shape_is_named_in_the_error():
    with pytest.raises(ValueError, match="no outline for the shape 'blob'"):
        scenes._outline("blob")


def test_likeness_is_one_for_a_reference_and_low_for_something_else():
    rng = random.Random(1)
    references = [subject.draw_subject(rng, "green") for _ in range(3)]
    scene = scenes.plain_scene(rng, scenes.Combination(colour="red", shape="square", background="green"))
    assert judge.likeness(references[1], references) == pytest.approx(1)
    assert judge.likeness(scenes.draw_scene(rng, scene), references) < 0.6
