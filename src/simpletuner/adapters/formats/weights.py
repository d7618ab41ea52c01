"""One adapter in memory, whatever file it comes from: what each module's weight changes by.

LoRA: Hu et al. 2021 (https://arxiv.org/abs/2106.09685). DoRA: Liu et al. 2024 (https://arxiv.org/abs/2402.09353).
LoHa: Hyeon-Woo et al. 2021 (https://arxiv.org/abs/2108.06098). LoKr and the scaling rules of the last two: Yeh et al.
2023 (https://arxiv.org/abs/2309.14859).

Letters: O rows (out), I columns (in), R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """scale B A with B = `up` [O, R], A = `down` [R, I]; scale = alpha / R, 1 without an alpha.

    With a `magnitude` [O] it is DoRA: each row of W plus the update is set to that length.
    """

    kind: ClassVar[str] = "LoRA"
    down: Tensor
    up: Tensor
    alpha: float | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.down, self.up

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The update [O, I]."""
        return (self.up.to(dtype) * self.scale) @ self.down.to(dtype)


@dataclass(frozen=True, kw_only=True)
class LokrWeights:
    """scale w1 (x) w2, the Kronecker product. Each is a matrix, or a pair whose product it is.

    The rank is the inner one of the pair; of two matrices the alpha has no meaning and the scale is 1.
    """

    kind: ClassVar[str] = "LoKr"
    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    alpha: float | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int | None:
        pair = next((pair for pair in (self.w2, self.w1) if len(pair) == 2), None)
        return None if pair is None else pair[1].shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1[0].shape[0] * self.w2[0].shape[0], self.w1[-1].shape[1] * self.w2[-1].shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.w1, *self.w2)

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The update [O, I]."""
        return torch.kron(product(self.w1, dtype), product(self.w2, dtype)) * self.scale


@dataclass(frozen=True, kw_only=True)
class LohaWeights:
    """scale (w1_a w1_b) * (w2_a w2_b), entry by entry; w1_a [O, R], w1_b [R, I], scale = alpha / R."""

    kind: ClassVar[str] = "LoHa"
    w1: tuple[Tensor, Tensor]
    w2: tuple[Tensor, Tensor]
    alpha: float | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.w1[1].shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1[0].shape[0], self.w1[1].shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.w1, *self.w2)

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The update [O, I]."""
        return product(self.w1, dtype) * product(self.w2, dtype) * self.scale


ModuleWeights = LoraWeights | LokrWeights | LohaWeights


@dataclass(frozen=True, kw_only=True)
class WeightedSum:
    """Several adapters of one module, each times its strength: what a merge should be, where that is no LoRA."""

    parts: tuple[tuple[ModuleWeights, float], ...]

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The update [O, I]."""
        (first, strength), *others = self.parts
        total = first.delta(dtype) * strength
        for weights, strength in others:
            total.add_(weights.delta(dtype), alpha=strength)
        return total


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A whole adapter. Modules have the model's own names; `<block>.attention.qkv` stands for the three, fused."""

    modules: Mapping[str, ModuleWeights]
    metadata: Mapping[str, str]

    @property
    def has_magnitudes(self) -> bool:
        return any(weights.magnitude is not None for weights in self.modules.values())


def product(factors: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """The matrix itself, or what the two multiply to."""
    first, *others = (factor.to(dtype) for factor in factors)
    return first @ others[0] if others else first


def merge_(weight_OI: Tensor, delta_OI: Tensor, magnitude_O: Tensor | None, strength: float = 1.0) -> None:
    """Put an update into `weight_OI`, `strength` times; DoRA goes that share of the way. `delta_OI` is used up."""
    if magnitude_O is None:
        weight_OI.add_(delta_OI, alpha=strength)
        return
    whole_OI = delta_OI.add_(weight_OI)
    lengths_O1 = whole_OI.norm(dim=1, keepdim=True).clamp_min(torch.finfo(whole_OI.dtype).tiny)
    whole_OI.mul_(magnitude_O.to(whole_OI.dtype).reshape(-1, 1) / lengths_O1)
    weight_OI.lerp_(whole_OI, strength)
