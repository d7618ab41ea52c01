"""Prompt libraries and the images planned from them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import ConfigError
from simpletuner.validation.requests import MAIN_PROMPT_ID, plan_images, read_prompts, safe_name


def library(folder, content):
    path = folder / "library.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_main_prompt_comes_first_and_names_become_safe_and_unique(tmp_path):
    path = library(
        tmp_path, {"anime_<token>": "a", "anime token": "b", "validation": {"prompt": "c", "adapter_strength": 0.5}}
    )
    prompts = read_prompts("main", path)
    assert [(p.id, p.text, p.strength) for p in prompts] == [
        (MAIN_PROMPT_ID, "main", 1.0),
        ("anime_token", "a", 1.0),
        ("anime_token_2", "b", 1.0),
        ("validation_2", "c", 0.5),
    ]


def test_no_prompt_means_no_image():
    assert read_prompts(None, None) == ()
    assert read_prompts("", None) == ()


@given(st.text())
def test_a_safe_name_is_a_file_name_anywhere(nickname):
    name = safe_name(nickname)
    assert 0 < len(name) <= 64
    assert not set(name) & set('<>:"/\\|?*. \0\n')


def test_every_prompt_is_made_in_every_size_with_seeds_that_do_not_depend_on_the_others():
    prompts = read_prompts("main", None)
    requests = plan_images(prompts, sizes=[(64, 32), (32, 64)], seed=7, images_per_prompt=2)
    assert [(r.size, r.seed) for r in requests] == [((64, 32), 7), ((64, 32), 8), ((32, 64), 7), ((32, 64), 8)]
    assert len({r.file_stem(100) for r in requests}) == 4
    assert requests[1].file_stem(100) == "step_100_validation_1_64x32"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("content", "code", "expected"),
    [
        (None, "E-PROMPT-LIBRARY-MISSING", "library.json"),
        ('{"a": "b",\n  oops}', "E-PROMPT-LIBRARY-JSON", "line 2"),
        ('["a"]', "E-PROMPT-LIBRARY-JSON", "library.json"),
    ],
)
def test_a_library_that_cannot_be_read_is_explained(tmp_path, content, code, expected, language):
    path = tmp_path / "library.json" if content is None else library(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        read_prompts(None, path)
    (problem,) = caught.value.problems
    assert problem.code == code
    title, hint = render_problem(problem, language)
    assert expected in title
    assert hint


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_bad_entry_is_named_at_once(tmp_path, language):
    path = library(tmp_path, {"good": "a", "empty": " ", "number": 3, "object": {"text": "x"}})
    with pytest.raises(ConfigError) as caught:
        read_prompts(None, path)
    titles = [render_problem(problem, language)[0] for problem in caught.value.problems]
    assert len(titles) == 3
    for name, title in zip(("empty", "number", "object"), titles, strict=True):
        assert name in title
