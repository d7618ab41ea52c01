"""The commands about adapter files as a user calls them: what they print, write, refuse, and return."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch

from simpletuner.adapters.files import LoraInfo, load_lora, read_adapter, save_lora
from simpletuner.cli import files
from simpletuner.cli.main import main
from simpletuner.cli.merge import file_and_strength
from simpletuner.config.paths import PACKAGE_DIR
from simpletuner.problems import ExitCode

COMMANDS = ("convert", "merge", "extract", "resize", "inspect")
DEMO = str(PACKAGE_DIR / "assets" / "demo_base")


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMPLETUNER_LANG", "en")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(1)
    state = {}
    for block in range(2):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            module = f"layers.{block}.attention.{name}"
            state[f"{module}.lora_A.weight"] = torch.randn(4, 192, generator=generator) * 0.1
            state[f"{module}.lora_B.weight"] = torch.randn(192, 4, generator=generator) * 0.1
    save_lora(tmp_path / "a.safetensors", state, LoraInfo(rank=4, alpha=6.0, title="a", trigger_words=("sks",)))
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("language", ["en", "es"])
def test_help_teaches(capsys, command, language):
    for words in ([], ["--help"], ["a.safetensors", "-h"]):
        assert main([command, *words, "--lang", language]) == 0
        page = capsys.readouterr().out
        assert page.startswith("Usage: " if language == "en" else "Uso: ")
        assert f"simpletuner {command}" in page.splitlines()[-1], "an example"


@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "comfyui-fused", "kohya", "kohya-split"])
def test_convert_there_and_back(capsys, folder, layout):
    assert main(["convert", "a.safetensors", "b.safetensors", "--format", layout]) == 0
    output = capsys.readouterr().out
    assert output.startswith("Written: b.safetensors: LoRA, ")
    assert ("the same, bit for bit" in output) == (layout != "diffusers")
    assert main(["convert", "b.safetensors", "c.safetensors"]) == 0
    first, second = load_lora(folder / "a.safetensors"), load_lora(folder / "c.safetensors")
    assert second.info.title == "a" and second.info.trigger_words == ("sks",)
    assert first.tensors.keys() == second.tensors.keys()
    if layout != "diffusers":
        assert all(torch.equal(tensor, second.tensors[key]) for key, tensor in first.tensors.items())
        assert (folder / "a.safetensors").read_bytes() == (folder / "c.safetensors").read_bytes()


def test_resize_says_what_it_costs(capsys, folder):
    assert main(["resize", "a.safetensors", "b.safetensors", "--rank", "2", "--dtype", "bf16"]) == 0
    english = capsys.readouterr().out
    assert "rank 2," in english and "Relative error of the updates: 0." in english and "(layers." in english
    assert main(["resize", "a.safetensors", "b.safetensors", "--energy", "0.5", "--force", "--lang", "es"]) == 0
    assert "Error relativo de los cambios: 0," in capsys.readouterr().out
    assert {w.tensors[0].dtype for w in read_adapter(folder / "b.safetensors").modules.values()} == {torch.float32}


def test_merge_adds_up(capsys, folder):
    assert main(["merge", "a.safetensors@0.75", "a.safetensors@-0.25", "-o", "b.safetensors"]) == 0
    assert "rank 8," in capsys.readouterr().out
    one, half = read_adapter(folder / "a.safetensors"), read_adapter(folder / "b.safetensors")
    for name, weights in one.modules.items():
        assert torch.allclose(half.modules[name].delta(), weights.delta() * 0.5, atol=1e-6)
    assert main(["merge", "a.safetensors@0.75", "a.safetensors@-0.25", "-o", "c.safetensors", "--rank", "4"]) == 0
    reduced = read_adapter(folder / "c.safetensors")
    assert {weights.rank for weights in reduced.modules.values()} == {4}
    assert torch.allclose(reduced.modules[name].delta(), one.modules[name].delta() * 0.5, atol=1e-5)


def test_into_a_model_and_out_again(capsys, folder, monkeypatch):
    monkeypatch.setattr(files, "_PATIENCE_S", 0.0)
    assert main(["merge", "a.safetensors@0.5", "--into", DEMO, "-o", "merged"]) == 0
    told = capsys.readouterr()
    assert "the transformer with 8 changed layers" in told.out
    assert "pretrained_transformer_subfolder=none" in told.out
    assert told.err.splitlines()[-1] == "tensors: 133 of 133"
    assert len(told.err.splitlines()) == 11
    assert {path.name for path in (folder / "merged").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    command = ["extract", DEMO, "merged", "-o", "b.safetensors", "--rank", "4"]
    assert main([*command, "--dtype", "float32"]) == 0
    told = capsys.readouterr()
    assert "The LoRA holds 99.9" in told.out  # the base is stored in 16 bits
    one, found = read_adapter(folder / "a.safetensors"), read_adapter(folder / "b.safetensors")
    assert found.modules.keys() == one.modules.keys()
    assert main([*command, "--force", "--lang", "es"]) == 0
    assert "del cambio al cuadrado de las capas lineales" in capsys.readouterr().out


def test_into_a_single_file(capsys, folder):
    shutil.copyfile(f"{DEMO}/transformer/diffusion_pytorch_model.safetensors", folder / "model.safetensors")
    assert main(["merge", "a.safetensors", "--into", "model.safetensors", "-o", "out.safetensors", "--lang", "es"]) == 0
    assert "el modelo con 8 capas cambiadas" in capsys.readouterr().out
    assert main(["extract", "model.safetensors", "out.safetensors", "-o", "b.safetensors", "--rank", "1"]) == 0
    changed = safetensors.torch.load_file("out.safetensors")
    changed["layers.0.attention.norm_q.weight"] += 1
    safetensors.torch.save_file(changed, "out.safetensors")
    capsys.readouterr()
    assert main(["extract", "model.safetensors", "out.safetensors", "-o", "c.safetensors", "--rank", "1"]) == 0
    assert "1 tensors that changed too are none that a LoRA can change" in capsys.readouterr().out


def test_inspect_shows_and_says_as_data(capsys):
    assert main(["inspect", "a.safetensors"]) == 0
    told = capsys.readouterr()
    assert "ComfyUI" in told.out and "modelspec.trigger_phrase: sks" in told.out
    assert "W-LORA-WIDTH" in told.err
    assert main(["inspect", "a.safetensors", "--lang", "es"]) == 0
    assert "no lo carga: los nombres han de empezar por lora_unet_" in capsys.readouterr().out
    assert main(["inspect", "a.safetensors", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["kinds"] == {"LoRA": 8} and data["ranks"] == {"4": 8} and data["alphas"] == {"6": 8}
    assert data["programs"]["ComfyUI"]["loads"] and not data["programs"]["musubi-tuner"]["loads"]
    assert data["problems"][0]["code"] == "W-LORA-WIDTH"


def test_an_error_in_the_file_is_the_exit_status_of_inspect(capsys, folder):
    tensors = safetensors.torch.load_file("a.safetensors")
    del tensors["diffusion_model.layers.0.attention.to_q.lora_B.weight"]
    safetensors.torch.save_file(tensors, "a.safetensors")
    assert main(["inspect", "a.safetensors"]) == ExitCode.FAILED
    assert "E-LORA-INCOMPLETE" in capsys.readouterr().err
    assert main(["convert", "a.safetensors", "b.safetensors"]) == ExitCode.ENVIRONMENT
    assert not (folder / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["convert", "a.safetensors", "a.safetensors"], "E-OUTPUT-EXISTS\n  a.safetensors already exists"),
        (["convert", "a.safetensors", "no/b.safetensors"], "E-OUTPUT-FOLDER\n  no/b.safetensors cannot be written"),
        (["convert", "a.safetensors"], "E-FILES-USAGE\n  simpletuner convert: "),
        (["convert", "a.safetensors", "b", "--format", "onnx"], "invalid choice: 'onnx'"),
        (["convert", "a.safetensors", "b", "--rank", "0"], "E-FILES-USAGE"),
        (["convert", "a.safetensors", "b", "--energy", "1.5"], "E-FILES-USAGE"),
        (["resize", "a.safetensors", "b"], "--rank N | --energy SHARE"),
        (["merge", "a.safetensors"], "-o/--output"),
        (["merge", "a.safetensors", "--into", DEMO, "-o", "b", "--rank", "3"], "--into / --rank"),
        (["extract", DEMO, DEMO, "-o", "b"], "--rank N"),
        (["inspect", "a.safetensors", "--yaml"], "unrecognized arguments: --yaml"),
    ],
)
def test_a_wrong_call_is_refused_and_nothing_is_written(capsys, folder, words, told):
    before = (folder / "a.safetensors").read_bytes()
    assert main(words) == ExitCode.USAGE
    english = capsys.readouterr().err
    assert told in english
    assert main([*words, "--lang", "es"]) == ExitCode.USAGE
    assert capsys.readouterr().err != english
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"]
    assert (folder / "a.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "words", [["inspect", "b.safetensors"], ["convert", "b.safetensors", "c"], ["merge", "b.safetensors@2", "-o", "c"]]
)
def test_a_file_that_is_not_there_is_named_with_what_is(capsys, words):
    assert main(words) == ExitCode.ENVIRONMENT
    assert "There is no adapter file b.safetensors.\n  In . there is: a.safetensors." in capsys.readouterr().err
    assert main([*words, "--lang", "es"]) == ExitCode.ENVIRONMENT
    assert "En . hay: a.safetensors." in capsys.readouterr().err


def test_a_folder_stands_for_its_only_file(capsys, folder):
    assert main(["inspect", "."]) == 0
    assert capsys.readouterr().out.startswith("a.safetensors")
    shutil.copyfile("a.safetensors", "b.safetensors")
    assert main(["inspect", "."]) == ExitCode.ENVIRONMENT
    assert "there is: a.safetensors, b.safetensors." in capsys.readouterr().err


def test_a_strength_is_what_follows_the_last_at_sign(folder):
    assert [file_and_strength(word) for word in ("a@0.8", "x@y", "a", "b@-1e-1")] == [
        ("a", 0.8),
        ("x@y", 1.0),
        ("a", 1.0),
        ("b", -0.1),
    ]
    (folder / "a@0.8").touch()
    assert file_and_strength("a@0.8")[1] == 1.0
