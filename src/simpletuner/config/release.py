"""Whether parameters move during backward: what the options ask for, and what keeps that from being possible."""

from __future__ import annotations

from simpletuner.catalog.optimizers import MOVE_ALONE
from simpletuner.config.root import Config


def releases_gradients(config: Config) -> bool:
    """Whether each parameter is updated as soon as its gradient is there: if that was asked for, and where all weights
    are trained, wherever it can be."""
    wanted = config.optimizer.optimizer_release_gradients
    is_wanted = config.model.model_type == "full" if wanted is None else wanted
    return is_wanted and not release_obstacles(config)


def release_obstacles(config: Config) -> tuple[str, ...]:
    """The options that need all gradients at once, as "name = value"."""
    optimizer = config.optimizer
    found = []
    if optimizer.gradient_accumulation_steps > 1:
        found.append(f"gradient_accumulation_steps = {optimizer.gradient_accumulation_steps}")
    if optimizer.max_grad_norm > 0 and optimizer.grad_clip_method == "norm":
        found.append(f"max_grad_norm = {optimizer.max_grad_norm:g}")
    if optimizer.optimizer not in MOVE_ALONE:
        found.append(f"optimizer = {optimizer.optimizer}")
    return tuple(found)
