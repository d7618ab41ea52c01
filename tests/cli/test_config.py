import json
import subprocess
import sys

import pytest

from simpletuner.cli.config import run
from simpletuner.cli.main import main
from simpletuner.config.root import options
from simpletuner.problems import ExitCode


@pytest.fixture(autouse=True)
def project(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMPLETUNER_LANG", "en")
    monkeypatch.setenv("NO_COLOR", "1")
    for name in ("ENV", "SIMPLETUNER_ENV", "SIMPLETUNER_ENVIRONMENT", "CONFIG_PATH", "TRAINER_EXTRA_ARGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "image.png").write_bytes(b"looked at by its name only")
    (tmp_path / "config/config.json").write_text('{\n "lora_rank": 4,\n "validation_disable": true\n}')
    (tmp_path / "config/multidatabackend.json").write_text('[{"id": "a", "instance_data_dir": "x"}]')
    return tmp_path


def test_a_valid_configuration(capsys):
    assert main(["config", "validate"]) == 0
    out, err = capsys.readouterr()
    assert out == "✓ config/config.json: no errors. Datasets: 1. Warnings: 0.\n"
    assert err == ""


@pytest.mark.parametrize("language", ["en", "es"])
def test_a_dataset_without_images_is_an_error_as_it_is_for_a_run(project, capsys, language):
    (project / "x" / "image.png").unlink()
    assert main(["config", "validate", "--lang", language]) == main(["train", "--lang", language]) == ExitCode.DATASET
    assert capsys.readouterr().err.count('✗ E-DATASET-EMPTY\n  no images detected in dataset "a"') == 2
    (project / "x").rmdir()
    assert main(["config", "validate", "--lang", language]) == main(["train", "--lang", language]) == ExitCode.DATASET
    told = '✗ E-DATASET-FOLDER-MISSING  config/multidatabackend.json:1\n  no images detected in dataset "a"'
    assert capsys.readouterr().err.count(told) == 2
    assert main(["config", "show"]) == 0
    assert main(["config", "validate", "--json", "--lang", language]) == ExitCode.DATASET
    assert '"code": "E-DATASET-FOLDER-MISSING"' in capsys.readouterr().out


def test_validating_loads_no_torch_and_writes_nothing(project):
    code = (
        "import sys\nfrom simpletuner.cli.main import main\nmain(['config', 'validate'])\nprint('torch' in sys.modules)"
    )
    before = sorted(project.rglob("*"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert sorted(project.rglob("*")) == before


def test_a_broken_one_in_spanish(project, capsys):
    (project / "config/config.json").write_text('{\n "lora_rnk": 4,\n "seed": "x"\n}')
    assert main(["config", "validate", "--lang", "es"]) == ExitCode.USAGE
    assert capsys.readouterr().err == (
        "✗ E-KEY-MISSPELT  config/config.json:2\n"
        "  La opción lora_rnk no existe. ¿Quisiste decir lora_rank?\n"
        "  Corrige el nombre o quítala.\n"
        "  Arreglo:  lora_rank=4\n"
        "\n"
        "✗ E-VALUE-INTEGER  config/config.json:3\n"
        "  seed es un número entero, no x.\n"
        "\n"
        "⚠ W-NO-PROMPT\n"
        "  No hay ningún prompt de validación, así que no habrá imágenes de validación.\n"
        "  Define validation_prompt o user_prompt_library.\n"
        "  Arreglo:  validation_disable=true\n"
    )


@pytest.mark.parametrize(("language", "words"), [("en", "cannot train it"), ("es", "no puede entrenarla")])
def test_what_cannot_be_trained_yet_is_valid_but_said(capsys, language, words):
    assert main(["config", "validate", "--num_processes=2", "--lang", language]) == 0
    out, err = capsys.readouterr()
    assert "⚠ E-VALUE-NOT-YET  --num_processes" in err
    assert words in out


def test_problems_as_data(project, capsys):
    assert run(["validate", "--json", "--lora_rnk=4"], "es") == ExitCode.USAGE
    (problem,) = json.loads(capsys.readouterr().out)
    assert problem["code"] == "E-KEY-MISSPELT"
    assert problem["path"] == "/lora_rnk"
    assert problem["fixes"] == [{"key": "lora_rank", "value": "4"}]
    assert problem["title"].startswith("La opción lora_rnk")
    assert run(["validate", "--json"], "en") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_show_with_origins(capsys):
    assert run(["show", "--origin", "--seed=3"], "en") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Searched: config.json, config.toml, config.env, config/config.json"
    shown = {line.split(" = ")[0]: line for line in lines if " = " in line}
    assert shown.keys() == options().keys()
    assert shown["lora_rank"].split() == ["lora_rank", "=", "4", "<-", "config/config.json:2"]
    assert shown["seed"].split() == ["seed", "=", "3", "<-", "--seed"]
    assert shown["lora_dropout"].split()[3:] == ["<-", "default"]
    assert shown["validation_guidance"].endswith("<- flavour turbo-ostris-v2")


def test_show_only_what_changed(capsys):
    assert run(["show", "--changed"], "en") == 0
    out = capsys.readouterr().out
    assert "lora_rank = 4\n" in out
    assert "lora_dropout" not in out


def test_show_as_json_is_a_configuration(project, capsys):
    assert run(["show", "--json"], "en") == 0
    (project / "effective.json").write_text(capsys.readouterr().out)
    assert run(["validate", "effective.json"], "en") == 0


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_rank", ["--lora_rank", ">= 1, <= 1024"]),
        ("--validation_steps", ["validation_step_interval"]),
        ("repeats", ["multidatabackend.json, image"]),
        ("resolution", ["--resolution", "multidatabackend.json, image"]),
        ("ramtorch", ["ramtorch"]),
        ("slider_strength", ["slider_strength"]),
        ("caption_shuffle", ["position_start: ", ">= 1, <= 100"]),
    ],
)
@pytest.mark.parametrize("language", ["en", "es"])
def test_explain(capsys, key, words, language):
    assert run(["explain", key], language) == 0
    page = capsys.readouterr().out
    assert all(word in page for word in words)


@pytest.mark.parametrize("name", options())
def test_explain_knows_every_option(capsys, name):
    assert run(["explain", name], "es") == 0
    assert f"{name}  (--{name})" in capsys.readouterr().out


def test_explain_guesses(capsys):
    assert main(["config", "explain", "lora_rnk"]) == ExitCode.USAGE
    assert "Fix:  simpletuner config explain lora_rank" in capsys.readouterr().err
    assert main(["config", "explain", "zzzz"]) == ExitCode.USAGE
    assert "zzzz is not an option" in capsys.readouterr().err


@pytest.mark.parametrize(("language", "words"), [("en", "Which option?"), ("es", "¿Qué opción?")])
def test_explain_what(capsys, language, words):
    assert main(["config", "explain", "--lang", language]) == ExitCode.USAGE
    assert words in capsys.readouterr().err


def test_schema_is_json(capsys):
    assert run(["schema"], "en") == 0
    assert json.loads(capsys.readouterr().out)["properties"].keys() >= options().keys()
    assert main(["config", "schema", "more"]) == ExitCode.USAGE


@pytest.mark.parametrize("argv", [["config"], ["config", "--help"], ["config", "show", "-h"]])
@pytest.mark.parametrize(
    ("language", "words"), [("en", "Usage: simpletuner config"), ("es", "Uso: simpletuner config")]
)
def test_help(capsys, argv, language, words):
    assert main([*argv, "--lang", language]) == 0
    assert capsys.readouterr().out.startswith(words)


def test_an_unknown_action(capsys):
    assert main(["config", "shwo"]) == ExitCode.USAGE
    assert "validate, show, explain, schema" in capsys.readouterr().err
