"""What a model family is, as one value. Code that serves any family takes what it needs from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LoraPreset:
    """A named choice of modules to adapt.

    `targets` are whole module names in which `*` stands for the number of a block: "layers.*.attention.to_q".
    """

    name: str
    targets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """Everything about a family that code outside its folder may ask.

    Image sides must be multiples of `alignment_px`. `never_quantised` are module-name patterns as in LoraPreset:
    small, and every token or every step passes through them.
    """

    name: str
    latent_channels: int
    vae_factor: int  # pixels per latent side
    patch: int  # latents per token side
    max_prompt_tokens: int
    lora_presets: tuple[LoraPreset, ...]
    never_quantised: tuple[str, ...]
    transformer_classes: tuple[str, ...]  # `_class_name` in the config.json of a part
    vae_classes: tuple[str, ...]
    text_encoder_types: tuple[str, ...]  # `model_type` in the text encoder's config.json
    needs_text_tensor: Callable[[str, int], bool]  # (stored name, number of layers) -> is it used

    @property
    def alignment_px(self) -> int:
        return self.vae_factor * self.patch

    @property
    def latents_per_token(self) -> int:
        """Latents that one image token covers."""
        return self.patch**2

    def lora_targets(self, preset: str) -> tuple[str, ...]:
        """Target patterns of the preset of that name; KeyError for another name."""
        return {row.name: row.targets for row in self.lora_presets}[preset]
