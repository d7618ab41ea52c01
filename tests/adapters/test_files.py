from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from simpletuner.adapters.files import (
    LORA_FILE_NAME,
    LoraInfo,
    load_lora,
    read_adapter,
    save_lora,
    write_safetensors,
)
from simpletuner.adapters.formats.convert import convert
from simpletuner.adapters.formats.layouts import LAYOUTS as FORMATS
from simpletuner.adapters.lora import LoraSettings, adapter_state, apply_lora, load_adapter_state, start_from_
from simpletuner.adapters.targets import linear_names
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.transformer import ZImageTransformer
from simpletuner.problems import ModelError, SimpletunerError

from .conftest import TINY, randomise_, tiny_transformer

LAYOUTS = ("comfyui", "diffusers", "kohya")  # the values of lora_format
INFO = LoraInfo(
    rank=4,
    alpha=6.5,
    base_model="Tongyi-MAI/Z-Image-Turbo",
    architecture="z-image",
    targets=("layers.*.attention.to_q",),
    title="a cat",
    trigger_words=("sks", "cat"),
    comment="no comment",
    config_hash="0123abcd",
    global_step=750,
)


def adapted(preset: str = "all", alpha: float = 6.5, seed: int = 2) -> ZImageTransformer:
    model = tiny_transformer()
    apply_lora(model, LoraSettings(rank=4, alpha=alpha, targets=Z_IMAGE.lora_targets(preset), seed=1))
    randomise_(model, seed)
    return model


@pytest.fixture(scope="module")
def diffusers_pipeline() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

        transformer = ZImageTransformer2DModel(**TINY, n_kv_heads=TINY["n_heads"])
    transformer.load_state_dict(tiny_transformer().state_dict())
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )


@pytest.fixture
def diffusers_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def keys_and_values_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("layout", "preset"),
    [*((layout, "attention+mlp") for layout in (*LAYOUTS, "kohya-split")), ("comfyui", "all"), ("diffusers", "all")],
)
@pytest.mark.parametrize("alpha", [4.0, 6.5])
def test_diffusers_loads_the_file_and_predicts_what_we_do(
    tmp_path, diffusers_pipeline, diffusers_log, predict, preset, alpha, layout
):
    model = adapted(preset, alpha)
    info = LoraInfo(rank=4, alpha=alpha)
    save_lora(tmp_path / LORA_FILE_NAME, adapter_state(model), info, layout=layout)
    pipe = diffusers_pipeline
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        pipe.load_lora_weights(tmp_path, adapter_name="style")
    try:
        said = [r.getMessage() for r in diffusers_log.records if r.levelno >= logging.WARNING]
        assert not said, said  # it warns of missing and of unexpected keys
        loaded = [n for n, _ in pipe.transformer.named_parameters() if ".lora_A.style." in n or ".lora_B.style." in n]
        assert len(loaded) == len(adapter_state(model))
        latents, prompts, t_B = predict.inputs
        theirs = pipe.transformer([x[:, None] for x in latents], t_B, prompts, return_dict=False)[0]
        for ours, other in zip(predict(model), theirs, strict=True):
            assert torch.allclose(ours, other[:, 0], rtol=1e-4, atol=1e-5)
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peft_loads_the_file_and_predicts_what_we_do(tmp_path, predict, layout):
    """With the prefix taken off; peft has no other names than the model's own, so kohya's are converted first."""
    model = adapted("attention+mlp")
    path = tmp_path / LORA_FILE_NAME
    save_lora(path, adapter_state(model), INFO, layout=layout)
    if layout == "kohya":
        made = convert(read_adapter(path), FORMATS["comfyui"])
        write_safetensors(path, made.tensors, made.metadata)
    contents = safetensors.torch.load_file(path)
    state = {key.split(".", 1)[1]: tensor for key, tensor in contents.items() if not key.endswith(".alpha")}
    alphas = {tensor.item() for key, tensor in contents.items() if key.endswith(".alpha")}
    base = tiny_transformer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        targets = sorted({key.rsplit(".lora_", 1)[0] for key in state})
        config = peft.LoraConfig(r=4, lora_alpha=next(iter(alphas), 4), target_modules=targets)
        peft.inject_adapter_in_model(config, base)
        result = peft.set_peft_model_state_dict(base, state)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    for ours, other in zip(predict(model), predict(base), strict=True):
        assert torch.allclose(ours, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["comfyui", "comfyui-fused", "kohya", "kohya-split"])
def test_our_own_file_comes_back_bit_for_bit(tmp_path, layout):
    path = tmp_path / "a folder" / "lora.safetensors"
    path.parent.mkdir()
    state = adapter_state(adapted())
    save_lora(path, state, INFO, layout=layout)
    file = load_lora(path)
    assert keys_and_values_equal(dict(file.tensors), state)
    assert file.info == INFO
    assert set(file.scales.values()) == {6.5 / 4}
    assert [p.name for p in path.parent.iterdir()] == ["lora.safetensors"]
    model = adapted(seed=9)
    load_adapter_state(model, file.tensors)
    assert keys_and_values_equal(adapter_state(model), state)


def test_the_default_layout_is_what_comfyui_reads(tmp_path):
    """Its loader knows `diffusion_model.<module>`, then `.lora_A/B.weight` and `.alpha` (default: the rank)."""
    path = tmp_path / LORA_FILE_NAME
    state = adapter_state(adapted("attention"))
    save_lora(path, state, INFO)
    contents = safetensors.torch.load_file(path)
    modules = {key.rsplit(".lora_", 1)[0] for key in state}
    expected = {f"diffusion_model.{m}.{n}" for m in modules for n in ("lora_A.weight", "lora_B.weight", "alpha")}
    assert contents.keys() == expected
    assert all(tensor.item() == 6.5 for key, tensor in contents.items() if key.endswith(".alpha"))


def test_the_metadata_says_what_the_file_is(tmp_path):
    path = tmp_path / LORA_FILE_NAME
    save_lora(path, adapter_state(adapted("attention")), INFO)
    with safe_open(path, framework="pt") as stream:
        metadata = stream.metadata()
    assert metadata["modelspec.architecture"] == "z-image/lora"
    assert metadata["modelspec.title"] == "a cat"
    assert metadata["modelspec.trigger_phrase"] == "sks, cat"
    assert metadata["modelspec.comment"] == "no comment"
    assert metadata["global_step"] == "750"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "6.5")
    assert json.loads(metadata["simpletuner"])["config_hash"] == "0123abcd"
    assert metadata["ss_base_model_version"] == "Tongyi-MAI/Z-Image-Turbo"
    data = path.read_bytes()
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(tensors).hexdigest()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_adapters_give_equal_bytes_in_every_process(tmp_path, layout):
    """The library keeps metadata in a map of random order, other in every process and for every file."""
    state = adapter_state(adapted("attention"))
    for name in ("a", "b", "c"):
        save_lora(tmp_path / name, state, replace(INFO, comment='a \u00f1 \\ "quoted" \u2028 \x7f'), layout=layout)
    first, *others = ((tmp_path / name).read_bytes() for name in ("a", "b", "c"))
    assert others == [first, first]
    header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert int.from_bytes(first[:8], "little") % 8 == 0
    loaded = safetensors.torch.load_file(tmp_path / "a")
    assert {key for key in loaded if not key.endswith(".alpha")} == {
        key for key in header if key != "__metadata__" and not key.endswith(".alpha")
    }
    assert load_lora(tmp_path / "a").info.comment == 'a \u00f1 \\ "quoted" \u2028 \x7f'
    assert load_lora(tmp_path / "a").tensors.keys() == state.keys()


def renamed(state: dict[str, Tensor], style: str, alpha: float) -> dict[str, Tensor]:
    """The same adapter as other programs write it."""
    contents = {}
    for key, tensor in state.items():
        module, role = key.rsplit(".lora_", 1)
        down = role.startswith("A")
        if style in ("kohya", "lycoris"):
            prefix = "lora_unet_" if style == "kohya" else "lycoris_"
            stem, name = prefix + module.replace(".", "_"), "lora_down" if down else "lora_up"
        elif style == "peft":
            stem, name = f"base_model.model.{module}", f"lora_{role.removesuffix('.weight')}"
        else:
            stem, name = module, f"lora_{role.removesuffix('.weight')}.default"
        contents[f"{stem}.{name}.weight"] = tensor
        if style != "peft":
            contents[f"{stem}.alpha"] = torch.tensor(alpha)
    return contents


@pytest.mark.parametrize("style", ["kohya", "lycoris", "peft", "bare"])
def test_other_programs_names_are_read(tmp_path, predict, style):
    alpha = 4.0 if style == "peft" else 6.5  # peft keeps alpha in another file
    source = adapted(alpha=alpha)
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file(renamed(adapter_state(source), style, alpha), path)
    model = adapted(alpha=2.0, seed=9)
    file = load_lora(path, linear_names(model))
    assert file.info.alpha == alpha
    start_from_(model, file, LoraSettings(rank=4, alpha=2.0, targets=()))
    for ours, other in zip(predict(model), predict(source), strict=True):
        assert torch.allclose(ours, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flat", [False, True])
def test_fused_projections_are_split_exactly(tmp_path, flat):
    generator = torch.Generator().manual_seed(3)
    down, up = torch.randn(4, 48, generator=generator), torch.randn(144, 4, generator=generator)
    out_down, out_up = torch.randn(4, 48, generator=generator), torch.randn(48, 4, generator=generator)
    contents = {}
    for name, a, b in (("layers.1.attention.qkv", down, up), ("layers.1.attention.out", out_down, out_up)):
        if flat:
            stem = f"lora_unet_{name.replace('.', '_')}"
            contents |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b, f"{stem}.alpha": torch.tensor(2.0)}
        else:
            stem = f"diffusion_model.{name}"
            contents |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, f"{stem}.alpha": torch.tensor(2.0)}
    path = tmp_path / "fused.safetensors"
    safetensors.torch.save_file(contents, path)
    file = load_lora(path, linear_names(tiny_transformer()))
    assert set(file.scales) == {f"layers.1.attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert set(file.scales.values()) == {0.5}
    ups = [file.tensors[f"layers.1.attention.{name}.lora_B.weight"] for name in ("to_q", "to_k", "to_v")]
    downs = [file.tensors[f"layers.1.attention.{name}.lora_A.weight"] for name in ("to_q", "to_k", "to_v")]
    assert torch.equal(torch.cat(ups), up)
    assert all(torch.equal(d, down) for d in downs)
    assert torch.equal(file.tensors["layers.1.attention.to_out.0.lora_B.weight"], out_up)


def problem_of(error: pytest.ExceptionInfo[SimpletunerError]) -> str:
    (problem,) = error.value.problems
    for language in LANGUAGES:
        assert all(render_problem(problem, language))
    return " | ".join(str(part) for part in (problem.code, *render_problem(problem, "en")))


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ({"lokr_w1": (2, 2), "lokr_w2": (24, 24)}, "LoKr"),
        ({"hada_w1_a": (48, 2), "hada_w1_b": (2, 48), "hada_w2_a": (48, 2), "hada_w2_b": (2, 48)}, "LoHa"),
        ({"oft_blocks": (2, 2)}, "OFT"),
        ({"diff": (48, 48)}, "full weights"),
        ({"something": (2, 2)}, "?"),
    ],
)
def test_another_kind_of_adapter_is_refused_by_name(tmp_path, parts, kind):
    path = tmp_path / "other.safetensors"
    state = {"layers.1.attention.to_k.lora_A.weight": torch.ones(2, 48)}
    state["layers.1.attention.to_k.lora_B.weight"] = torch.ones(48, 2)
    state |= {f"layers.0.attention.to_q.{name}": torch.zeros(shape) for name, shape in parts.items()}
    safetensors.torch.save_file(state, path)
    with pytest.raises(ModelError) as error:
        load_lora(path)
    assert f"is not a plain LoRA (found: {kind})" in problem_of(error)
    assert "layers.0.attention.to_q" in problem_of(error)


def test_an_adapter_for_another_model_is_refused_with_names_that_are_near(tmp_path):
    path = tmp_path / "other.safetensors"
    name = "layers.0.attention.to_query"
    safetensors.torch.save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 48), f"{name}.lora_B.weight": torch.ones(48, 2)}, path
    )
    with pytest.raises(ModelError) as error:
        load_lora(path, linear_names(tiny_transformer()))
    assert "1 of its 1 modules are unknown here, such as layers.0.attention.to_query" in problem_of(error)
    assert "layers.0.attention.to_q" in problem_of(error).split("look like them: ")[1]


def test_a_model_is_no_adapter(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tiny_transformer().state_dict(), path)
    with pytest.raises(ModelError) as error:
        load_lora(path)
    assert "holds the weights of a model" in problem_of(error)


@pytest.mark.parametrize("lost", ["lora_A.weight", "lora_B.weight"])
def test_half_a_pair_is_refused(tmp_path, lost):
    path = tmp_path / "half.safetensors"
    state = dict(adapter_state(adapted("attention")))
    del state[f"layers.0.attention.to_q.{lost}"]
    safetensors.torch.save_file(state, path)
    with pytest.raises(ModelError) as error:
        load_lora(path)
    assert f"layers.0.attention.to_q has lora_{'B' if lost[5] == 'A' else 'A'}.weight, but not {lost}" in problem_of(
        error
    )


@pytest.mark.parametrize("size", [0, 5, 400])
def test_a_damaged_file_is_refused(tmp_path, size):
    path = tmp_path / LORA_FILE_NAME
    save_lora(path, adapter_state(adapted("attention")), INFO)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError) as error:
        load_lora(path)
    assert "E-LORA-DAMAGED" in problem_of(error)
    assert str(path) in problem_of(error)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SimpletunerError) as error:
        load_lora(tmp_path / "nowhere.safetensors")
    assert "nowhere.safetensors" in problem_of(error)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / LORA_FILE_NAME
    state = adapter_state(adapted("attention"))
    save_lora(path, state, INFO)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SimpletunerError) as error:
        save_lora(path, state, LoraInfo(rank=4, alpha=1.0))
    assert error.value.problems[0].code == "E-DISK-FULL"
    assert path.read_bytes() == before
    assert list(Path(tmp_path).iterdir()) == [path]
