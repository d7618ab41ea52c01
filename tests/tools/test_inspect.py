"""What is told of a file, from its header alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import safetensors.torch
import torch

from simpletuner.adapters.files import LoraInfo, save_lora, write_safetensors
from simpletuner.adapters.formats.layouts import LAYOUTS
from simpletuner.adapters.formats.write import to_tensors
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import SimpletunerError
from simpletuner.tools.inspect import inspect_file

from .conftest import adapter_of, save_file


def saved(path, kind="LoRA", layout="comfyui"):
    write_safetensors(path, to_tensors(adapter_of(kind), LAYOUTS[layout]), {"modelspec.title": "x"})
    return path


@pytest.mark.parametrize(
    ("kind", "told"),
    [("LoRA", "LoRA"), ("DoRA", "LoRA + DoRA"), ("LoHa", "LoHa"), ("LoKr", "LoKr"), ("LoKr full", "LoKr")],
)
def test_a_file_is_described(tmp_path, kind, told):
    found = inspect_file(saved(tmp_path / "a.safetensors", kind))
    assert found.kinds == {told: 8}
    assert found.num_modules == 8
    assert found.ranks == ({0: 8} if kind == "LoKr full" else {2: 8})
    assert found.alphas == {9.0 if kind == "LoKr full" else 3.0: 8}
    assert found.layout.startswith("diffusion_model.*.")
    assert set(found.dtypes) == {"F32"}
    assert found.metadata["modelspec.title"] == "x"
    assert [problem.code for problem in found.problems] == (["W-LORA-WIDTH"] if "LoRA" in told else [])
    assert {verdict.program: verdict.loads for verdict in found.verdicts} == {
        "ComfyUI": True,
        "diffusers": kind not in ("DoRA", "LoHa"),
        "musubi-tuner": False,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_an_alpha_is_read_in_every_number_format(tmp_path, dtype):
    tensors = to_tensors(adapter_of("LoRA"), LAYOUTS["kohya"])
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    found = inspect_file(tmp_path / "a.safetensors")
    assert found.alphas == {9.0: 2, 3.0: 2}
    assert found.ranks == {2: 2, 6: 2}
    assert found.layout == "lora_unet_*.lora_down.weight"


def test_a_file_of_a_run_has_everything_about_itself(tmp_path):
    state = {}
    for name, weights in adapter_of("LoRA").modules.items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = weights.tensors
    info = LoraInfo(rank=2, alpha=3.0, base_model="a/b", trigger_words=("sks",), config_hash="0123", title="cat")
    save_lora(tmp_path / "a.safetensors", state, info)
    metadata = inspect_file(tmp_path / "a.safetensors").metadata
    assert metadata["modelspec.trigger_phrase"] == "sks" and metadata["ss_base_model_version"] == "a/b"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "3")


def told(path) -> list[str]:
    """The problems' texts; both languages have one."""
    try:
        problems = inspect_file(path).problems
    except SimpletunerError as error:
        problems = error.problems
    for problem in problems:
        assert len({render_problem(problem, language)[0] for language in LANGUAGES}) == len(LANGUAGES)
    return [f"{problem.code}: {render_problem(problem, 'en')[0]}" for problem in problems]


def test_what_is_wrong_is_told(tmp_path, state):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"not a file")
    assert "E-LORA-DAMAGED" in told(path)[0]
    path.write_bytes(saved(tmp_path / "b.safetensors").read_bytes()[:-3])
    assert "E-LORA-DAMAGED" in told(path)[0]
    save_file(path, state)
    assert "E-LORA-IS-MODEL" in told(path)[0]
    safetensors.torch.save_file({"a.oft_blocks": torch.zeros(2)}, path)
    assert "found: OFT" in told(path)[0]
    assert "E-PATH-NOT-FOUND" in told(tmp_path / "c.safetensors")[0]
    safetensors.torch.save_file(
        {"a.lora_A.weight": torch.zeros(2, 2), "layers.0.attention.to_q.lokr_w1": torch.zeros(2)}, path
    )
    found = told(path)
    assert any("E-LORA-OTHER-MODEL" in text and "1 of its 2 modules" in text for text in found)
    assert any("a has lora_A.weight, but not lora_B.weight" in text for text in found)
    assert any("layers.0.attention.to_q has lokr_w1, but not lokr_w2" in text for text in found)


def test_a_changed_tensor_is_noticed(tmp_path):
    path = saved(tmp_path / "a.safetensors")
    assert not any("W-LORA-HASH" in text for text in told(path))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert any("W-LORA-HASH" in text for text in told(path))


def test_it_needs_no_torch(tmp_path):
    path = saved(tmp_path / "a.safetensors")
    code = (
        f"import sys\nfrom simpletuner.cli.main import main\nmain(['inspect', {str(path)!r}])\n"
        "print(sorted({'torch', 'numpy', 'safetensors', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
