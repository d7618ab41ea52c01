"""What the words of `simpletuner generate` ask for, and what they cannot."""

from __future__ import annotations

import json
from itertools import product

import pytest

from simpletuner.generate.request import (
    MAX_IMAGES,
    AdapterChoice,
    Axis,
    Setup,
    in_working_order,
    parse_adapter,
    parse_axis,
    plan_shots,
    read_prompt_file,
    written_prompts,
)
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import ConfigError
from simpletuner.validation.requests import Prompt

SETUP = Setup(steps=8, guidance=2.0, shift=3.0, negative_prompt="")
CAT = (Prompt(id="cat", text="a cat"),)


def shots(*axes, prompts=CAT, sizes=((64, 64),), seed=5, num=1):
    return plan_shots(prompts, sizes=sizes, seed=seed, num=num, setup=SETUP, axes=axes)


@pytest.mark.parametrize(
    ("written", "place", "strength"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors@0.8", "a.safetensors", 0.8),
        ("me@home/a@-1", "me@home/a", -1.0),
        ("me@home/a.safetensors", "me@home/a.safetensors", 1.0),
        (r"C:\\loras\\a.safetensors@2", r"C:\\loras\\a.safetensors", 2.0),
    ],
)
def test_an_adapter_and_its_strength(written, place, strength):
    assert parse_adapter(written) == AdapterChoice(place=place, strength=strength)


def test_the_values_of_an_axis():
    assert parse_axis("strength=0, 0.5,1,1") == Axis(name="strength", values=(0.0, 0.5, 1.0))
    assert parse_axis("Seed=3") == Axis(name="seed", values=(3,))
    assert parse_axis("checkpoint") == Axis(name="checkpoint", values=())
    assert parse_axis("checkpoint=base,200") == Axis(name="checkpoint", values=("base", "200"))


def test_every_combination_is_one_shot_in_its_own_place():
    strength, seed = Axis(name="strength", values=(0.0, 0.5, 1.0)), Axis(name="seed", values=(1, 2))
    found = shots(strength, seed, prompts=written_prompts(["a cat", "a dog"]))
    asked = {(shot.request.prompt.text, shot.setup.strength, shot.request.seed) for shot in found}
    assert asked == set(product(["a cat", "a dog"], (0.0, 0.5, 1.0), (1, 2)))
    assert {(shot.column, shot.row) for shot in found} == set(product(range(3), range(4)))
    assert all(shot.setup.strength == strength.values[shot.column] for shot in found)
    assert [shot.values for shot in found[:3]] == [(0.0, 1), (0.5, 1), (1.0, 1)]


def test_several_images_of_a_prompt_have_seeds_of_their_own():
    assert [shot.request.seed for shot in shots(num=3)] == [5, 6, 7]
    assert [shot.column for shot in shots(num=3)] == [0, 1, 2]
    steps = Axis(name="steps", values=(1, 2))
    assert [(shot.request.seed, shot.setup.steps) for shot in shots(steps, num=2)] == [(5, 1), (5, 2), (6, 1), (6, 2)]


def test_a_prompts_own_strength_multiplies_that_of_the_grid():
    prompt = Prompt(id="slider", text="a cat", strength=-0.5)
    found = shots(Axis(name="strength", values=(0.0, 2.0)), prompts=(prompt,))
    assert [shot.setup.strength for shot in found] == [0.0, -1.0]


def test_a_checkpoint_is_loaded_once():
    axes = (
        Axis(name="seed", values=(1, 2)),
        Axis(name="checkpoint", values=("1", "2")),
        Axis(name="steps", values=(1, 2)),
    )
    order = [setup.checkpoint for setup, _ in in_working_order(shots(*axes))]
    assert order == ["1", "1", "2", "2"]
    assert sum(len(group) for _, group in in_working_order(shots(*axes))) == 8


def test_prompts_from_files(tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("a cat in a hat\n\n  a dog: big & small \n", encoding="utf-8")
    assert [(p.id, p.text) for p in read_prompt_file(lines)] == [
        ("a_cat_in_a_hat", "a cat in a hat"),
        ("a_dog_big_small", "a dog: big & small"),
    ]
    library = tmp_path / "prompts.json"
    library.write_text(json.dumps({"cat": "a cat"}))
    assert [(p.id, p.text) for p in read_prompt_file(library)] == [("cat", "a cat")]


@pytest.mark.parametrize("text", ["word " * 50, "w" * 99, "..."])
def test_a_name_is_never_long_or_empty(text):
    (prompt,) = written_prompts([text])
    assert 0 < len(prompt.id) <= 40
    assert prompt.text == text


BAD = {
    "E-GENERATE-ADAPTER": (lambda: parse_adapter("@0.8"), ["@0.8", "style.safetensors@0.8"]),
    "E-GENERATE-AXIS": (lambda: parse_axis("stregth=1"), ["stregth", "strength"]),
    "E-GENERATE-VALUE": (lambda: parse_axis("steps=8,x"), ["x", "steps=8,20,30"]),
    "E-GENERATE-AXIS-TWICE": (lambda: shots(parse_axis("seed=1"), parse_axis("seed=2")), ["seed"]),
    "E-GENERATE-NO-PROMPT": (lambda: shots(prompts=()), ["--prompt", "validation_prompt"]),
    "E-GENERATE-MANY": (lambda: shots(num=MAX_IMAGES + 1), [str(MAX_IMAGES + 1), str(MAX_IMAGES)]),
}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("code", BAD)
def test_what_cannot_be_made_is_told(code, language):
    provoke, words = BAD[code]
    with pytest.raises(ConfigError) as caught:
        provoke()
    (problem,) = caught.value.problems
    assert problem.code == code
    told = " ".join(map(str, render_problem(problem, language)))
    assert all(word in told for word in words), told


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", ["missing.txt", "bytes.txt"])
def test_a_prompt_file_that_cannot_be_read_is_told(tmp_path, name, language):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError) as caught:
        read_prompt_file(tmp_path / name)
    assert name in render_problem(caught.value.problems[0], language)[0]


@pytest.mark.parametrize("written", ["steps=0", "steps=1.5", "guidance=-1", "guidance=nan", "seed=", "shift=0"])
def test_values_outside_their_range_are_refused(written):
    with pytest.raises(ConfigError) as caught:
        parse_axis(written)
    assert caught.value.problems[0].code == "E-GENERATE-VALUE"
