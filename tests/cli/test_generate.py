"""The command line of `simpletuner generate`: help, and mistakes that show before anything heavy is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.cli import generate as command
from simpletuner.cli.main import main
from simpletuner.problems import ConfigError, ExitCode


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


def test_a_run_of_all_weights_shows_its_own_model(tmp_path):
    """The finished one, before that the newest checkpoint's, and no adapter beside it."""
    run = tmp_path / "run"
    (run / "checkpoint-x").mkdir(parents=True)
    (run / "config.json").write_text('{"model_type": "full", "model_flavour": "demo", "max_grad_norm": 0}')
    (run / "run.json").write_text("{}")
    own = command._parser().parse_args([])
    with pytest.raises(ConfigError) as error:
        command._load(["run/config.json"], own)
    assert error.value.problems[0].code == "E-GENERATE-EMPTY-RUN"
    for place in ("checkpoint-2", "checkpoint-10", "."):
        (run / place / "transformer").mkdir(parents=True)
        (run / place / "transformer/config.json").write_text("{}")
        loaded = command._load(["run/config.json"], own)
        assert loaded.config.model.pretrained_transformer_model_name_or_path == str(run / place)
        assert loaded.config.model.pretrained_transformer_subfolder == "transformer"
        assert command._choices([], loaded) == []
