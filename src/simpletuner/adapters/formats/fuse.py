"""Three adapters of q, k and v as one of the fused matrix, and back; what is exact stays exact, bit for bit.

Fused from split: the down matrices stacked, the ups in a block diagonal, so that the rank is the sum of the three and
alpha grows with it. Where the three share their down matrix, as after a split, it is kept once instead. Split from
fused: the rows of the up matrix that belong to each; a rank that is zero in those rows is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from simpletuner.adapters.formats.names import fused_of, is_fused, split_of
from simpletuner.adapters.formats.weights import Adapter, LohaWeights, LokrWeights, LoraWeights, ModuleWeights


def can_split(weights: ModuleWeights) -> bool:
    """Whether a fused adapter falls into three exactly: LoKr does if w1 has whole rows for each."""
    return not isinstance(weights, LokrWeights) or weights.w1[0].shape[0] % 3 == 0


def can_fuse(parts: Sequence[ModuleWeights | None]) -> bool:
    """Whether adapters of q, k and v (None: that one has none) are exactly one of the fused matrix."""
    present = [weights for weights in parts if weights is not None]
    kinds = {weights.kind for weights in present}
    magnitudes = {weights.magnitude is not None for weights in present}
    complete = len(present) == len(parts)
    return len(kinds) == 1 and "LoKr" not in kinds and (magnitudes == {False} or (complete and magnitudes == {True}))


def split(adapter: Adapter) -> Adapter:
    """The adapter with fused modules split, as far as that is exact."""
    modules: dict[str, ModuleWeights] = {}
    for name, weights in adapter.modules.items():
        if is_fused(name) and can_split(weights):
            modules.update(_split(name, weights))
        else:
            modules[name] = weights
    return replace(adapter, modules=modules)


def fuse(adapter: Adapter) -> Adapter:
    """The adapter with q, k and v fused, as far as that is exact; each fused one where its first part was."""
    modules: dict[str, ModuleWeights] = {}
    for name, weights in adapter.modules.items():
        fused = fused_of(name)
        if fused is None:
            modules[name] = weights
        elif fused not in modules:
            parts = [adapter.modules.get(part) for part in split_of(fused)]
            if can_fuse(parts):
                modules[fused] = _fuse(parts)
            else:
                modules[name] = weights
    return replace(adapter, modules=modules)


def _split(name: str, weights: ModuleWeights) -> Mapping[str, ModuleWeights]:
    names = split_of(name)
    magnitudes: Sequence[Tensor | None] = [None] * 3
    if weights.magnitude is not None:
        magnitudes = [part.clone() for part in weights.magnitude.chunk(3)]
    if isinstance(weights, LoraWeights):
        parts: Sequence[ModuleWeights | None] = _split_lora(weights)
    elif isinstance(weights, LokrWeights):
        first, *others = weights.w1
        parts = [replace(weights, w1=(rows.clone(), *others)) for rows in first.chunk(3)]
    else:
        parts = _split_loha(weights)
    named = zip(names, parts, magnitudes, strict=True)
    return {n: replace(part, magnitude=magnitude) for n, part, magnitude in named if part is not None}


def _split_lora(weights: LoraWeights) -> list[LoraWeights | None]:
    """None for a third whose rows are all zero beside others that are not; with magnitudes all three are kept."""
    ups = weights.up.chunk(3)
    kept = _columns(ups, weights.rank, complete=weights.magnitude is not None)
    alphas = [None if weights.alpha is None else weights.alpha * len(columns) / weights.rank for columns in kept]
    return [
        LoraWeights(down=weights.down[columns], up=up[:, columns], alpha=alpha) if columns else None
        for up, columns, alpha in zip(ups, kept, alphas, strict=True)
    ]


def _split_loha(weights: LohaWeights) -> list[ModuleWeights | None]:
    (first_a, first_b), (second_a, second_b) = weights.w1, weights.w2
    ups = [torch.cat(pair, dim=1) for pair in zip(first_a.chunk(3), second_a.chunk(3), strict=True)]
    rank = weights.rank
    both = _columns([up[:, :rank].abs() + up[:, rank:].abs() for up in ups], rank, complete=True)
    alphas = [None if weights.alpha is None else weights.alpha * len(columns) / rank for columns in both]
    return [
        LohaWeights(
            w1=(up[:, :rank][:, columns], first_b[columns]),
            w2=(up[:, rank:][:, columns], second_b[columns]),
            alpha=alpha,
        )
        for up, columns, alpha in zip(ups, both, alphas, strict=True)
    ]


def _columns(ups: Sequence[Tensor], rank: int, *, complete: bool) -> list[list[int]]:
    """Which columns of each up [O, R] are needed. Three equal blocks on the diagonal are recognised, zeros and all."""
    used = [up.ne(0).any(dim=0) for up in ups]
    third = rank // 3
    own = [torch.arange(rank) // max(third, 1) == index for index in range(3)]
    if rank % 3 == 0 and not any((mask & ~block).any() for mask, block in zip(used, own, strict=True)):
        return [block.nonzero().flatten().tolist() for block in own]
    found: list[list[int]] = [mask.nonzero().flatten().tolist() for mask in used]
    everything = list(range(rank))
    if not any(found):
        return [everything] * 3
    return [columns or (everything if complete else []) for columns in found]


def _fuse(parts: Sequence[ModuleWeights | None]) -> ModuleWeights:
    present = [weights for weights in parts if weights is not None]
    magnitudes = [weights.magnitude for weights in present if weights.magnitude is not None]
    magnitude = torch.cat([m.flatten() for m in magnitudes]) if magnitudes else None
    if isinstance(present[0], LoraWeights):
        return replace(_fuse_lora(parts), magnitude=magnitude)
    return replace(_fuse_loha(parts), magnitude=magnitude)


def _fuse_lora(parts: Sequence[ModuleWeights | None]) -> LoraWeights:
    present = [weights for weights in parts if isinstance(weights, LoraWeights)]
    alpha, factors = _common_alpha(present)
    ups = [_times(w.up, factor) for w, factor in zip(present, factors, strict=True)]
    first = present[0].down
    if len(present) == len(parts) and factors == [1.0] * 3 and all(torch.equal(w.down, first) for w in present[1:]):
        return LoraWeights(down=first, up=torch.cat(ups), alpha=present[0].alpha)
    return LoraWeights(down=torch.cat([w.down for w in present]), up=_diagonal(ups, parts), alpha=alpha)


def _fuse_loha(parts: Sequence[ModuleWeights | None]) -> LohaWeights:
    present = [weights for weights in parts if isinstance(weights, LohaWeights)]
    alpha, factors = _common_alpha(present)
    first = [_times(w.w1[0], factor) for w, factor in zip(present, factors, strict=True)]
    return LohaWeights(
        w1=(_diagonal(first, parts), torch.cat([w.w1[1] for w in present])),
        w2=(_diagonal([w.w2[0] for w in present], parts), torch.cat([w.w2[1] for w in present])),
        alpha=alpha,
    )


def _common_alpha(present: Sequence[LoraWeights] | Sequence[LohaWeights]) -> tuple[float | None, list[float]]:
    """(alpha of the fused adapter, what each up is multiplied by): equal scales are kept, others go into the ups."""
    scales = [weights.scale for weights in present]
    total = sum(weights.rank for weights in present)
    if len(set(scales)) == 1:
        alphas = [weights.alpha for weights in present if weights.alpha is not None]
        return (sum(alphas) if len(alphas) == len(present) else scales[0] * total), [1.0] * len(present)
    return float(total), scales


def _diagonal(ups: Sequence[Tensor], parts: Sequence[ModuleWeights | None]) -> Tensor:
    """Blocks on the diagonal; a part that has no adapter gets rows of zeros."""
    rows = ups[0].shape[0]
    fused = ups[0].new_zeros(rows * len(parts), sum(up.shape[1] for up in ups))
    column, remaining = 0, iter(ups)
    for index, part in enumerate(parts):
        if part is not None:
            up = next(remaining)
            fused[index * rows : (index + 1) * rows, column : column + up.shape[1]] = up
            column += up.shape[1]
    return fused


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)
