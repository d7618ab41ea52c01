"""Precision and what is traded for memory."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt

from simpletuner.catalog.precisions import PRECISION_SPELLINGS, PRECISIONS
from simpletuner.config.fields import Opt, Section


class MemorySection(Section):
    mixed_precision: Annotated[Literal["bf16", "fp16", "no"], Opt(level="basic", spellings=(("fp32", "no"),))] = "bf16"
    """Number format of the computation: bf16 on current GPUs, fp16 on older ones, no for float32."""

    base_model_precision: Annotated[
        str, Opt(level="basic", choices=tuple(PRECISIONS), spellings=PRECISION_SPELLINGS)
    ] = "no_change"
    """Number format of the frozen base model's large weights: int8 halves their memory at almost no loss, nf4 quarters
    it. int8 and nf4 are short for int8-torchao and nf4-bnb."""

    text_encoder_precision: Annotated[
        str,
        Opt(
            choices=tuple(PRECISIONS),
            spellings=PRECISION_SPELLINGS,
            aliases=(
                "text_encoder_1_precision",
                "text_encoder_2_precision",
                "text_encoder_3_precision",
                "text_encoder_4_precision",
            ),
        ),
    ] = "no_change"
    """Number format of the text encoder, which is only needed while prompts are cached. As base_model_precision."""

    quantize_via: Annotated[Literal["accelerator", "cpu", "pipeline"], Opt()] = "accelerator"
    """Where weights are quantised: each one by itself as it is read, on the GPU (accelerator, pipeline) or in main
    memory before it is moved (cpu). The peak of memory is the quantised model and one weight either way."""

    quantized_model_dir: Annotated[str | None, Opt(holds="path", shown_default="not kept")] = None
    """Folder in which the quantised base model is kept, and from which the next start takes it: it then starts sooner,
    and reads half (int8) or a quarter (nf4) as much."""

    base_model_default_dtype: Annotated[Literal["bf16", "fp32"], Opt()] = "bf16"
    """Number format of the weights of the base model that are not quantised. With fp32 they are kept in float32 and
    multiplied in the format of mixed_precision, which takes twice their memory."""

    gradient_checkpointing: Annotated[bool, Opt(level="basic")] = True
    """Recompute activations in the backward pass: much less memory for about a third more time."""

    gradient_checkpointing_interval: Annotated[int, Ge(0), Opt(unit="blocks", spellings=(("auto", "0"),))] = 1
    """Recompute every n-th block: 1 takes the least memory, 2 and more are faster on larger GPUs. auto (or 0)
    recomputes as few blocks as fit into gradient_checkpointing_budget, or into what the GPU has free. The result is
    the same."""

    gradient_checkpointing_budget: Annotated[float | None, Gt(0), Opt(unit="GiB", shown_default="what is free")] = None
    """With gradient_checkpointing_interval auto: memory that the activations of the main blocks may take between
    forward and backward. By default what a GPU has free beside everything else, as measured in the first steps."""

    gradient_checkpointing_offload: Annotated[bool, Opt()] = False
    """Keep the inputs of recomputed blocks in main memory and fetch each shortly before it is needed: saves about 1 GiB
    of GPU memory for each image of 1024 px in a batch, and costs little time. CUDA only."""

    vae_enable_tiling: Annotated[bool, Opt()] = False
    """Encode and decode images larger than the VAE's own size (1024 px for Z-Image) in overlapping tiles: memory no
    longer grows with the image, and pixels change slightly where tiles meet."""

    vae_enable_slicing: Annotated[bool, Opt()] = False
    """Accepted, but changes nothing: images are always encoded and decoded one at a time, so that none depends on the
    others of its batch."""

    vae_dtype: Annotated[Literal["default", "bf16", "fp16", "fp32"], Opt(level="expert")] = "default"
    """Number format of the VAE. default: bf16 on a GPU, fp32 on a CPU."""

    keep_vae_loaded: Annotated[bool, Opt(level="expert")] = False
    """Keep the VAE in memory, on the GPU if there is one, from the latent cache to the last validation. Without it,
    it is loaded again for the first images and waits in main memory in between."""

    offload_during_startup: Annotated[bool, Opt()] = False
    """Accepted, but changes nothing: the text encoder, the VAE and the transformer are always loaded one after the
    other, each after the memory of the one before it was given back."""
