"""The adapter that is trained, and the assistant that turbo models need beside it."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from simpletuner.config.fields import Opt, Section


class AdapterSection(Section):
    lora_type: Annotated[Literal["standard", "lycoris"], Opt(spellings=(("lokr", "lycoris"),))] = "standard"
    """The kind of adapter: standard (LoRA) or lycoris (LoKr and its relatives)."""

    lora_rank: Annotated[int, Ge(1), Le(1024), Opt(level="basic", unit="channels")] = 16
    """Inner dimension of each adapter pair. Memory and file size grow linearly with it; 4 to 16 suit a first try."""

    lora_alpha: Annotated[float | None, Gt(0), Opt(shown_default="lora_rank")] = None
    """The adapter's output is scaled by lora_alpha / lora_rank. Without a value it equals the rank (scale 1)."""

    lora_dropout: Annotated[float, Ge(0), Lt(1), Opt()] = 0.0
    """Share of the adapter's inputs that is zeroed in each training step."""

    lora_targets: Annotated[Literal["attention", "attention+mlp", "all"], Opt(level="basic")] = "attention+mlp"
    """Which layers get an adapter: attention, attention and MLP, or every linear layer of the blocks and refiners."""

    peft_lora_target_modules: Annotated[tuple[str, ...] | None, Opt(level="expert")] = None
    """Names of the modules that get an adapter, in place of lora_targets: a list, or a JSON file that holds one."""

    use_dora: Annotated[bool, Opt()] = False
    """Train the length of each weight row beside the low-rank update (DoRA). Closer to full training than a LoRA of
    the same rank; slower."""

    lora_init_type: Annotated[
        Literal["default", "gaussian", "pissa", "olora", "loftq"], Opt(level="expert", spellings=(("true", "default"),))
    ] = "default"
    """How an adapter begins: default and gaussian at random; pissa and olora from the largest parts of each weight,
    which takes minutes for a whole model and makes files of twice the rank."""

    lora_format: Annotated[Literal["comfyui", "diffusers", "kohya"], Opt()] = "comfyui"
    """Names in the file of the result. comfyui and diffusers load in both programs; kohya has lora_unet_ names and
    loads in ComfyUI and recent diffusers. Checkpoints keep comfyui: a run can be resumed with another value."""

    init_lora: Annotated[str | None, Opt(holds="path")] = None
    """LoRA file to start from, in place of a fresh adapter."""

    lycoris_config: Annotated[
        str | None, Opt(holds="path", shown_default="lycoris_config.json beside the configuration")
    ] = None
    """JSON file with the settings of lora_type lycoris: algo, multiplier, linear_dim, linear_alpha, and for LoKr factor
    and full_matrix; apply_preset chooses the layers."""

    init_lokr_norm: Annotated[float | None, Gt(0), Le(1), Opt(level="expert")] = None
    """Start a LoKr at random, with an update of this share of each weight's norm, in place of one of zero."""

    assistant_lora_path: Annotated[
        str | None, Opt(holds="location", keeps_empty=True, shown_default="by model_flavour")
    ] = None
    """Adapter that keeps a turbo model's few-step ability out of the trained weights: hub id, folder or file. turbo
    and turbo-ostris-v2 fill it in."""

    assistant_lora_weight_name: Annotated[str | None, Opt(shown_default="by model_flavour")] = None
    """File of the assistant adapter inside assistant_lora_path."""

    assistant_lora_strength: Annotated[float, Ge(0), Le(10), Opt()] = 1.0
    """Weight of the assistant adapter while training."""

    assistant_lora_inference_strength: Annotated[float, Ge(0), Le(10), Opt()] = 0.0
    """Weight of the assistant adapter in validation images. 0 leaves it out, as at inference."""

    assistant_lora_mode: Annotated[Literal["auto", "live", "merged"], Opt()] = "auto"
    """How the assistant takes part: live beside the trained adapter, or merged into the weights before they are
    quantised and subtracted in validation images, which makes steps faster. auto merges where weights are quantised."""

    disable_assistant_lora: Annotated[bool, Opt()] = False
    """Train a turbo model without the assistant adapter. The result loses quality."""


def has_assistant(adapter: AdapterSection) -> bool:
    """Whether the options name an assistant adapter that is to be used: an empty path, or none, names none."""
    path = adapter.assistant_lora_path
    return path is not None and path.strip().lower() not in ("", "none") and not adapter.disable_assistant_lora


def merges_assistant(adapter: AdapterSection, *, is_quantised: bool) -> bool:
    """Whether the assistant is added to the weights; left to the program, where their format rounds them anyway, and
    no DoRA takes the lengths of the sum for the model's own."""
    if adapter.assistant_lora_mode != "auto":
        return adapter.assistant_lora_mode == "merged"
    return is_quantised and not adapter.use_dora
