"""What a user sees when something is wrong: one clear message, an exit code, nothing half-written."""

from __future__ import annotations

import pytest

from simpletuner.problems import ExitCode


def outcome(project, *arguments, language="en"):
    done = project.run("train", *arguments, SIMPLETUNER_LANG=language)
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return done.returncode, done.stderr


def truncate(path, num_bytes=300):
    path.write_bytes(path.read_bytes()[:num_bytes])


@pytest.mark.parametrize(
    ("language", "hint"), [("en", "Put the images there"), ("es", "Pon ahí las imágenes")], ids=["en", "es"]
)
def test_an_empty_folder(project, language, hint):
    for path in (project.root / "datasets" / "subject").iterdir():
        path.unlink()
    code, said = outcome(project, language=language)
    assert code == ExitCode.DATASET
    assert "no images detected in dataset" in said
    assert hint in said


def test_a_missing_folder_a_corrupt_image_and_an_empty_caption_are_all_named(project):
    images = project.root / "datasets" / "subject"
    truncate(images / "image_3.png")
    (images / "image_5.txt").write_text("  \n")
    (images / "image_6.txt").unlink()
    code, said = outcome(project)
    assert code == ExitCode.DATASET
    for name in ("image_3.png", "image_5", "image_6"):
        assert name in said
    project.set_dataset(instance_data_dir="datasets/sujbect")
    code, said = outcome(project)
    assert code == ExitCode.DATASET
    assert "sujbect" in said


@pytest.mark.slow
def test_a_model_that_is_not_there_and_one_that_is_damaged(project, tmp_path):
    code, said = outcome(project, "--pretrained_model_name_or_path", "models/z-image-turbo")
    assert code in (ExitCode.ENVIRONMENT, ExitCode.HUB)
    assert "models/z-image-turbo" in said


def test_wrong_json_names_file_line_and_column(project):
    path = project.root / "config" / "config.json"
    path.write_text('{\n  "lora_rank": 4,\n  "seed" 3\n}')
    code, said = outcome(project)
    assert code == ExitCode.USAGE
    assert "config/config.json:3:10" in said


def test_every_problem_of_a_configuration_at_once(project):
    project.set(lora_rank="sixteen", optimiser="adamw", validation_resolution="1000x1000")
    code, said = outcome(project, "--max_grad_norm=-1")
    assert code == ExitCode.USAGE
    for name in ("sixteen", "optimizer", "1000x1000", "max_grad_norm"):
        assert name in said


def test_an_output_folder_that_cannot_be_made(project):
    (project.root / "taken").write_text("a file, not a folder")
    code, said = outcome(project, "--output_dir", "taken/run")
    assert code == ExitCode.ENVIRONMENT
    assert "taken" in said
    assert (project.root / "taken").read_text() == "a file, not a folder"


@pytest.mark.slow
def test_debug_shows_the_traceback(project):
    done = project.run("train", "--debug", "--device", "cuda:99")
    assert done.returncode == ExitCode.USAGE
    assert "E-DEVICE-NOT-FOUND" in done.stderr
    assert "Traceback" in done.stderr
