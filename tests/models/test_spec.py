"""The family's facts agree with the modules they describe."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from simpletuner.models.z_image.sampler import draw_noise
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.transformer import PATCH, ZImageTransformer, ZImageTransformerConfig


@pytest.fixture(scope="module")
def linears() -> dict[str, nn.Linear]:
    """The linear layers of the released model, without their weights."""
    with torch.device("meta"):
        model = ZImageTransformer(ZImageTransformerConfig())
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def chosen(patterns: tuple[str, ...], names: dict[str, nn.Linear]) -> set[str]:
    expressions = [re.compile(re.escape(pattern).replace(r"\*", r"\d+")) for pattern in patterns]
    for pattern, expression in zip(patterns, expressions, strict=True):
        assert any(expression.fullmatch(name) for name in names), f"{pattern} matches nothing"
    return {name for name in names if any(expression.fullmatch(name) for expression in expressions)}


@pytest.mark.parametrize(("preset", "per_rank"), [("attention", 921_600), ("attention+mlp", 2_188_800)])
def test_presets_of_the_main_blocks_have_the_known_parameter_counts(
    linears: dict[str, nn.Linear], preset: str, per_rank: int
) -> None:
    names = chosen(Z_IMAGE.lora_targets(preset), linears)
    assert all(name.startswith("layers.") for name in names)
    assert sum(linears[name].in_features + linears[name].out_features for name in names) == per_rank


def test_all_is_every_linear_layer(linears: dict[str, nn.Linear]) -> None:
    assert chosen(Z_IMAGE.lora_targets("all"), linears) == linears.keys()


def test_every_linear_layer_is_either_quantised_or_protected_never_half(linears: dict[str, nn.Linear]) -> None:
    protected = chosen(Z_IMAGE.never_quantised, linears)
    rest = linears.keys() - protected
    assert all(".attention." in name or ".feed_forward." in name for name in rest)
    assert not any(".attention." in name or ".feed_forward." in name for name in protected)


def test_an_unknown_preset_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        Z_IMAGE.lora_targets("everything")


def test_sizes_agree_with_the_modules() -> None:
    assert Z_IMAGE.patch == PATCH
    assert Z_IMAGE.latent_channels == ZImageTransformerConfig().in_channels == len(draw_noise((16, 16), seed=0))
    assert Z_IMAGE.alignment_px == 16
    assert Z_IMAGE.latents_per_token == 4


def test_ids_and_sampling_need_neither_diffusers_nor_transformers() -> None:
    """A run whose caches are warm and that draws no images must not pay seconds for imports that it does not use."""
    code = (
        "import sys, simpletuner.models.weights, simpletuner.models.z_image.load, simpletuner.models.z_image.text, "
        "simpletuner.models.z_image.vae, simpletuner.models.z_image.sampler, simpletuner.models.z_image.spec\n"
        "heavy = {'diffusers', 'transformers', 'huggingface_hub', 'peft', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
