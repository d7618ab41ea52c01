"""Recompute as few blocks as a budget allows.

What a block keeps for backward is measured, once for each shape of its arguments: it is run once more with a graph, and
what autograd saves is counted. Then as many blocks keep their activations as fit; it is the last ones, for backward
begins with them: while the earlier ones are recomputed, one at a time, theirs is free again. Were it the first ones,
theirs would be there until the end, beside what a recomputation takes.

Before any block keeps everything, the recomputed ones keep some products (`products`), the last ones first: for
their size that saves about three times as much work.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from simpletuner.memory.products import KeptOutput

Forward = Callable[..., Tensor]
INPUTS_ON_DEVICE = 2  # with inputs in main memory: the one in use and the one that is fetched


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """What a block leaves for backward: its input if it is recomputed, its products if it keeps those too, else all
    that it saves (the input included)."""

    input_bytes: int
    saved_bytes: int
    product_bytes: int = 0

    def of_all(self, num_blocks: int, num_kept: int, *, num_products: int = 0, offload: bool) -> int:
        """Bytes that `num_blocks` blocks leave of which `num_kept` are not recomputed, and `num_products` keep their
        product."""
        inputs = num_blocks - num_kept
        if offload:
            inputs = min(inputs, INPUTS_ON_DEVICE)
        return inputs * self.input_bytes + num_products * self.product_bytes + num_kept * self.saved_bytes


class Budget(Protocol):
    """How much the activations may take."""

    def bytes_for(self, num_tokens: int, least_bytes: int) -> int:
        """For a pass of so many tokens, whose blocks leave `least_bytes` if all that can be are recomputed."""

    def seen(self, num_tokens: int) -> None:
        """Such a pass has gone forward and backward."""


class FixedBudget:
    """So many bytes, whatever the pass."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes

    def bytes_for(self, num_tokens: int, least_bytes: int) -> int:
        return self._size_bytes

    def seen(self, num_tokens: int) -> None:
        pass


class DeviceMemory(Protocol):
    """The memory of an accelerator, as this process sees it; bytes."""

    def available(self) -> int:
        """What this process has and what it could still get."""

    def peak(self) -> int:
        """The most that it has used at a time since `forget_peak`."""

    def forget_peak(self) -> None: ...


class CudaMemory:
    """`DeviceMemory` of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def available(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)


class SeenBudget:
    """What a device has left beside a pass in which all blocks were recomputed, as it was seen.

    Such a pass is made first, and again when a batch has more tokens than any before it. Nothing is learned before
    `is_settled`, the optimizer having its state. `reserve_bytes` and a share of the device stay free: for gradients
    that accumulate, and because an allocator cannot use every gap.
    """

    SHARE_KEPT_FREE = 0.04

    def __init__(self, memory: DeviceMemory, *, is_settled: Callable[[], bool], reserve_bytes: int) -> None:
        self._memory = memory
        self._is_settled = is_settled
        self._reserve_bytes = reserve_bytes
        self._most_tokens = 0
        self._needed_bytes = 0
        self._is_plain = False  # this pass recomputes all

    def bytes_for(self, num_tokens: int, least_bytes: int) -> int:
        self._is_plain = num_tokens > self._most_tokens
        if self._is_plain:
            self._memory.forget_peak()
            return least_bytes
        available = int(self._memory.available() * (1 - self.SHARE_KEPT_FREE))
        return least_bytes + max(0, available - self._needed_bytes - self._reserve_bytes)

    def seen(self, num_tokens: int) -> None:
        if self._is_plain and self._is_settled():
            self._needed_bytes = max(self._needed_bytes, self._memory.peak())
            self._most_tokens = max(self._most_tokens, num_tokens)


class WithinBudget:
    """A `checkpointing.Policy`: the last blocks keep their activations, as many as fit, one at least."""

    def __init__(self, num_blocks: int, budget: Budget, *, offload: bool, key: Callable[..., Hashable]) -> None:
        """`key(*args)` of a block: arguments of equal keys cost the same. The first argument is the activation
        [G, S, D]."""
        self._num_blocks = num_blocks
        self._budget = budget
        self._offload = offload
        self._key = key
        self._costs: dict[Hashable, BlockCost] = {}
        self._num_tokens = 0
        self.num_kept = 1
        self.num_products = 0

    def begin(self, forward: Forward, args: tuple[Any, ...], outputs: Sequence[KeptOutput]) -> None:
        key = self._key(*args)
        cost = self._costs.get(key)
        if cost is None:
            cost = self._costs[key] = measure_block(forward, args, outputs)
        self._num_tokens = args[0].shape[:-1].numel()
        least = cost.of_all(self._num_blocks, 1, offload=self._offload)
        self._choose(cost, self._budget.bytes_for(self._num_tokens, least), least)

    def recomputes(self, index: int) -> bool:
        return index < self._num_blocks - self.num_kept

    def keeps_products(self, index: int) -> bool:
        return index >= self._num_blocks - self.num_kept - self.num_products

    def end(self) -> None:
        self._budget.seen(self._num_tokens)

    def _choose(self, cost: BlockCost, budget_bytes: int, least_bytes: int) -> None:
        """`num_kept` and `num_products`: as many as fit."""
        count = self._num_blocks
        for num_kept in range(count, 0, -1):
            rest = count - num_kept if cost.product_bytes else 0
            if cost.of_all(count, num_kept, num_products=rest, offload=self._offload) <= budget_bytes:
                self.num_kept, self.num_products = num_kept, rest
                return
        spare = max(0, budget_bytes - least_bytes)
        self.num_kept = 1
        self.num_products = min(count - 1, spare // cost.product_bytes) if cost.product_bytes else 0


def measure_block(forward: Forward, args: tuple[Any, ...], outputs: Sequence[KeptOutput] = ()) -> BlockCost:
    """Run a block once more, with a graph that is thrown away, and count what is saved.

    Each storage counts once; what is there anyway does not: the other arguments, and parameters and quantised weights,
    which are of tensor classes of their own. Random numbers are drawn as if this had not been.
    """
    activation: Tensor = args[0]
    shared = {arg.untyped_storage().data_ptr() for arg in args[1:] if isinstance(arg, Tensor)}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in shared:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    on_gpu = activation.device.type == "cuda"
    with (
        ExitStack() as within,
        torch.random.fork_rng(devices=[activation.device] if on_gpu else []),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        noted = [within.enter_context(output.noting()) for output in outputs]
        forward(activation.detach().requires_grad_(), *args[1:])
    input_bytes = activation.untyped_storage().nbytes()
    return BlockCost(
        input_bytes=input_bytes,
        saved_bytes=sum(kept.values()),
        product_bytes=sum(x.nbytes for products in noted for x in products),
    )
