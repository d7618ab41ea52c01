"""Refined captions, kept: the context refiner sees nothing but the caption, so a frozen one runs once per caption."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEFAULT_BUDGET_BYTES = 1 << 30


class ContextCache:
    """Maps prompts to refined context, computing what is missing.

    `embedding_of(prompt)` gives the prompt embedding [S, D]; `refine` is the model's `refine_context`. Results are
    kept on the model's device up to `budget_bytes`, the least recently used going first; with `keep=False` (something
    in the refiner is trained) none is kept and gradients flow.
    """

    def __init__(
        self,
        refine: Callable[[Sequence[Tensor]], list[Tensor]],
        embedding_of: Callable[[str], Tensor],
        *,
        device: torch.device,
        keep: bool,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
    ) -> None:
        self._refine = refine
        self._embedding_of = embedding_of
        self._device = device
        self._keep = keep
        self._budget_bytes = budget_bytes
        self._bytes = 0
        self._contexts: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return one context per prompt, [S rounded up to 32, dim]."""
        if not self._keep:
            return self._refine([self._embedding_of(prompt).to(self._device) for prompt in prompts])
        return [self._kept(prompt) for prompt in prompts]

    def _kept(self, prompt: str) -> Tensor:
        context = self._contexts.get(prompt)
        if context is not None:
            self._contexts.move_to_end(prompt)
            return context
        # One caption at a time: its context must not depend, in the last bit, on which others were missing too.
        with torch.no_grad():
            context = self._refine([self._embedding_of(prompt).to(self._device)])[0].clone()
        self._contexts[prompt] = context
        self._bytes += context.nbytes
        while self._bytes > self._budget_bytes and len(self._contexts) > 1:
            _, evicted = self._contexts.popitem(last=False)
            self._bytes -= evicted.nbytes
        return context
