"""Any adapter as LoRA of a chosen rank, by the singular value decomposition of its update, with the error that is left.

No update is ever decomposed as a large matrix where it has a structure: that of B A follows from the two small factors
of QR decompositions, that of a Kronecker product from those of its two factors, and LoHa of rank R is LoRA of rank R^2.
A full matrix, such as the difference of two models, is decomposed by subspace iteration: Halko, Martinsson and Tropp
2009, "Finding structure with randomness" (https://arxiv.org/abs/0909.4061).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from simpletuner.adapters.formats.weights import (
    LohaWeights,
    LokrWeights,
    LoraWeights,
    ModuleWeights,
    WeightedSum,
    product,
)

_EXACT_SIDE = 768  # matrices with no longer a side are decomposed in full
_OVERSAMPLING = 16
_ITERATIONS = 4


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """How much to keep of every module: at most `rank` directions, or so many that `energy` of the update is kept.

    `energy` in (0, 1] is the share of the squared singular values. With both, the smaller rank decides.
    """

    rank: int | None = None
    energy: float | None = None

    def count(self, values: Tensor) -> int:
        """How many of the singular values, given in falling order, are kept; at least one."""
        count = len(values)
        if self.energy is not None:
            kept = values.double().square().cumsum(0)
            enough = kept >= self.energy * kept[-1] * (1 - 1e-12)
            count = int(enough.int().argmax()) + 1 if bool(kept[-1] > 0) else 1
        return max(1, min(count, self.rank or count))


@dataclass(frozen=True, kw_only=True)
class _Svd:
    """U S V^T: u [O, K], values [K] in falling order, v [I, K]."""

    u: Tensor
    values: Tensor
    v: Tensor


def as_lora(weights: ModuleWeights) -> LoraWeights | None:
    """The same update as LoRA, exactly, if that needs no decomposition and no larger rank than its sides."""
    if isinstance(weights, LoraWeights):
        return weights
    if isinstance(weights, LohaWeights) and weights.rank**2 <= min(weights.shape):
        return _from_loha(weights)
    return None


def reduce(weights: ModuleWeights, reduction: Reduction, *, dtype: torch.dtype | None = None) -> LoraWeights:
    """The best LoRA of that size. LoRA that is small enough is returned as it is.

    The factors share the singular values evenly and have alpha = rank, in `dtype` (that of the weights).
    """
    if isinstance(weights, LoraWeights) and reduction.energy is None and weights.rank <= (reduction.rank or 0):
        return weights
    found = _decompose(weights)
    count = reduction.count(found.values)
    return _balanced(found, count, dtype or weights.tensors[0].dtype, weights.magnitude)


def reduce_matrix(delta_OI: Tensor, rank: int, *, dtype: torch.dtype) -> LoraWeights:
    """The best LoRA of that rank of a full update; randomised for large ones, but the same at every call."""
    rank = min(rank, *delta_OI.shape)
    delta_OI = delta_OI.float()
    found = _full(delta_OI) if min(delta_OI.shape) <= _EXACT_SIDE else _randomised(delta_OI, rank)
    return _balanced(found, rank, dtype, None)


def update_norm(weights: ModuleWeights | WeightedSum) -> float:
    """Frobenius norm of the update."""
    if isinstance(weights, LoraWeights):
        return _factored_norm(weights.up.double() * weights.scale, weights.down.double())
    if isinstance(weights, LokrWeights):
        norms = [float(product(side, torch.float64).norm()) for side in (weights.w1, weights.w2)]
        return math.prod(norms) * abs(weights.scale)
    return float(weights.delta().norm(dtype=torch.float64))


def difference_norm(first: ModuleWeights | WeightedSum, second: ModuleWeights) -> float:
    """Frobenius norm of the difference of two updates of one shape, without the large matrices where both are LoRA."""
    if isinstance(first, LoraWeights) and isinstance(second, LoraWeights):
        ups = torch.cat([first.up.double() * first.scale, second.up.double() * -second.scale], dim=1)
        return _factored_norm(ups, torch.cat([first.down.double(), second.down.double()]))
    return float(first.delta().sub_(second.delta()).norm(dtype=torch.float64))


def _decompose(weights: ModuleWeights) -> _Svd:
    if isinstance(weights, LokrWeights):
        return _kronecker(weights)
    lora = as_lora(weights)
    if lora is None:
        return _full(weights.delta())
    found = _factored(lora.up.double(), lora.down.double())
    return _signed(found, lora.scale)


def _kronecker(weights: LokrWeights) -> _Svd:
    """Singular values of a Kronecker product are all products of the two sides', vectors the products of theirs."""
    first, second = (_side(factors) for factors in (weights.w1, weights.w2))
    values, order = torch.outer(first.values, second.values).flatten().sort(descending=True, stable=True)
    count = int((values > values[0] * torch.finfo(torch.float32).eps).sum()) or 1
    left, right = order[:count] // len(second.values), order[:count] % len(second.values)
    u, v = (
        torch.einsum("ak,bk->abk", a[:, left], b[:, right]).flatten(0, 1)
        for a, b in ((first.u, second.u), (first.v, second.v))
    )
    return _signed(_Svd(u=u, values=values[:count], v=v), weights.scale)


def _side(factors: tuple[Tensor, ...]) -> _Svd:
    if len(factors) == 2 and factors[1].shape[0] < min(factors[0].shape[0], factors[1].shape[1]):
        return _factored(factors[0].double(), factors[1].double())
    return _full(product(factors, torch.float64))


def _from_loha(weights: LohaWeights) -> LoraWeights:
    (first_a, first_b), (second_a, second_b) = weights.w1, weights.w2
    up = torch.einsum("oi,oj->oij", first_a.float(), second_a.float()).flatten(1)
    down = torch.einsum("in,jn->ijn", first_b.float(), second_b.float()).flatten(0, 1)
    alpha = weights.scale * down.shape[0]
    return LoraWeights(down=down, up=up, alpha=alpha, magnitude=weights.magnitude)


def _factored(up_OR: Tensor, down_RI: Tensor) -> _Svd:
    q_up, r_up = torch.linalg.qr(up_OR)
    q_down, r_down = torch.linalg.qr(down_RI.mT)
    inner = _full(r_up @ r_down.mT)
    return _Svd(u=q_up @ inner.u, values=inner.values, v=q_down @ inner.v)


def _full(matrix_OI: Tensor) -> _Svd:
    u, values, vt = torch.linalg.svd(matrix_OI, full_matrices=False)
    return _Svd(u=u, values=values, v=vt.mT)


def _randomised(matrix_OI: Tensor, rank: int) -> _Svd:
    generator = torch.Generator().manual_seed(0)
    width = min(rank + _OVERSAMPLING, *matrix_OI.shape)
    probe = torch.randn(matrix_OI.shape[1], width, generator=generator).to(matrix_OI)
    basis = torch.linalg.qr(matrix_OI @ probe).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix_OI @ torch.linalg.qr(matrix_OI.mT @ basis).Q).Q
    inner = _full(basis.mT @ matrix_OI)
    return _Svd(u=basis @ inner.u, values=inner.values, v=inner.v)


def _signed(found: _Svd, scale: float) -> _Svd:
    """Of `scale` times the matrix; a negative one turns the left vectors round."""
    return _Svd(u=-found.u if scale < 0 else found.u, values=found.values * abs(scale), v=found.v)


def _balanced(found: _Svd, count: int, dtype: torch.dtype, magnitude: Tensor | None) -> LoraWeights:
    roots = found.values[:count].sqrt()
    return LoraWeights(
        down=(found.v[:, :count] * roots).mT.to(dtype).contiguous(),
        up=(found.u[:, :count] * roots).to(dtype).contiguous(),
        alpha=float(count),
        magnitude=magnitude,
    )


def _factored_norm(up_OR: Tensor, down_RI: Tensor) -> float:
    r_up = torch.linalg.qr(up_OR, mode="r").R
    r_down = torch.linalg.qr(down_RI.mT, mode="r").R
    return float((r_up @ r_down.mT).norm())
