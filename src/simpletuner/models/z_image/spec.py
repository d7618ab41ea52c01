"""Z-Image as a `FamilySpec`."""

from __future__ import annotations

from simpletuner.models.family import FamilySpec, LoraPreset
from simpletuner.models.z_image.layouts import needs_text_tensor

_ATTENTION_NAMES = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
_MLP_NAMES = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
_ATTENTION = tuple(f"layers.*.{name}" for name in _ATTENTION_NAMES)
_MLP = tuple(f"layers.*.{name}" for name in _MLP_NAMES)
_REFINERS = tuple(f"{s}.*.{n}" for s in ("noise_refiner", "context_refiner") for n in _ATTENTION_NAMES + _MLP_NAMES)
_MODULATION = ("layers.*.adaLN_modulation.0", "noise_refiner.*.adaLN_modulation.0")
_ENDS = (
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
    "cap_embedder.1",
    "all_x_embedder.2-1",
    "all_final_layer.2-1.linear",
    "all_final_layer.2-1.adaLN_modulation.1",
)

Z_IMAGE = FamilySpec(
    name="z_image",
    latent_channels=16,
    vae_factor=8,
    patch=2,
    max_prompt_tokens=512,
    lora_presets=(
        LoraPreset(name="attention", targets=_ATTENTION),
        LoraPreset(name="attention+mlp", targets=_ATTENTION + _MLP),
        LoraPreset(name="all", targets=_ATTENTION + _MLP + _REFINERS + _MODULATION + _ENDS),
    ),
    never_quantised=_MODULATION + _ENDS,
    transformer_classes=("ZImageTransformer2DModel",),
    vae_classes=("AutoencoderKL",),
    text_encoder_types=("qwen3",),
    needs_text_tensor=needs_text_tensor,
)
