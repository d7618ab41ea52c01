"""Which of the transformer's blocks are recomputed in backward, as the options ask for it on this device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from simpletuner.config.sections.memory import MemorySection
from simpletuner.events.types import Event, SettingOverridden
from simpletuner.memory.budget import Budget, CudaMemory, FixedBudget, SeenBudget, WithinBudget
from simpletuner.memory.checkpointing import apply_checkpointing, apply_policy
from simpletuner.models.z_image.transformer import KEPT_PRODUCTS, Layout, ZImageTransformer
from simpletuner.planner.from_config import AUTO, may_keep_product


def apply_recomputation(
    transformer: ZImageTransformer,
    options: MemorySection,
    *,
    device: torch.device,
    params: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    uses_dropout: bool,
    emit: Callable[[Event], None],
) -> None:
    """Wrap the main blocks, and all of the refiners' where something in them is trained. What the device cannot do is
    left out with a notice."""
    if not options.gradient_checkpointing:
        return
    on_cuda = device.type == "cuda"
    offload, every = options.gradient_checkpointing_offload, options.gradient_checkpointing_interval
    if offload and not on_cuda:
        offload = False
        emit(_override("gradient_checkpointing_offload", "true", "false"))
    if every == AUTO and options.gradient_checkpointing_budget is None and not on_cuda:
        every = 1
        emit(_override("gradient_checkpointing_interval", "auto", "1"))
    for stack in (transformer.noise_refiner, transformer.context_refiner):
        if any(parameter.requires_grad for parameter in stack.parameters()):
            apply_checkpointing(stack, every=1, preserve_rng_state=uses_dropout, ends_pass=False)
    products = KEPT_PRODUCTS if may_keep_product(options, device.type) else ()
    blocks = transformer.layers
    if every != AUTO:
        apply_checkpointing(blocks, every=every, products=products, offload=offload, preserve_rng_state=uses_dropout)
        return
    budget: Budget
    if options.gradient_checkpointing_budget is not None:
        budget = FixedBudget(int(options.gradient_checkpointing_budget * 2**30))
    else:
        budget = SeenBudget(
            CudaMemory(device),
            is_settled=lambda: bool(optimizer.state),
            reserve_bytes=sum(parameter.nbytes for parameter in params),
        )
    policy = WithinBudget(len(blocks), budget, offload=offload, key=_cost_key)
    apply_policy(blocks, policy, products=products, offload=offload, preserve_rng_state=uses_dropout)


def _cost_key(x_GSD: Tensor, layout: Layout, time_BD: Tensor) -> Hashable:
    """Blocks cost the same in passes of the same shape: a row for each sample, or all samples in one row."""
    return x_GSD.shape, layout.is_uniform, layout.rotation.ndim, torch.is_autocast_enabled(x_GSD.device.type)


def _override(option: str, requested: str, used: str) -> SettingOverridden:
    return SettingOverridden(option=option, requested=requested, used=used, reason=f"override.{option}")
