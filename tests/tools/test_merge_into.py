"""A model with adapters in its weights predicts what the model with the adapters predicts."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from simpletuner.adapters.formats.convert import Weighted
from simpletuner.adapters.formats.layouts import LAYOUTS
from simpletuner.adapters.formats.weights import Adapter, LoraWeights
from simpletuner.adapters.formats.write import to_tensors
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.models.weights import resolve_transformer
from simpletuner.models.z_image.layouts import to_comfy
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.problems import SimpletunerError
from simpletuner.tools.merge_into import merge_into

from .conftest import KINDS, TINY, adapter_of, save_file, save_folder


def weighted(adapter: Adapter, strength: float = 1.0) -> list[Weighted]:
    return [Weighted(name="a.safetensors", adapter=adapter, strength=strength)]


def expected_state(state, adapter: Adapter, strength: float = 1.0):
    """By the definition, one module after the other."""
    changed = {name: tensor.clone() for name, tensor in state.items()}
    for name, weights in adapter.modules.items():
        names = [name.replace("qkv", f"to_{n}") for n in "qkv"] if name.endswith("qkv") else [name]
        for own, delta in zip(names, weights.delta().chunk(len(names)), strict=True):
            before = state[f"{own}.weight"]
            after = before + delta
            if weights.magnitude is not None:
                after = after / after.norm(dim=1, keepdim=True) * weights.magnitude[:, None]
            changed[f"{own}.weight"] = before + strength * (after - before)
    return changed


@pytest.mark.parametrize("comfy", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [1.0, -0.4])
def test_a_file_gets_the_updates_in_its_own_layout(tmp_path, state, kind, comfy, strength):
    path = save_file(tmp_path / "model.safetensors", state, comfy=comfy)
    adapter = adapter_of(kind)
    count = merge_into([path], weighted(adapter, strength), tmp_path / "out.safetensors")
    assert count == (3 if kind == "fused LoKr" else len(adapter.modules))
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    wanted = expected_state(state, adapter, strength)
    wanted = to_comfy(wanted) if comfy else wanted
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6), name


@pytest.fixture(scope="module")
def diffusers_pipeline(state) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

        transformer = ZImageTransformer2DModel(**TINY, n_kv_heads=TINY["n_heads"])
    transformer.load_state_dict(state)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return ZImagePipeline(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("LoRA", "kohya"), ("LoRA", "diffusers"), ("DoRA", "diffusers"), ("LoKr", "comfyui"), ("LoKr full", "comfyui")],
)
def test_the_merged_model_predicts_what_diffusers_does_with_the_adapter(
    tmp_path, state, predict, diffusers_pipeline, kind, layout
):
    path = save_file(tmp_path / "model.safetensors", state)
    adapter = adapter_of(kind)
    merge_into([path], weighted(adapter), tmp_path / "out.safetensors")
    ours = predict(safetensors.torch.load_file(tmp_path / "out.safetensors"))
    latents, prompts, t_B = predict.inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers_pipeline.load_lora_weights(to_tensors(adapter, LAYOUTS[layout]), adapter_name="a")
    try:
        with torch.no_grad():
            model = diffusers_pipeline.transformer
            theirs = model([x[:, None] for x in latents], t_B, prompts, return_dict=False)[0]
    finally:
        diffusers_pipeline.unload_lora_weights()
    assert torch.allclose(ours[0], theirs[0][:, 0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ours[0], predict(state)[0], atol=1e-2)


def test_a_folder_gives_a_folder_that_is_a_transformer(tmp_path, state):
    folder = save_folder(tmp_path / "base", state)
    shards = resolve_transformer(str(folder), spec=Z_IMAGE, option="--into")
    adapters = [*weighted(adapter_of("LoRA")), *weighted(adapter_of("LoHa", seed=2), 0.5)]
    told = []
    merge_into(shards, adapters, tmp_path / "out", on_progress=lambda done, total: told.append((done, total)))
    assert told == [(n, len(state)) for n in range(1, len(state) + 1)]
    again = resolve_transformer(str(tmp_path / "out"), spec=Z_IMAGE, option="--into")
    assert [path.name for path in again] == [path.name for path in shards]
    found = {name: tensor for path in again for name, tensor in safetensors.torch.load_file(path).items()}
    wanted = expected_state(expected_state(state, adapters[0].adapter), adapters[1].adapter, 0.5)
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6) for name in state)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dim"] == TINY["dim"]
    with safe_open(again[0], framework="pt") as stream:
        assert stream.metadata()["modelspec.merged_from"] == "a.safetensors@1, a.safetensors@0.5"


def test_what_no_adapter_touches_is_the_same_to_the_byte_and_numbers_keep_their_format(tmp_path, state):
    path = save_file(tmp_path / "model.safetensors", state, dtype=torch.bfloat16)
    adapter = adapter_of("LoRA")
    merge_into([path], weighted(adapter), tmp_path / "out.safetensors")
    before, after = (safetensors.torch.load_file(p) for p in (path, tmp_path / "out.safetensors"))
    touched = {f"{name}.weight" for name in adapter.modules}
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], tensor) == (name not in touched)
        if name in touched:
            module = adapter.modules[name.removesuffix(".weight")]
            assert torch.equal(after[name], (tensor.float() + module.delta()).bfloat16())


def problem_of(action) -> str:
    with pytest.raises(SimpletunerError) as error:
        action()
    (problem,) = error.value.problems
    assert len({render_problem(problem, language)[0] for language in LANGUAGES}) == len(LANGUAGES)
    return " | ".join(map(str, (problem.code, *render_problem(problem, "en"))))


def test_what_does_not_belong_together_is_refused_before_anything_is_written(tmp_path, state):
    path, out = save_file(tmp_path / "model.safetensors", state), tmp_path / "out.safetensors"
    far = Adapter(
        modules={"layers.7.attention.to_q": adapter_of("LoRA").modules["layers.0.attention.to_q"]}, metadata={}
    )
    told = problem_of(lambda: merge_into([path], weighted(far), out))
    assert "E-LORA-OTHER-MODEL" in told and "layers.7.attention.to_q" in told and "layers.1.attention.to_q" in told
    wide = LoraWeights(down=torch.ones(2, 96), up=torch.ones(48, 2))
    adapter = Adapter(modules={"layers.0.attention.to_q": wide}, metadata={})
    told = problem_of(lambda: merge_into([path], weighted(adapter), out))
    assert "layers.0.attention.to_q is 48x96, the model's layer 48x48" in told
    save_file(path, state, dtype=torch.float8_e4m3fn)
    told = problem_of(lambda: merge_into([path], weighted(adapter_of("LoRA")), out))
    assert "E-STORED-QUANTISED" in told and "F8_E4M3" in told
    safetensors.torch.save_file(to_tensors(adapter_of("LoRA"), LAYOUTS["kohya"]), path)
    assert "E-MODEL-IS-LORA" in problem_of(lambda: merge_into([path], weighted(adapter_of("LoRA")), out))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, state, monkeypatch):
    path, out = save_file(tmp_path / "model.safetensors", state), tmp_path / "out.safetensors"
    out.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "E-DISK-FULL" in problem_of(lambda: merge_into([path], weighted(adapter_of("LoRA")), out))
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "out.safetensors"]


def test_a_folder_is_there_when_it_is_whole(tmp_path, state):
    """Nothing of it while it is being written; and the model's own folder may be written anew."""
    folder = save_folder(tmp_path / "base", state) / "transformer"
    shards = sorted(folder.glob("*.safetensors"))

    def stop(done: int, total: int) -> None:
        assert not (tmp_path / "out").exists()
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_into(shards, weighted(adapter_of("LoRA")), tmp_path / "out", on_progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    names = sorted(path.name for path in folder.iterdir())
    (folder / "notes.txt").write_text("mine")
    merge_into(shards, weighted(adapter_of("LoRA")), folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "notes.txt"])
    found = {name: tensor for path in shards for name, tensor in safetensors.torch.load_file(path).items()}
    wanted = expected_state(state, adapter_of("LoRA"))
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6) for name in state)


def test_a_large_model_needs_little_memory(tmp_path):
    """384 MB of weights in pieces of 16 MB: the process grows by a few pieces only."""
    side, count = 2048, 24
    names = [f"layers.{n}.attention.to_q.weight" for n in range(count)]
    safetensors.torch.save_file({name: torch.zeros(side, side) for name in names}, tmp_path / "model.safetensors")
    code = f"""
import resource, sys
from pathlib import Path
import torch
from simpletuner.adapters.formats.convert import Weighted
from simpletuner.adapters.formats.weights import Adapter, LoraWeights
from simpletuner.tools.merge_into import merge_into
lora = LoraWeights(down=torch.ones(4, {side}), up=torch.ones({side}, 4))
adapter = Adapter(modules={{f"layers.{{n}}.attention.to_q": lora for n in range({count})}}, metadata={{}})
folder = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_into([folder / "model.safetensors"], [Weighted(name="a", adapter=adapter, strength=1.0)], folder / "out")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 120_000  # KiB
    Path(tmp_path / "model.safetensors").unlink()
    with safe_open(tmp_path / "out", framework="pt") as stream:
        assert bool((stream.get_tensor(names[-1]) == 4).all())
