"""The layouts in which adapter files are written. Loads no torch.

| layout        | example of a key                                        | loads in                       |
|---------------|---------------------------------------------------------|--------------------------------|
| comfyui       | `diffusion_model.layers.0.attention.to_q.lora_A.weight` | ComfyUI, diffusers, ai-toolkit |
| diffusers     | `transformer.layers.0.attention.to_q.lora_A.weight`     | diffusers, ComfyUI             |
| comfyui-fused | `diffusion_model.layers.0.attention.qkv.lora_A.weight`  | ComfyUI                        |
| kohya         | `lora_unet_layers_0_attention_qkv.lora_down.weight`     | ComfyUI, recent diffusers      |
| kohya-split   | `lora_unet_layers_0_attention_to_q.lora_down.weight`    | musubi-tuner, diffusers        |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from simpletuner.adapters.formats.names import Part


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a file names things.

    `kinds` are what may be written. `fused`: q, k and v are one matrix, and all names are ComfyUI's. `flat`:
    underscores for dots, and kohya's names of the tensors. `alpha_keys`: the scale has a tensor of its own; else it is
    multiplied into the up matrix.
    """

    name: str
    prefix: str
    kinds: tuple[str, ...]
    fused: bool = False
    flat: bool = False
    alpha_keys: bool = True

    @property
    def down(self) -> str:
        return "lora_down.weight" if self.flat else Part.DOWN.value

    @property
    def up(self) -> str:
        return "lora_up.weight" if self.flat else Part.UP.value


_ROWS = (
    Layout(name="comfyui", prefix="diffusion_model.", kinds=("LoRA", "LoKr", "LoHa")),
    Layout(name="diffusers", prefix="transformer.", kinds=("LoRA",), alpha_keys=False),
    Layout(name="comfyui-fused", prefix="diffusion_model.", kinds=("LoRA", "LoHa"), fused=True),
    Layout(name="kohya", prefix="lora_unet_", kinds=("LoRA", "LoHa"), fused=True, flat=True),
    Layout(name="kohya-split", prefix="lora_unet_", kinds=("LoRA", "LoKr", "LoHa"), flat=True),
)
LAYOUTS: Mapping[str, Layout] = MappingProxyType({layout.name: layout for layout in _ROWS})
