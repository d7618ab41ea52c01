"""Lion: the sign of a momentum, one state per parameter (Chen et al. 2023, https://arxiv.org/abs/2302.06675).

Every element moves by the learning rate, whatever the gradient's size: use about a tenth of AdamW's rate and ten times
its weight decay. Arithmetic is float32; a bfloat16 parameter and its momentum are stored with stochastic rounding,
because the rate is often below half a unit in the last place of a bfloat16 weight.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from simpletuner.optim.bucketed import Bucket, BucketedOptimizer
from simpletuner.optim.rounding import Dither


class Lion(BucketedOptimizer):
    """The momentum "exp_avg" has the parameter's dtype."""

    STATE_NAMES = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, seed=seed)

    def state_dtype(self, param: nn.Parameter) -> torch.dtype:
        return param.dtype

    def update_(self, bucket: Bucket, dither: Dither) -> None:
        lr, weight_decay = bucket.hyper["lr"], bucket.hyper["weight_decay"]
        beta1, beta2 = bucket.hyper["betas"]
        momentum = bucket.state("exp_avg")
        values, grads = bucket.operands()
        momenta = bucket.pieces(momentum, values)
        directions = torch._foreach_lerp(momenta, grads, 1 - beta1)
        torch._foreach_sign_(directions)
        torch._foreach_mul_(values, 1 - lr * weight_decay)
        torch._foreach_add_(values, directions, alpha=-lr)
        torch._foreach_lerp_(momenta, grads, 1 - beta2)
        bucket.store_values_(values, dither)
        bucket.store_state_("exp_avg", momentum, dither)
