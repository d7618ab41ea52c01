"""What of an optimizer goes into a checkpoint, and the weights that it has learnt where they are not those it
trains on.

A schedule-free optimizer computes gradients at one point, y, while what it has learnt is another, x, an average of
where it has been (Defazio et al. 2024, https://arxiv.org/abs/2405.15682). Between updates the parameters hold y.
Images and files want x: see `averaged_weights`. Going to x and back by the library's formula would change y by
rounding, so y is put back as it was; validating and saving move nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from simpletuner.optim.settings import hyper_parameters

_TRAINED_ON = "trained_on"  # beside "state" and "param_groups": y, in the parameters' order


@runtime_checkable
class _AveragingOptimizer(Protocol):
    """Parameters hold y after `train`, x after `eval`."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, the parameters hold what is learnt; for most optimizers that is what they hold anyway. Not to be
    nested, and no update may happen within."""
    if not isinstance(optimizer, _AveragingOptimizer):
        yield
        return
    params = _params(optimizer)
    trained_on = [param.detach().clone() for param in params]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        _copy_(params, trained_on)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that `restore_optimizer_` needs to go on, bit for bit. Call it outside of `averaged_weights`."""
    state: dict[str, Any] = optimizer.state_dict()
    if isinstance(optimizer, _AveragingOptimizer):
        state[_TRAINED_ON] = [param.detach().clone() for param in _params(optimizer)]
    return state


def restore_optimizer_(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, name: str) -> None:
    """Load a saved state of the optimizer `name`, but keep this run's hyper-parameters: `load_state_dict` alone would
    bring back the old run's weight decay and betas in silence. Where training goes on from another point than the
    saved adapter (see the module), the parameters are set to it: load the adapter before.

    Raises:
        ValueError: the parameters are not the saved ones.
    """
    kept = hyper_parameters(name)
    ours = [{key: value for key, value in group.items() if key in kept} for group in optimizer.param_groups]
    optimizer.load_state_dict({key: value for key, value in state.items() if key != _TRAINED_ON})
    for group, hyper in zip(optimizer.param_groups, ours, strict=True):
        group.update(hyper)
    _restore_dtypes_(optimizer, state)
    if _TRAINED_ON in state:
        _copy_(_params(optimizer), state[_TRAINED_ON])


def _restore_dtypes_(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """torch casts states to their parameter's dtype when it loads them; give them their own back, without loss."""
    indices = chain.from_iterable(group["params"] for group in state["param_groups"])
    for index, param in zip(indices, _params(optimizer), strict=True):
        loaded = optimizer.state.get(param, {})
        for key, saved in state["state"].get(index, {}).items():
            if type(saved) is Tensor and isinstance(loaded.get(key), Tensor) and loaded[key].dtype != saved.dtype:
                loaded[key] = saved.to(loaded[key].device, copy=True)


def _params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


@torch.no_grad()
def _copy_(params: list[nn.Parameter], values: list[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.copy_(value)
