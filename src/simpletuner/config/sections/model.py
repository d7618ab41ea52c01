"""Which model is trained and where its parts come from."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le

from simpletuner.catalog.families import DEFAULT_FLAVOUR, FLAVOURS
from simpletuner.config.fields import Opt, Section

_DEFAULT = FLAVOURS[DEFAULT_FLAVOUR]


class ModelSection(Section):
    model_type: Annotated[Literal["lora", "full"], Opt()] = "lora"
    """What is trained: an adapter (lora) or every weight of the model (full)."""

    model_family: Annotated[Literal["z_image"], Opt()] = "z_image"
    """The architecture. z-image is accepted as well."""

    model_flavour: Annotated[str, Opt(level="basic", choices=tuple(FLAVOURS))] = DEFAULT_FLAVOUR
    """The checkpoint. It decides where the weights come from and the defaults that suit them; without it, it is told
    from pretrained_model_name_or_path. demo is the small built-in model."""

    pretrained_model_name_or_path: Annotated[str, Opt(level="basic", holds="location")] = _DEFAULT.repository
    """Hub id, folder in the diffusers layout, or a single transformer file (.safetensors, .gguf). The default follows
    model_flavour."""

    pretrained_transformer_model_name_or_path: Annotated[str | None, Opt(holds="location")] = None
    """Take only the transformer from here: hub id, folder, or a single file: .safetensors in diffusers' or ComfyUI's
    layout, 8-bit floats included, or .gguf."""

    pretrained_transformer_subfolder: Annotated[str, Opt()] = "transformer"
    """Subfolder that holds the transformer. none: the root of the repository."""

    pretrained_vae_model_name_or_path: Annotated[str | None, Opt(holds="location")] = None
    """Take only the VAE from here: hub id or folder."""

    qwen_text_encoder_model_name_or_path: Annotated[str | None, Opt(holds="location")] = None
    """Take only the text encoder, a Qwen3 of the same size, from here: hub id, folder, or a .safetensors file. The
    tokenizer stays that of the pipeline."""

    revision: Annotated[str | None, Opt()] = None
    """Branch, tag or commit of the hub repository."""

    variant: Annotated[str | None, Opt()] = None
    """Variant of the weight files, such as bf16 or fp16."""

    tokenizer_max_length: Annotated[int, Ge(8), Le(2048), Opt(level="expert", unit="tokens")] = 512
    """Longest prompt that the text encoder sees; longer ones are cut."""
