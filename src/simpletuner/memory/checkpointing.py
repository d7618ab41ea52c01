"""Gradient checkpointing: forget a block's activations after forward and compute them again in backward."""

from __future__ import annotations

from torch import nn


def apply_checkpointing(blocks: nn.ModuleList, *, every: int, preserve_rng_state: bool = False) -> int:
    """Recompute every `every`-th block during backward, starting with the first. Returns how many.

    Args:
        blocks: called as `block(hidden, *rest)`; each returns one tensor. Their `forward` is replaced on the instance,
            so that module and parameter names stay as they are.
        every: 1 recomputes every block: the least memory, one more forward per step. n recomputes one block in n and
            keeps the activations of the others: for cards with memory to spare.
        preserve_rng_state: needed if a block draws random numbers (dropout); costs a copy of the generator's state.
    """
    raise NotImplementedError
