"""Which files a name stands for, and which checkpoints a run has."""

from __future__ import annotations

import pytest
import torch

from simpletuner.adapters.files import LORA_FILE_NAME, LoraInfo, save_lora
from simpletuner.adapters.lora import LoraSettings, adapter_state, apply_lora, trainable_parameters
from simpletuner.adapters.lycoris import LYCORIS_CONFIG_NAME
from simpletuner.generate.adapters import AdapterStack, FoundAdapter, complete_axis, find_adapter
from simpletuner.generate.request import AdapterChoice, parse_axis
from simpletuner.generate.run import free_number
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import ConfigError


@pytest.fixture
def run_dir(tmp_path):
    """A run with two checkpoints and an unfinished third; no result yet."""
    folder = tmp_path / "my-run"
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-11", ".checkpoint-12-x"):
        (folder / name).mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    for step in (10, 9):
        save_lora(folder / f"checkpoint-{step}" / LORA_FILE_NAME, layers(step), LoraInfo(rank=2, alpha=2.0))
    return folder


def layers(value, out=4):
    return {"a.lora_A.weight": torch.full((2, 3), float(value)), "a.lora_B.weight": torch.ones(out, 2)}


def test_the_newest_of_a_run_is_its_result_or_its_last_checkpoint(run_dir):
    found = find_adapter(AdapterChoice(place=str(run_dir), strength=0.5))
    assert (found.file.parent.name, found.label, found.strength) == ("checkpoint-10", "my-run", 0.5)
    assert list(found.checkpoints) == ["9", "10"]
    save_lora(run_dir / LORA_FILE_NAME, layers(1), LoraInfo(rank=2, alpha=2.0))
    assert find_adapter(AdapterChoice(place=str(run_dir))).file == run_dir / LORA_FILE_NAME


def test_a_grid_over_checkpoints_without_values_has_them_all(run_dir):
    adapters = [find_adapter(AdapterChoice(place=str(run_dir)))]
    assert complete_axis(parse_axis("checkpoint"), adapters).values == ("base", "9", "10")
    save_lora(run_dir / LORA_FILE_NAME, layers(1), LoraInfo(rank=2, alpha=2.0))
    adapters = [find_adapter(AdapterChoice(place=str(run_dir)))]
    assert complete_axis(parse_axis("checkpoint"), adapters).values == ("base", "9", "10", "last")
    assert complete_axis(parse_axis("checkpoint=10,9"), adapters).values == ("10", "9")
    assert complete_axis(parse_axis("seed=1"), adapters) == parse_axis("seed=1")


def test_a_stack_adds_up_and_changes_the_checkpoint_of_the_run(run_dir, tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4, bias=False)})
    weight = model["a"].weight.detach().clone()
    other = tmp_path / "other.safetensors"
    save_lora(other, layers(100), LoraInfo(rank=2, alpha=4.0))
    run = find_adapter(AdapterChoice(place=str(run_dir), strength=0.5))
    fixed = FoundAdapter(file=other, strength=0.25, label="other", checkpoints={})
    stack = AdapterStack(model, [run, fixed], dtype=torch.float32)
    x = torch.randn(5, 3)

    def delta():
        with torch.no_grad():
            return model["a"](x) - x @ weight.T

    def expected(value, strength):
        return x @ torch.full((3, 4), 2.0 * (0.5 * strength * value + 0.25 * strength * 2 * 100))

    for checkpoint, strength, value in (("last", 1.0, 10), ("9", 1.0, 9), ("base", 2.0, 0), ("10", -1.0, 10)):
        stack.use(checkpoint, strength)
        assert torch.allclose(delta(), expected(value, strength), rtol=1e-4, atol=1e-3), checkpoint
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert stack.modules == {"a"}


def empty_run(run_dir):
    for step in (9, 10):
        (run_dir / f"checkpoint-{step}" / LORA_FILE_NAME).unlink()
    find_adapter(AdapterChoice(place=str(run_dir)))


def test_a_dora_acts_as_it_acted_when_it_was_trained(tmp_path):
    draws = torch.Generator().manual_seed(2)
    weight, x = torch.randn(4, 3, generator=draws), torch.randn(5, 3, generator=draws)

    def model():
        found = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 4, bias=False)})
        found["a"].weight.data.copy_(weight)
        return found

    trained = model()
    apply_lora(trained, LoraSettings(rank=2, alpha=4.0, targets=("a",), dora=True))
    for parameter in trainable_parameters(trained):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draws)
    path = tmp_path / "dora.safetensors"
    save_lora(path, adapter_state(trained), LoraInfo(rank=2, alpha=4.0))
    shown = model()
    stack = AdapterStack(shown, [FoundAdapter(file=path, strength=1.0, label="", checkpoints={})], dtype=torch.float32)
    stack.use("last", 1.0)
    with torch.no_grad():
        assert torch.allclose(shown["a"](x), trained["a"](x), atol=1e-5)
        assert not torch.allclose(shown["a"](x), x @ weight.T, atol=1e-2)


def two_lycoris(run_dir):
    for folder in ("a", "b"):
        (run_dir / folder).mkdir()
        (run_dir / folder / LYCORIS_CONFIG_NAME).write_text("{}")
    found = [
        FoundAdapter(file=run_dir / folder / LORA_FILE_NAME, strength=1.0, label="", checkpoints={}) for folder in "ab"
    ]
    AdapterStack(torch.nn.Linear(1, 1), found, dtype=torch.float32)


BAD = {
    "E-GENERATE-LYCORIS": (two_lycoris, ["LyCORIS", "simpletuner convert"]),
    "E-GENERATE-EMPTY-RUN": (empty_run, ["my-run"]),
    "E-GENERATE-CHECKPOINTS": (lambda _: complete_axis(parse_axis("checkpoint"), []), ["0", "--grid checkpoint"]),
    "E-GENERATE-CHECKPOINT": (
        lambda run_dir: complete_axis(parse_axis("checkpoint=11"), [find_adapter(AdapterChoice(place=str(run_dir)))]),
        ["11", "base, 9, 10"],
    ),
}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("code", BAD)
def test_what_is_not_there_is_told(run_dir, code, language):
    provoke, words = BAD[code]
    with pytest.raises(ConfigError) as caught:
        provoke(run_dir)
    (problem,) = caught.value.problems
    assert problem.code == code
    told = " ".join(map(str, render_problem(problem, language)))
    assert all(word in told for word in words), told


def test_numbers_go_on_where_files_are(tmp_path):
    assert free_number(tmp_path / "none") == 1
    for name in ("0002_a.png", "0011_sheet.png", "12_b.png", "other.png"):
        (tmp_path / name).touch()
    assert free_number(tmp_path) == 12
    (tmp_path / "10000_b.png").touch()
    assert free_number(tmp_path) == 10001
