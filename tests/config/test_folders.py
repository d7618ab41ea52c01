"""Folders of datasets that are not there, and prompts that still are the example's."""

from __future__ import annotations

import pytest

from simpletuner.config import load_run_config
from simpletuner.config.placeholder import SUBJECT_PLACEHOLDER
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import ConfigError, DatasetError, ExitCode


def test_a_missing_folder_is_told_with_its_line_and_the_exit_code_of_a_dataset(project):
    with pytest.raises(DatasetError) as caught:
        project.load(check_folders=True)
    (problem,) = caught.value.problems
    assert caught.value.exit_code is ExitCode.DATASET
    assert (problem.code, problem.origin) == ("E-DATASET-FOLDER-MISSING", "config/multidatabackend.json:4")
    for language in LANGUAGES:
        title = render_problem(problem, language)[0]
        assert 'no images detected in dataset "subject"' in title
        assert str(project.folder / "datasets" / "subject") in title
    (project.folder / "datasets" / "subject").mkdir(parents=True)
    project.load(check_folders=True)


def test_a_missing_folder_is_told_together_with_all_other_problems(with_config):
    project = with_config({"lora_rnk": 4})
    with pytest.raises(ConfigError) as caught:
        project.load(check_folders=True)
    assert {problem.code for problem in caught.value.problems} == {"E-KEY-MISSPELT", "E-DATASET-FOLDER-MISSING"}


def test_one_folder_of_two_datasets_is_told_once_and_a_disabled_one_never(with_datasets):
    entry = {"instance_data_dir": "gone"}
    project = with_datasets([{"id": "a", **entry}, {"id": "b", **entry}, {"id": "c", "disabled": True, **entry}])
    with pytest.raises(DatasetError) as caught:
        project.load(check_folders=True)
    assert [problem.params["id"] for problem in caught.value.problems] == ["a"]


def test_a_run_checks_the_folders_unless_told_otherwise(project):
    with pytest.raises(DatasetError):
        load_run_config([], environ={}, cwd=project.folder)


def test_the_examples_words_are_warned_of_wherever_a_prompt_stands(project):
    project.write(
        "config/multidatabackend.json",
        [
            {"id": "a", "instance_data_dir": "x", "instance_prompt": [SUBJECT_PLACEHOLDER, "a dog"]},
            {"id": "b", "instance_data_dir": "x", "instance_prompt": "a photo of sks dog"},
            {"id": "c", "instance_data_dir": "x"},
        ],
    )
    project.write("prompts.json", {"portrait": f"a portrait of {SUBJECT_PLACEHOLDER}"})
    options = {"validation_prompt": SUBJECT_PLACEHOLDER, "instance_prompt": f"a photo of {SUBJECT_PLACEHOLDER}"}
    project.write("config/config.json", {**options, "user_prompt_library": "prompts.json"})
    warned = [problem for problem in project.problems() if problem.code == "W-PLACEHOLDER"]
    assert {problem.params["key"]: problem.origin for problem in warned} == {
        "validation_prompt": "config/config.json:2",
        "instance_prompt": "config/config.json:3",
        "user_prompt_library": "config/config.json:4",
        "a.instance_prompt": "config/multidatabackend.json:5",
    }


def test_a_prompt_of_ones_own_is_not_warned_of(with_config, with_datasets):
    with_datasets(instance_prompt="a photo of sks dog")
    project = with_config(validation_prompt="a photo of sks dog on a beach", validation_disable=False)
    assert project.codes() == []
    options = {"validation_prompt": SUBJECT_PLACEHOLDER, "validation_disable": True}  # no images: nobody reads it
    assert with_config(options).codes() == []
