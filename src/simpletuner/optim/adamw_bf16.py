"""AdamW with moments in bfloat16: half the optimizer memory of float32, the same steps on average.

The update is AdamW's (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101), computed in float32. What is kept
between steps, the two moments and any bfloat16 parameter, is stored with stochastic rounding (see `rounding`), so
that changes too small for bfloat16 still arrive in expectation. float32 parameters, such as adapter weights, are
updated in float32 and lose nothing. The rounding depends on (seed, step) alone: it neither reads nor moves the global
random state, and a resumed run rounds like an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.adamw import adamw

from simpletuner.optim.bucketed import Bucket, BucketedOptimizer, pieces
from simpletuner.optim.rounding import Dither

_FUSED = ("cpu", "cuda", "mps", "xpu")  # devices for which torch has the update as one kernel


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

    def update_(self, bucket: Bucket, dither: Dither) -> None:
        beta1, beta2 = bucket.hyper["betas"]
        mean, square = bucket.rows["exp_avg"].float(), bucket.rows["exp_avg_sq"].float()
        values, grads = bucket.operands()
        # The exact moments drive this update; only what the next one reads is rounded.
        adamw(
            values,
            grads,
            pieces(mean, values),
            pieces(square, values),
            max_exp_avg_sqs=[],
            state_steps=list(torch.full((len(values),), bucket.step - 1.0, device=mean.device)),
            fused=mean.device.type in _FUSED,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=bucket.hyper["lr"],
            weight_decay=bucket.hyper["weight_decay"],
            eps=bucket.hyper["eps"],
            maximize=False,
        )
        bucket.store_values_(values, dither)
        bucket.store_state_("exp_avg", mean, dither)
        bucket.store_state_("exp_avg_sq", square, dither)
