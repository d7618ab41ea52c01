import json

import pytest

from simpletuner.cli.main import main
from simpletuner.config import load_run_config
from simpletuner.config.paths import EXAMPLES_DIR
from simpletuner.config.search import example_names
from simpletuner.problems import ExitCode


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMPLETUNER_LANG", "en")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("language", ["en", "es"])
def test_list_tells_of_every_example(capsys, language):
    assert main(["examples", "list", "--lang", language]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(example_names())
    assert all("example." not in line for line in lines)
    cards = ("demo", "z-image-turbo.lora-10-12gb", "z-image-turbo.lora-16gb", "z-image-turbo.lora-24gb")
    assert {*cards, "z-image-turbo.lora-40gb", "z-image-base.lora"} <= set(example_names())


@pytest.mark.parametrize("name", example_names())
@pytest.mark.parametrize("where", [[], ["--dest", "my/folder"], ["--dest=."]])
def test_a_copy_means_the_same_as_the_original(tmp_path, capsys, name, where):
    assert main(["examples", "copy", name, *where]) == 0
    folder = {0: f"config/{name}", 1: ".", 2: "my/folder"}[len(where)]
    copied = load_run_config([f"{folder}/config.json"], environ={}, cwd=tmp_path, must_run=False, check_folders=False)
    original = load_run_config(["--example", name], environ={}, cwd=tmp_path, must_run=False, check_folders=False)
    assert copied.datasets.images == original.datasets.images
    library = copied.config.validation.user_prompt_library
    assert library == str(tmp_path / folder / "user_prompt_library.json"), "an edit of the copy would have no effect"
    own = {"data_backend_config", "user_prompt_library", "lycoris_config"}
    lycoris = copied.config.adapter.lycoris_config
    assert lycoris in (None, str(tmp_path / folder / "lycoris_config.json"))
    values = {
        key: value for key in copied.origins if key not in own and (value := copied.config.option(key)) is not None
    }
    assert values == {key: original.config.option(key) for key in values}
    assert "config.json" in capsys.readouterr().out


def test_a_copied_example_is_an_environment(tmp_path):
    assert main(["examples", "copy", "demo"]) == 0
    loaded = load_run_config(["--env", "demo"], environ={}, cwd=tmp_path)
    assert loaded.config_path == tmp_path / "config/demo/config.json"


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "config.json").write_text("mine")
    assert main(["examples", "copy", "demo", "--dest", "."]) == ExitCode.USAGE
    assert "config.json already exists and is not overwritten." in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert main(["examples", "copy", "demo", "--dest", ".", "--lang=es"]) == ExitCode.USAGE
    assert "ya existe y no se sobrescribe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "english", "spanish"),
    [
        (["copy", "dmo"], "Fix:  simpletuner examples copy demo", "simpletuner examples copy demo"),
        (["copy"], "Which example?", "¿Qué ejemplo?"),
        (["copy", "demo", "more"], "more is not expected", "no se espera more"),
        (["copy", "demo", "--dest"], "--dest needs a value", "--dest necesita un valor"),
        (["list", "more"], "more is not expected", "no se espera more"),
        (["lst"], "lst is not a command.\n  There are: list, copy.", "El comando lst no existe."),
    ],
)
def test_mistakes(capsys, words, english, spanish):
    for language, expected in (("en", english), ("es", spanish)):
        assert main(["examples", *words, "--lang", language]) == ExitCode.USAGE
        assert expected in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["examples", "copy", "demo", "--dest", "file/x"]) == ExitCode.ENVIRONMENT
    assert "E-NOT-A-FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize(("language", "words"), [("en", "Usage: simpletuner examples"), ("es", "Uso: simpletuner")])
def test_help(capsys, language, words):
    assert main(["examples", "--help", "--lang", language]) == 0
    assert capsys.readouterr().out.startswith(words)


def test_examples_hold_nothing_but_json_that_people_can_read():
    for path in EXAMPLES_DIR.rglob("*.json"):
        content = path.read_text(encoding="utf-8")
        assert content == json.dumps(json.loads(content), indent=2, ensure_ascii=False) + "\n", path
