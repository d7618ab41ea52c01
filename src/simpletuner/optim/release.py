"""Updates inside backward: each parameter moves as soon as its gradient is there, and the gradient is freed.

So the gradients of a whole model never exist at once (Lv et al. 2023, https://arxiv.org/abs/2306.09782). The weights
that result are those of an update after backward, bit for bit. What needs all gradients first cannot be had: clipping
by their common norm, accumulation over several passes, optimizers that keep a count for all parameters together.

Short parameters of our own optimizers are updated together in rows, so they wait until backward is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simpletuner.optim.bucketed import BucketedOptimizer, is_long
from simpletuner.optim.build import set_learning_rate_


class ReleasedUpdates:
    """Moves `params` during each backward between `begin` and `finish`."""

    def __init__(
        self, params: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, *, clip_value: float | None = None
    ) -> None:
        """`params` are all that `optimizer` moves, in one group. Gradients' elements are clamped to +-`clip_value`."""
        assert len(optimizer.param_groups) == 1
        self._params, self._optimizer, self._clip_value = tuple(params), optimizer, clip_value
        self._norms: dict[nn.Parameter, Tensor] = {}
        self._is_open = False
        for param in params:
            param.register_post_accumulate_grad_hook(self._take)

    def begin(self, learning_rate: float) -> None:
        """A backward comes, whose gradients are to be used at this rate."""
        set_learning_rate_(self._optimizer, learning_rate)
        self._norms, self._is_open = {}, True

    def finish(self) -> Tensor:
        """Backward is done. Move what waited; return the norm of all gradients before they were clamped."""
        self._is_open = False
        seen = [param for param in self._params if param in self._norms]
        if isinstance(self._optimizer, BucketedOptimizer):
            for run in self._optimizer.runs_of(seen):
                if not is_long(run[0]):
                    self._move(run)
        norm: Tensor = torch.linalg.vector_norm(torch.stack([self._norms[param] for param in seen]))
        return norm

    @torch.no_grad()
    def _take(self, param: Tensor) -> None:
        assert isinstance(param, nn.Parameter) and param.grad is not None
        if not self._is_open:
            return
        self._norms[param] = torch.linalg.vector_norm(param.grad, dtype=torch.float32)
        if self._clip_value is not None:
            param.grad.clamp_(-self._clip_value, self._clip_value)
        if not isinstance(self._optimizer, BucketedOptimizer) or is_long(param):
            self._move([param])

    def _move(self, params: list[nn.Parameter]) -> None:
        optimizer = self._optimizer
        if isinstance(optimizer, BucketedOptimizer):
            optimizer.step_run(params)
        else:
            (group,) = optimizer.param_groups
            everything, group["params"] = group["params"], params
            try:
                optimizer.step()
            finally:
                group["params"] = everything
        for param in params:
            param.grad = None
