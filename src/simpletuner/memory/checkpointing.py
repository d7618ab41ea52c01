"""Gradient checkpointing: forget a block's activations after forward and compute them again in backward.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (https://arxiv.org/abs/1604.06174). The recomputation
is an autograd function of our own, because `torch.utils.checkpoint` calls back into Python for every tensor that a
block saves: on a small model that is a tenth of a step. Values and gradients are bit for bit those without
checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[..., Tensor]


def apply_checkpointing(blocks: nn.ModuleList, *, every: int, preserve_rng_state: bool = False) -> int:
    """Recompute every `every`-th block during backward, starting with the first. Returns how many.

    With 1, every block is recomputed: the least memory, at the price of one more forward. With n, one block in n is,
    and the others keep their activations: faster, for cards with memory to spare. The last block is never recomputed.
    Its backward comes right after its forward, so its activations are there at the peak either way.

    Args:
        blocks: run one after the other, each called with positional arguments and returning one tensor. `forward` is
            replaced on the instances; names of modules and parameters stay as they are.
        preserve_rng_state: needed if a block draws random numbers (dropout); costs a copy of the generators' states.
    """
    assert every >= 1
    chosen = range(0, len(blocks) - 1, every)
    for index in chosen:
        block = blocks[index]
        block.forward = partial(_checkpointed, block, block.forward, preserve_rng_state)
    return len(chosen)


def _checkpointed(block: nn.Module, forward: Forward, preserve_rng_state: bool, *args: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args)
    # Autograd gives a function's gradients to its arguments, so the parameters that are trained must be among them.
    # They are looked up in each call: adapters and sharding change them after this function was put in place.
    trained = list(_trained_parameters(block))
    slots = [index for index, arg in enumerate(args) if isinstance(arg, Tensor)]
    tensors = [args[index] for index in slots]
    if not trained and not any(t.requires_grad for t in tensors):
        return forward(*args)

    def run(*values: Tensor) -> Tensor:
        filled = list(args)
        for index, value in zip(slots, values, strict=True):
            filled[index] = value
        return forward(*filled)

    # `run` outlives this call: it must not hold the activations that enter the block twice.
    args = tuple(None if isinstance(arg, Tensor) else arg for arg in args)
    out: Tensor = _Recompute.apply(run, _Surroundings(tensors, preserve_rng_state), len(tensors), *tensors, *trained)
    return out


class _Recompute(torch.autograd.Function):
    """`run(*tensors)`, of which only the tensors are kept for backward."""

    @staticmethod
    def forward(ctx: Any, run: Forward, surroundings: _Surroundings, num_tensors: int, *inputs: Tensor) -> Tensor:
        ctx.run, ctx.surroundings, ctx.trained = run, surroundings, inputs[num_tensors:]
        ctx.save_for_backward(*inputs[:num_tensors])
        with surroundings.autocast():
            return run(*inputs[:num_tensors])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        with torch.enable_grad(), ctx.surroundings.autocast(), ctx.surroundings.random_state():
            out = ctx.run(*tensors)
            seed = _Seed.apply(out, gradient)
        inputs = (*tensors, *ctx.trained)
        gradients: list[Tensor | None] = [None] * len(inputs)
        wanted = [index for index, value in enumerate(inputs) if value.requires_grad]
        # An adapter that is switched off leaves its parameters, or everything, out of the graph.
        if out.requires_grad:
            found = torch.autograd.grad(seed, [inputs[i] for i in wanted], allow_unused=True)
            for index, value in zip(wanted, found, strict=True):
                gradients[index] = value
        return (None, None, None, *gradients)


class _Seed(torch.autograd.Function):
    """A scalar whose gradient with respect to `out` is `gradient`.

    Handing `gradient` to `torch.autograd.grad` means the same, but torch then imports sympy to compare the shapes:
    half a second and 40 MB of a run that has no symbolic shape.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


class _Surroundings:
    """What else decides a block's output: the autocast state and, if asked for, the random state."""

    def __init__(self, tensors: list[Tensor], preserve_rng_state: bool) -> None:
        self.device = tensors[0].device
        kind = self.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.rng_state = torch.get_rng_state() if preserve_rng_state else None
        on_device = preserve_rng_state and kind != "cpu"
        self.device_rng_state: Tensor | None = self._module().get_rng_state(self.device) if on_device else None

    def autocast(self) -> torch.autocast | nullcontext[None]:
        """Autocast as at the call. Its cache of cast weights stays off: what forward casts without a graph must not
        be served to the recomputation, which needs one."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=False)

    @contextmanager
    def random_state(self) -> Iterator[None]:
        """Random numbers as at the call; afterwards the generators go on where they were."""
        if self.rng_state is None:
            yield
            return
        devices = [] if self.device_rng_state is None else [self.device]
        with torch.random.fork_rng(devices=devices, device_type=self.device.type if devices else "cuda"):
            torch.set_rng_state(self.rng_state)
            if self.device_rng_state is not None:
                self._module().set_rng_state(self.device_rng_state, self.device)
            yield

    def _module(self) -> Any:
        return torch.get_device_module(self.device)


def _trained_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """As `module.parameters()`, filtered; several times faster, which counts in a function called for every block."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            yield parameter
    for child in module._modules.values():
        if child is not None:
            yield from _trained_parameters(child)
