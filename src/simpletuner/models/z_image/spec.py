"""Z-Image as a `FamilySpec`."""

from __future__ import annotations

from simpletuner.catalog.modules import LORA_TARGETS, NEVER_QUANTISED
from simpletuner.models.family import FamilySpec, LoraPreset
from simpletuner.models.z_image.layouts import needs_text_tensor

Z_IMAGE = FamilySpec(
    name="z_image",
    latent_channels=16,
    vae_factor=8,
    patch=2,
    max_prompt_tokens=512,
    lora_presets=tuple(LoraPreset(name=name, targets=targets) for name, targets in LORA_TARGETS.items()),
    never_quantised=NEVER_QUANTISED,
    transformer_classes=("ZImageTransformer2DModel",),
    vae_classes=("AutoencoderKL",),
    text_encoder_types=("qwen3",),
    needs_text_tensor=needs_text_tensor,
)
