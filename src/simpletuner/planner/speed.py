"""Operations of a training step, and how long they take on a device."""

from __future__ import annotations

from dataclasses import dataclass

from simpletuner.catalog.gpus import gpu_named
from simpletuner.planner.blocks import adapter_params
from simpletuner.planner.inputs import Picture, PlanInput

_USUAL_SHARE = 0.6  # of a GPU's sheet rate that such a step reaches
_ATTENTION_BACKWARD = 2.5  # in forwards: it computes the scores again


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Floating-point operations of one micro-batch; a multiplication and an addition are two."""

    forward: float
    step: float


def step_flops(plan: PlanInput) -> StepFlops:
    """Forward, backward without weight gradients of the frozen base, what is computed again, and rollouts."""
    sizes, picture = plan.sizes.transformer, plan.train
    linear, attention = _block_flops(plan, picture.tokens)
    prefix = sum(_block_flops(plan, picture.image_tokens)) * sizes.n_refiner_layers
    ends = 2 * picture.image_tokens * 64 * sizes.dim * 2
    num_again = len(range(0, sizes.n_layers - 1, plan.interval)) if plan.checkpointing else 0
    whole = plan.adapter.whole
    lora = 0 if whole else 2 * picture.tokens * adapter_params(plan, plan.adapter)
    forward = sizes.n_layers * (linear + attention) + prefix + ends + lora
    backward = sizes.n_layers * (linear + _ATTENTION_BACKWARD * attention) + ends + 2 * lora
    if whole:  # the weights' own gradients, and those of the refiners
        backward += sizes.n_layers * linear + 2 * prefix + ends
    again = linear + attention - (_kept_product_flops(plan, picture.tokens) if plan.keeps_product else 0.0)
    step = forward * (1 + plan.extra_forwards) + backward + num_again * again
    return StepFlops(forward=picture.count * forward, step=picture.count * step)


def image_flops(plan: PlanInput, picture: Picture, num_steps: int, guided: bool) -> float:
    """Sampling one image."""
    linear, attention = _block_flops(plan, picture.tokens)
    blocks = plan.sizes.transformer.n_layers + plan.sizes.transformer.n_refiner_layers
    return num_steps * (2 if guided else 1) * blocks * (linear + attention)


def sheet_flops_per_s(device_name: str) -> float | None:
    """What a GPU of that name reaches in such steps, from its data sheet; None for one that is not known."""
    gpu = gpu_named(device_name)
    return None if gpu is None else gpu.bf16_tflops * 1e12 * _USUAL_SHARE


def _kept_product_flops(plan: PlanInput, tokens: int) -> float:
    """The products of a block that a recomputed one may keep, on one sample: of attention and of feed-forward."""
    sizes = plan.sizes.transformer
    return 2.0 * tokens * sizes.dim * (sizes.dim + sizes.ffn_dim)


def _block_flops(plan: PlanInput, tokens: int) -> tuple[float, float]:
    """(linear layers, attention) of one block on one sample, forward."""
    sizes = plan.sizes.transformer
    weights = 4 * sizes.dim**2 + 3 * sizes.dim * sizes.ffn_dim
    return 2.0 * tokens * weights, 4.0 * tokens**2 * sizes.dim
