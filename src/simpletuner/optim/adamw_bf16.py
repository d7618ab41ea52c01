"""AdamW with moments in bfloat16: half the optimizer memory of float32, the same steps on average.

The update is AdamW's (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101), computed in float32. What is kept
between steps, the two moments and any bfloat16 parameter, is stored with stochastic rounding (see `rounding`), so
that changes too small for bfloat16 still arrive in expectation. float32 parameters, such as adapter weights, are
updated in float32 and lose nothing. The rounding depends on (seed, step) alone: it neither reads nor moves the global
random state, and a resumed run rounds like an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from simpletuner.optim.bucketed import Bucket, BucketedOptimizer
from simpletuner.optim.rounding import RoundingNoise


class AdamWBf16(BucketedOptimizer):
    """AdamW whose moments are kept in `moment_dtype`; with float32 it is `torch.optim.AdamW`."""

    STATE_NAMES = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
        moment_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.moment_dtype = moment_dtype
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, seed=seed)

    def state_dtype(self, param: nn.Parameter) -> torch.dtype:
        return self.moment_dtype

    def update_(self, bucket: Bucket, noise: RoundingNoise) -> None:
        lr, eps, weight_decay = (bucket.hyper[name] for name in ("lr", "eps", "weight_decay"))
        beta1, beta2 = bucket.hyper["betas"]
        grads = bucket.gradients()
        mean = bucket.rows["exp_avg"].float().lerp_(grads, 1 - beta1)
        square = bucket.rows["exp_avg_sq"].float().mul_(beta2).addcmul_(grads, grads, value=1 - beta2)
        # The exact moments drive this update; only what the next one reads is rounded.
        denominator = square.sqrt().div_(math.sqrt(1 - beta2**bucket.step)).add_(eps)
        values = bucket.values().mul_(1 - lr * weight_decay)
        values.addcdiv_(mean, denominator, value=-lr / (1 - beta1**bucket.step))
        bucket.store_values_(values, noise)
        bucket.store_state_("exp_avg", mean, noise)
        bucket.store_state_("exp_avg_sq", square, noise)
