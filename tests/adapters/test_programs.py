"""What the program says about who loads a file, against what really loads it."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner.adapters.formats.fuse import fuse
from simpletuner.adapters.formats.layouts import LAYOUTS
from simpletuner.adapters.formats.names import parse_key
from simpletuner.adapters.formats.programs import PROGRAMS, Verdict, who_loads
from simpletuner.adapters.formats.weights import Adapter, LohaWeights, LokrWeights, LoraWeights
from simpletuner.adapters.formats.write import to_tensors
from simpletuner.catalog.modules import to_native
from simpletuner.i18n import LANGUAGES, catalog

from .comfyui import comfyui_deltas
from .conftest import TINY, tiny_transformer

DIM = TINY["dim"]
NAMES = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")


def lora(names=NAMES, *, magnitude: bool = False) -> Adapter:
    generator = torch.Generator().manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    modules = {
        f"layers.{block}.{name}": LoraWeights(
            down=draw(2, DIM), up=draw(DIM, 2), alpha=3.0, magnitude=draw(DIM).abs() if magnitude else None
        )
        for block in range(2)
        for name in names
    }
    return Adapter(modules=modules, metadata={})


def lycoris(kind: str) -> Adapter:
    if kind == "LoKr":
        weights: Any = LokrWeights(w1=(torch.randn(4, 4),), w2=(torch.randn(12, 2), torch.randn(2, 12)), alpha=3.0)
    else:
        pair = (torch.randn(DIM, 2), torch.randn(2, DIM))
        weights = LohaWeights(w1=pair, w2=pair, alpha=3.0)
    return Adapter(modules={f"layers.{block}.{name}": weights for block in range(2) for name in NAMES}, metadata={})


def renamed(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): tensor.clone() for key, tensor in tensors.items()}


def without_alpha(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}


COMFYUI, DIFFUSERS, KOHYA = (to_tensors(lora(), LAYOUTS[name]) for name in ("comfyui", "diffusers", "kohya-split"))
NATIVE = {
    f"diffusion_model.{to_native(name)}.{part}": tensor
    for name, weights in fuse(lora()).modules.items()
    for part, tensor in (("lora_down.weight", weights.tensors[0]), ("lora_up.weight", weights.tensors[1]))
}
FILES = {
    "comfyui": COMFYUI,
    "comfyui without alpha": without_alpha(COMFYUI),
    "comfyui, kohya's parts": renamed(renamed(COMFYUI, "lora_A", "lora_down"), "lora_B", "lora_up"),
    "comfyui-fused": to_tensors(lora(), LAYOUTS["comfyui-fused"]),
    "native with down and up": NATIVE,
    "diffusers": DIFFUSERS,
    "diffusers with alpha": renamed(COMFYUI, "diffusion_model.", "transformer."),
    "diffusers with a default": renamed(DIFFUSERS, ".weight", ".default.weight"),
    "diffusers fused": renamed(to_tensors(lora(), LAYOUTS["comfyui-fused"]), "diffusion_model.", "transformer."),
    "bare": renamed(DIFFUSERS, "transformer.", ""),
    "bare with alpha": renamed(COMFYUI, "diffusion_model.", ""),
    "bare with a default": renamed(renamed(DIFFUSERS, "transformer.", ""), ".weight", ".default.weight"),
    "peft": renamed(DIFFUSERS, "transformer.", "base_model.model."),
    "kohya": to_tensors(lora(), LAYOUTS["kohya"]),
    "kohya, only out": to_tensors(lora(("attention.to_out.0",)), LAYOUTS["kohya"]),
    "kohya-split": KOHYA,
    "kohya with A and B": renamed(renamed(KOHYA, "lora_down", "lora_A"), "lora_up", "lora_B"),
    "lycoris": renamed(KOHYA, "lora_unet_", "lycoris_"),
    "lokr": to_tensors(lycoris("LoKr"), LAYOUTS["comfyui"]),
    "lokr, transformer.": without_alpha(
        renamed(to_tensors(lycoris("LoKr"), LAYOUTS["comfyui"]), "diffusion_model.", "transformer.")
    ),
    "lokr, lycoris_": renamed(to_tensors(lycoris("LoKr"), LAYOUTS["kohya-split"]), "lora_unet_", "lycoris_"),
    "loha": to_tensors(lycoris("LoHa"), LAYOUTS["comfyui"]),
    "dora": to_tensors(lora(magnitude=True), LAYOUTS["comfyui"]),
    "dora, diffusers": to_tensors(lora(magnitude=True), LAYOUTS["diffusers"]),
    "mixed": {
        **{key: tensor for key, tensor in COMFYUI.items() if "layers.0." in key},
        **{key: tensor for key, tensor in DIFFUSERS.items() if "layers.1." in key},
    },
}


def verdict(program: str, tensors: dict[str, Tensor]) -> Verdict:
    return next(v for v in who_loads(tuple(tensors), {}) if v.program == program)


@pytest.mark.parametrize("name", FILES)
def test_comfyui_is_said_to_load_what_its_rules_leave_no_key_of(name):
    tensors = FILES[name]
    has_magnitude = any("magnitude" in key or "dora" in key for key in tensors)
    if has_magnitude:
        tensors = {key: tensor for key, tensor in tensors.items() if "magnitude" not in key and "dora" not in key}
    _, unused = comfyui_deltas(tensors, dim=DIM)
    assert verdict("ComfyUI", tensors).loads == (not unused), unused


def test_comfyui_wants_doras_magnitudes_under_one_name():
    assert verdict("ComfyUI", FILES["dora"]).loads
    assert verdict("ComfyUI", FILES["dora, diffusers"]).reasons == ("peft_magnitude",)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

        transformer = ZImageTransformer2DModel(**TINY, n_kv_heads=TINY["n_heads"])
    transformer.load_state_dict(tiny_transformer().state_dict())
    scheduler = FlowMatchEulerDiscreteScheduler()
    return ZImagePipeline(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer)


@pytest.mark.parametrize("name", FILES)
def test_diffusers_is_said_to_load_what_it_loads(name, pipeline, caplog):
    """It loads if it neither raises nor warns of keys, and adapts as many layers as the file has."""
    tensors = {key: tensor.clone() for key, tensor in FILES[name].items()}
    logger = logging.getLogger("diffusers")
    caplog.set_level(logging.WARNING, "diffusers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline.load_lora_weights(tensors, adapter_name="x")
        said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        adapted = {
            n.split(".lora_")[0].split(".lokr_")[0] for n, _ in pipeline.transformer.named_parameters() if ".x" in n
        }
        loads = not said and bool(adapted) and adapted >= {"layers.0.attention.to_out.0", "layers.1.attention.to_out.0"}
    except (ValueError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        loads, said = False, [repr(error)]
    finally:
        logger.removeHandler(caplog.handler)
        pipeline.unload_lora_weights()
    assert verdict("diffusers", FILES[name]).loads == loads, (said, verdict("diffusers", FILES[name]))


@pytest.mark.parametrize("name", FILES)
def test_musubi_takes_flat_split_names_only(name):
    assert verdict("musubi-tuner", FILES[name]).loads == (name in ("kohya-split",))


def test_an_alpha_in_the_metadata_is_a_strength_that_comfyui_does_not_see():
    metadata = {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 4}'}
    found = next(v for v in who_loads(tuple(DIFFUSERS), metadata) if v.program == "ComfyUI")
    assert found.loads and found.reasons == ("alpha_in_metadata",)
    equal = {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 2}'}
    assert not next(v for v in who_loads(tuple(DIFFUSERS), equal) if v.program == "ComfyUI").reasons


def test_every_reason_has_a_text_and_every_text_a_file():
    """No reason is only thought up: each is given for one of the files above, or one of these."""
    others = {
        "unread": ({"layers.0.attention.to_q.oft_blocks": torch.zeros(1)}, {}),
        "nothing": ({}, {}),
        "unknown": ({"diffusion_model.blocks.0.q.lora_A.weight": torch.zeros(1)}, {}),
        "native ends": ({"lora_unet_x_embedder.lora_down.weight": torch.zeros(1)}, {}),
        "alpha": (DIFFUSERS, {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 4}'}),
        "lokr": ({**FILES["lokr"], **COMFYUI}, {}),
        "incomplete": ({"diffusion_model.layers.0.attention.to_q.lora_A.weight": torch.zeros(1)}, {}),
        "twice": ({**COMFYUI, **FILES["diffusers with alpha"]}, {}),
    }
    files = {**{name: (tensors, {}) for name, tensors in FILES.items()}, **others}
    given = {r for tensors, data in files.values() for v in who_loads(tuple(tensors), data) for r in v.reasons}
    for language in LANGUAGES:
        texts = {key.removeprefix("inspect.reason.") for key in catalog(language) if key.startswith("inspect.reason.")}
        assert texts == given
    assert [v.program for v in who_loads((), {})] == list(PROGRAMS)


def test_every_layout_names_modules_so_that_they_are_found_again():
    model = tiny_transformer()
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in linears:
        for spelled in (name, to_native(name)):
            for stem in (f"diffusion_model.{spelled}", f"lora_unet_{spelled.replace('.', '_')}"):
                key = parse_key(f"{stem}.lora_A.weight")
                assert key is not None and key.module == name, stem
