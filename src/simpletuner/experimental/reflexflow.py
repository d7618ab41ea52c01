"""Loss of rolled-out pictures after ReflexFlow (Huang et al. 2025, https://arxiv.org/abs/2512.04904).

The paper names two ideas: rectify the drift by aiming from the drifted state at the clean picture, and weigh the loss
by the exposure bias so that the coarse content that was missed early is made up for. What exactly is computed is ours:

    loss = beta2 * mean(W * error) + beta1 * (1 - cos(predicted, target))
    W = (1 + alpha * |B| / mean |B|) / (1 + alpha),   B = drifted state - noised picture, averaged in blocks of 4 x 4

The cosine is of the whole sample. W has a mean of 1, so alpha moves weight without changing the loss' size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK = 4  # latents on a side: what is smaller than that is not coarse
_LEAST = 1e-12


@dataclass(frozen=True, kw_only=True)
class ReflexFlow:
    """`alpha`: weight of drifted places; `beta1` of direction; `beta2` of the ordinary error."""

    alpha: float = 1.0
    beta1: float = 10.0
    beta2: float = 1.0

    def loss(
        self, predicted: Tensor, target: Tensor, errors: Tensor, drift: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Of one sample, [] from [C, h, w] each; `errors` are by element. `weights`, [1, h, w] with a mean of 1, say
        how much each place counts: in the cosine, too, where 0 takes it out."""
        weighed = self.weights(drift) * errors
        if weights is not None:
            weighed, roots = weighed * weights, weights.sqrt()
            predicted, target = predicted.float() * roots, target.float() * roots
        cosine = functional.cosine_similarity(predicted.float().flatten(), target.float().flatten(), dim=0)
        return self.beta2 * weighed.mean() + self.beta1 * (1 - cosine)

    def weights(self, drift: Tensor) -> Tensor:
        """W, with a mean of 1; all 1 where nothing has drifted."""
        coarse = coarse_part(drift).abs()
        mean = coarse.mean()
        relative = torch.where(mean > _LEAST, coarse / mean.clamp_min(_LEAST), torch.ones_like(coarse))
        return (1 + self.alpha * relative) / (1 + self.alpha)


def coarse_part(drift: Tensor) -> Tensor:
    """Mean of each block of 4 x 4 in its place; blocks at the edges may be smaller."""
    height, width = drift.shape[-2:]
    blocks = functional.avg_pool2d(drift.float(), _BLOCK, ceil_mode=True, count_include_pad=False)
    wide = blocks.repeat_interleave(_BLOCK, dim=-1).repeat_interleave(_BLOCK, dim=-2)
    return wide[..., :height, :width]
