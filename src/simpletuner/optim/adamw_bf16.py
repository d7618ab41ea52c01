"""AdamW with moments in bfloat16: half the optimizer memory of float32, the same steps on average.

The update is AdamW's (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101), computed in float32. What is kept
between steps, the two moments and any bfloat16 parameter, is stored with stochastic rounding (see `rounding`), so
that changes too small for bfloat16 still arrive in expectation. float32 parameters, such as adapter weights, are
updated in float32 and lose nothing. The rounding depends on (seed, step) alone: it neither reads nor moves the global
random state, and a resumed run rounds like an uninterrupted one.

The other way is Kahan's (1965): round to the nearest and keep what that cut off in a second bfloat16, for the second
moment and for bfloat16 parameters. There is no chance in it, and it takes half as much memory again. The first moment
needs neither: an average over ten updates moves in steps that bfloat16 can tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from torch.optim.adamw import adamw

from simpletuner.optim.bucketed import VALUES, Bucket, BucketedOptimizer, rest_of
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
        rounding: Literal["stochastic", "kahan"] = "stochastic",
    ) -> None:
        self.moment_dtype = moment_dtype
        self.rounding = rounding
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, seed=seed)

    def state_dtype(self, param: nn.Parameter) -> torch.dtype:
        return self.moment_dtype

    def state_names(self, param: nn.Parameter) -> tuple[str, ...]:
        if self.rounding == "stochastic":
            return self.STATE_NAMES
        rest = (rest_of(VALUES),) if param.dtype == torch.bfloat16 else ()
        return (*self.STATE_NAMES, rest_of("exp_avg_sq"), *rest)

    def update_(self, bucket: Bucket, dither: Dither) -> None:
        beta1, beta2 = bucket.hyper["betas"]
        mean, square = bucket.state("exp_avg"), bucket.state("exp_avg_sq")
        values, grads = bucket.operands()
        # The exact moments drive this update; only what the next one reads is rounded.
        adamw(
            values,
            grads,
            bucket.pieces(mean, values),
            bucket.pieces(square, values),
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
        chance = dither if self.rounding == "stochastic" else None
        bucket.store_values_(values, chance)
        bucket.store_state_("exp_avg", mean, chance)
        bucket.store_state_("exp_avg_sq", square, chance)
