"""The command line of `simpletuner generate`: help, and mistakes that show before anything heavy is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.cli import generate as command
from simpletuner.cli.main import main
from simpletuner.problems import ExitCode
from simpletuner.train.trained import MODEL_FOLDER


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_help_tells_of_every_flag(capsys):
    for language in ("en", "es"):
        assert main(["generate", "--help", "--lang", language]) == 0
        told = capsys.readouterr().out
        for flag in (
            "--prompt",
            "--negative",
            "--lora",
            "--seed",
            "--size",
            "--steps",
            "--guidance",
            "--cfg",
            "--grid",
        ):
            assert flag in told


@pytest.mark.parametrize("language", ["en", "es"])
@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--cfg", "much", "-p", "x"], "E-GENERATE-USAGE", "much"),
        (["--flavour", "demo"], "E-GENERATE-NO-PROMPT", "--prompt"),
        (["--flavour", "demo", "-p", "x", "--steps", "0"], "E-VALUE-RANGE", "validation_num_inference_steps"),
        (["--flavour", "dmo", "-p", "x"], "E-VALUE-CHOICE", "demo"),
        (["--flavour", "demo", "-p", "x", "--prmpt", "y"], "E-KEY-MISSPELT", "--prompt"),
        (["--flavour", "demo", "-p", "x", "--step", "8"], "E-KEY-MISSPELT", "--steps"),
        (["--flavour", "demo", "-p", "x", "--lora_rnk", "8"], "E-KEY-MISSPELT", "lora_rank"),
        (["--flavour", "demo", "-p", "x", "--lora", "none.safetensors"], "E-MODEL-PATH  --lora", "none.safetensors"),
        (["--flavour", "demo", "-p", "x", "--base_model_precision", "int8dq-torchao"], "E-PRECISION-GRADIENTS", "int8"),
    ],
)
def test_a_mistake_is_told_at_once(capsys, words, code, told, language):
    assert main(["generate", *words, "--lang", language]) != ExitCode.OK
    error = capsys.readouterr().err
    assert code in error
    assert told in error


def test_embeddings_are_kept_with_the_run_or_once_for_all_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMPLETUNER_STATE_DIR", str(tmp_path / "state"))

    def cache_dir(*words):
        own, rest = command._parser().parse_known_args(["-p", "x", *words])
        return Path(command._load(rest, own).datasets.text_embeds.cache_dir)

    assert cache_dir("--flavour", "demo") == tmp_path / "state" / "prompts"
    assert cache_dir("--flavour", "demo", "--cache_dir", "own") == tmp_path / "own" / "text"
    (tmp_path / "config.json").write_text('{"model_flavour": "demo", "output_dir": "out"}')  # its datasets are gone
    assert cache_dir() == tmp_path / "out" / "cache" / "text"


def test_a_run_of_all_weights_has_its_result_or_its_newest_checkpoint(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-11-broken"):
        (tmp_path / name / "transformer").mkdir(parents=True)
        (tmp_path / name / "transformer" / "config.json").touch()
    assert [path.parent.name for path in command.trained_models(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").touch()
    assert command.trained_models(tmp_path)[-1] == tmp_path / "transformer"
    assert command._MODEL_FOLDER == MODEL_FOLDER
