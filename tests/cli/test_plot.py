"""`simpletuner plot schedule`: what it prints, what it draws, what it loads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from simpletuner.cli.main import main

BASE = ("plot", "schedule", "--model_flavour", "base")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("CONFIG_PATH", "ENV", "SIMPLETUNER_ENVIRONMENT", "SIMPLETUNER_ENV"):
        monkeypatch.delenv(name, raising=False)


def as_json(capsys, *words: str) -> dict:
    assert main([*BASE, "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_percentiles_and_density_are_those_of_the_law(capsys):
    (curve,) = as_json(capsys, "--flow_use_uniform_schedule", "true", "--flow_schedule_shift", "3")["curves"]
    assert curve["shift"] == 3
    assert curve["percentiles"] == pytest.approx({"5": 3 / 22, "25": 0.5, "50": 0.75, "75": 0.9, "95": 57 / 58})
    assert sum(density for _, density in curve["density"]) / 100 == pytest.approx(1, rel=1e-3)


def test_auto_shift_has_a_curve_for_each_size(capsys, tmp_path):
    datasets = [
        {"id": "small", "instance_data_dir": "a", "resolution": 512},
        {"id": "large", "instance_data_dir": "b", "resolution": 1024},
        {"id": "same", "instance_data_dir": "c", "resolution": 1024},
        {"id": "moved", "instance_data_dir": "d", "resolution": 1024, "timestep_sampling_offset": 0.5},
    ]
    (tmp_path / "data.json").write_text(json.dumps(datasets))
    found = as_json(capsys, "--flow_schedule_auto_shift", "true", "--data_backend_config", "data.json")
    shifts = {curve["label"]: round(curve["shift"], 2) for curve in found["curves"]}
    assert list(shifts.values()) == [1.88, 3.16, 5.21]
    assert all(word in str(shifts) for word in ("512x512", "1024x1024", "moved", "+0.5"))
    assert len(as_json(capsys, "--flow_schedule_auto_shift", "true")["curves"]) == 3, "usual sizes without datasets"


def test_chosen_levels_have_shares_and_no_density(capsys):
    found = as_json(capsys, "--flow_custom_timesteps", "250,500,500,1000")
    assert found["levels"] == [
        {"sigma": 0.25, "share": 0.25},
        {"sigma": 0.5, "share": 0.5},
        {"sigma": 1.0, "share": 0.25},
    ]


@pytest.mark.parametrize(("language", "words"), [("en", "percentiles of sigma"), ("es", "percentiles de sigma")])
@pytest.mark.parametrize("law", [("--flow_custom_timesteps", "0.5,1"), ("--flow_use_beta_schedule", "true")])
def test_the_terminal_and_the_picture(capsys, tmp_path, law, language, words):
    assert main([*BASE, *law, "-o", "new/levels", "--lang", language]) == 0
    printed = capsys.readouterr().out
    assert words in printed and "█" in printed and "levels.png" in printed
    path = tmp_path / "new" / "levels.png"
    assert path.stat().st_size < 60_000
    with Image.open(path) as picture:
        assert picture.size == (1000, 600)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert any(blue > 150 and red < 40 for red, _, blue in colours), "a curve is drawn"


def test_texts_of_pictures_have_no_accents():
    """Pillow's font lacks them."""
    from simpletuner.i18n import catalog

    shown = ("plot.law", "plot.shift", "plot.size", "plot.offset", "plot.listed", "plot.sampling", "plot.median")
    shown = (*shown, "plot.axis", "plot.clean", "plot.noise", "plot.title")
    for language in ("en", "es"):
        for key, words in catalog(language).items():
            assert not key.startswith(shown) or words.isascii(), key


def test_what_cannot_be_drawn_is_told(capsys, tmp_path):
    assert main(["plot", "loss"]) == 2
    assert "schedule" in capsys.readouterr().err
    assert main([*BASE, "-o"]) == 2
    assert main([*BASE, "--flow_use_uniform_schedule", "true", "--flow_use_beta_schedule", "true"]) == 2
    assert "E-SIGMA-LAW-TWICE" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*BASE, "-o", "file/a.png"]) not in (0, 2)


@pytest.mark.parametrize("language", ["en", "es"])
def test_help_teaches(capsys, language):
    assert main(["plot", "--help", "--lang", language]) == 0
    page = capsys.readouterr().out
    assert all(name in page for name in ("flow_use_beta_schedule", "-o ", "--json", "timestep_sampling_offset"))


def test_a_plot_loads_no_torch():
    code = (
        "import sys\nfrom simpletuner.cli.main import main\n"
        "main(['plot', 'schedule', '--model_flavour', 'base', '-o', 'x.png'])\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"
