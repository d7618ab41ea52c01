"""Muon for matrices and convolutions, AdamW for the rest, both in one optimiser; and the schedule both follow."""

import math
import os
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class MuonAdamW:
    """Update `matrices` by orthogonalised momentum and `others` by AdamW.

    Matrices of one shape are orthogonalised together, in bf16, which makes the method cheap for a small network. Muon's
    update has the root mean square of AdamW's (0.2), so that one learning rate means the same size of step.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], others: Iterable[nn.Parameter], *, momentum: float = 0.95
    ) -> None:
        self.momentum = momentum
        self._groups: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in matrices:
            self._groups[(parameter.shape[0], parameter[0].numel())].append(parameter)
        self._velocity = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self._groups.items()
        }
        self._adamw = torch.optim.AdamW(list(others), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, *, muon_lr: float, adamw_lr: float, weight_decay: float = 0.0) -> None:
        """Update every parameter from its gradient, then forget the gradients."""
        for (rows, columns), group in self._groups.items():
            velocity = self._velocity[(rows, columns)]
            grads = torch.stack([_gradient(p).reshape(rows, columns) for p in group]).float()
            velocity.mul_(self.momentum).add_(grads)
            update = orthogonalised(grads.add(velocity, alpha=self.momentum))
            scale = muon_lr * 0.2 * math.sqrt(max(rows, columns))
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - muon_lr * weight_decay)
                parameter.add_(change.reshape(parameter.shape), alpha=-scale)
                parameter.grad = None
        for options in self._adamw.param_groups:
            options["lr"] = adamw_lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, object]:
        """Everything a resumed run needs."""
        return {"velocity": self._velocity, "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take back what `state_dict` gave."""
        velocity, adamw = state["velocity"], state["adamw"]
        assert isinstance(velocity, dict)
        assert isinstance(adamw, dict)
        for shape, tensor in velocity.items():
            self._velocity[shape].copy_(tensor)
        self._adamw.load_state_dict(adamw)


def average_over_processes(parameters: list[nn.Parameter], number: float) -> float:
    """Average the gradients over all processes, in place, and return the average of `number` too. Alone: do nothing.

    One process a core under `torchrun` is faster on a busy CPU than threads, which wait for each other in every layer.
    """
    if not dist.is_initialized():
        return number
    grads = [_gradient(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in grads] + [grads[0].new_tensor([number])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(parameters, torch.split(flat[:-1], [g.numel() for g in grads]), strict=True):
        parameter.grad = part.view(parameter.shape)
    return float(flat[-1])


def join_processes() -> int:
    """Find the other processes that torchrun started, if it did. Returns this one's rank."""
    if "WORLD_SIZE" not in os.environ:
        return 0
    dist.init_process_group("gloo")
    return dist.get_rank()


def wait_for_processes() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def orthogonalised(matrices_NRC: Tensor, *, steps: int = 5) -> Tensor:
    """Move the singular values of N matrices towards 1 by Newton-Schulz iteration in bf16."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices_NRC.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = (x.mT if tall else x).to(matrices_NRC.dtype)
    return result


def warmup_cosine(progress: float, *, warmup: float = 0.01, flat_until: float = 0.3) -> float:
    """Learning rate factor at a progress in [0, 1]: a short ramp, a plateau, then half a cosine down to zero."""
    if progress < warmup:
        return progress / warmup
    if progress < flat_until:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - flat_until) / (1 - flat_until))))


class Average:
    """An exponential moving average of a module's floating-point parameters."""

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.values = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Follow the module; the first updates follow faster."""
        self.num_updates += 1
        decay = min(self.decay, self.num_updates / (self.num_updates + 10))
        torch._foreach_lerp_(self.values, [p.detach() for p in module.parameters()], 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the module's parameters with the averaged ones; a second call changes them back."""
        for value, parameter in zip(self.values, module.parameters(), strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
