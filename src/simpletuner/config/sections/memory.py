"""Precision and what is traded for memory."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from simpletuner.catalog.precisions import PRECISION_SPELLINGS, PRECISIONS
from simpletuner.config.fields import Opt, Section


class MemorySection(Section):
    memory_plan: Annotated[Literal["off", "auto"], Opt(level="basic")] = "off"
    """auto chooses base_model_precision, text_encoder_precision, gradient checkpointing and how many blocks are
    streamed so that the run fits into the memory that is free, at the least cost in time and quality. What you set
    yourself stays."""

    fit: Annotated[str | None, Opt(level="basic", shown_default="what is free")] = None
    """The memory to plan for, such as 10GB: of the GPU, or main memory on a CPU. Switches memory_plan on."""

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

    gradient_checkpointing_keep: Annotated[Literal["auto", "input", "product"], Opt()] = "auto"
    """What a recomputed block keeps: its input, which takes the least memory, or two of its products as well (product),
    which takes three times as much and makes a step about 8% faster. auto: product on a CPU, and within the
    budget of an automatic interval; otherwise input. The result is the same."""

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

    enable_group_offload: Annotated[bool, Opt()] = False
    """Keep the transformer's frozen weights in main memory and bring them to the GPU a group at a time, when they are
    used: much less GPU memory, the same result. Not with optimum-quanto's formats."""

    group_offload_type: Annotated[Literal["block_level", "leaf_level"], Opt()] = "block_level"
    """What travels together: whole blocks (block_level) or each linear layer by itself (leaf_level), which takes the
    least GPU memory and more copies."""

    group_offload_blocks_per_group: Annotated[int, Ge(1), Opt(unit="blocks")] = 1
    """Blocks in a group of block_level. More make fewer and larger copies, and take more GPU memory."""

    group_offload_blocks: Annotated[int | None, Ge(1), Opt(unit="blocks", shown_default="all")] = None
    """How many of the transformer's main blocks are streamed; the others stay on the GPU. Fewer are faster."""

    group_offload_use_stream: Annotated[bool, Opt()] = False
    """Copy the next group while the GPU computes with this one, in forward and in backward: two groups are on the GPU
    instead of one. Needs CUDA."""

    group_offload_to_disk_path: Annotated[str | None, Opt(holds="path", shown_default="main memory")] = None
    """Folder in which the weights wait instead of in main memory. Use a fast local disk. A later run with the same
    weights reads what is there."""

    group_offload_text_encoder: Annotated[bool, Opt()] = False
    """Group offload for the text encoder, while prompts are cached."""

    group_offload_vae: Annotated[bool, Opt()] = False
    """Keep the VAE in main memory and bring each of its parts to the GPU while it runs."""

    musubi_blocks_to_swap: Annotated[int, Ge(0), Le(29), Opt(unit="blocks")] = 0
    """So many of the main blocks are streamed from main memory, evenly spread; the others stay on the GPU. The same as
    enable_group_offload with group_offload_blocks and, on CUDA, group_offload_use_stream."""

    ramtorch: Annotated[bool, Opt()] = False
    """Stream the transformer's linear layers from main memory, each by itself: as enable_group_offload at leaf_level
    with group_offload_use_stream on CUDA. Runs on this program's own streaming, and with int8 and nf4 too."""

    ramtorch_target_modules: Annotated[tuple[str, ...] | None, Opt(shown_default="all")] = None
    """Stream only these linear layers: names, endings of names ("feed_forward.w1") or patterns with *."""

    ramtorch_transformer_percent: Annotated[float, Gt(0), Le(100), Opt(unit="%")] = 100.0
    """Share of the transformer's linear layers that ramtorch streams, evenly spread."""

    ramtorch_text_encoder: Annotated[bool, Opt()] = False
    """Stream the text encoder's linear layers too, while prompts are cached."""

    ramtorch_text_encoder_percent: Annotated[float, Gt(0), Le(100), Opt(unit="%")] = 100.0
    """Share of the text encoder's linear layers that ramtorch_text_encoder streams, evenly spread."""

    ramtorch_vae: Annotated[bool, Opt()] = False
    """The same as group_offload_vae."""
