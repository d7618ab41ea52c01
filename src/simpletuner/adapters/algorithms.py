"""What LyCORIS's algorithms add to the output of a linear layer, and where they start.

Written on activations: the base layer's product is its own, so its weight may have any form and lie anywhere. The
definitions are those of lycoris-lora 4. Shape letters: O outputs, I inputs; y is W x without the bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.catalog.lycoris import Update, shapes

Tensors = Mapping[str, Tensor]
Product = Callable[[Tensor], Tensor]
"""x -> W x."""


def initial_tensors(update: Update, rows: int, columns: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Float32 tensors on the CPU by which the layer gives what it gave before."""
    found = {name: torch.zeros(shape) for name, shape in shapes(update, rows, columns).items()}
    if update.algo == "loha":
        for name, deviation in (("hada_w1_b", 1.0), ("hada_w1_a", 0.1), ("hada_w2_b", 1.0)):
            nn.init.normal_(found[name], std=deviation, generator=generator)
    for name in _KAIMING[update.algo]:
        if name in found:
            nn.init.kaiming_uniform_(found[name], a=math.sqrt(5), generator=generator)
    if "rescale" in found:
        found["rescale"].fill_(1)
    return found


def difference(update: Update, tensors: Tensors, x: Tensor, y: Tensor, product: Product, strength: float) -> Tensor:
    """What the update adds to `y` = W x, `strength` times, in x's dtype. LoKr has a layer of its own."""
    t = {name: tensor.to(x.dtype) for name, tensor in tensors.items()}
    scale = strength * scale_of(update, tensors)
    match update.algo:
        case "loha":
            factors = [t[name] for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")]
            return cast("Tensor", _Hadamard.apply(x, *factors)) * scale
        case "lora":
            return F.linear(F.linear(x, t["lora_down"]), t["lora_up"]) * scale
        case "glora":
            turned = F.linear(F.linear(x, t["a2"]), t["a1"])
            return (product(turned) + F.linear(F.linear(x, t["b2"]), t["b1"])) * scale
        case "ia3":
            return product(x * t["weight"] * strength) if update.on_input else y * t["weight"] * strength
        case "diag-oft":
            return _turned(update, tensors, y, strength) - y
        case "boft":
            return _butterfly(update, tensors, y, strength) - y
        case "full":
            return F.linear(x, t["diff"]) * strength
    raise AssertionError(update.algo)


def scale_of(update: Update, tensors: Tensors) -> float:
    """What the trained tensors' product is multiplied by. A LoKr without low-rank parts has none."""
    if update.algo == "lokr" and "lokr_w1" in tensors and "lokr_w2" in tensors:
        return 1.0
    return update.alpha / update.dim


def file_entries(update: Update, tensors: Tensors) -> dict[str, Tensor]:
    """What a file holds of one layer, under the library's names."""
    found = {_FILE_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
    if update.algo in ("diag-oft", "boft"):
        found["alpha"] = torch.tensor(update.constraint)
    elif update.algo == "ia3":
        found["on_input"] = torch.tensor(int(update.on_input))
    elif update.algo != "full":
        is_whole = update.algo == "lokr" and scale_of(update, tensors) == 1.0
        found["alpha"] = torch.tensor(float(update.dim) if is_whole else update.alpha)
    return found


def update_of(tensors: Tensors) -> Update | None:
    """The update that a file's tensors of one layer are, by `tensor_name`; None if they are none that is known."""
    names = tensors.keys()
    alpha = float(tensors["alpha"].item()) if "alpha" in names else None

    def low_rank(algo: str, inner: str) -> Update:
        dim = tensors[inner].shape[0] if inner in names else 1
        return Update(algo=algo, dim=dim, alpha=float(dim) if alpha is None else alpha)

    if names & {"lokr_w1", "lokr_w1_a"}:
        return low_rank("lokr", "lokr_w2_b" if "lokr_w2_b" in names else "lokr_w1_b")
    if "hada_w1_b" in names:
        return low_rank("loha", "hada_w1_b")
    if "lora_down" in names:
        return low_rank("lora", "lora_down")
    if "a2" in names:
        return low_rank("glora", "a2")
    if "oft_blocks" in names:
        algo = "diag-oft" if tensors["oft_blocks"].ndim == 3 else "boft"
        return Update(algo=algo, constraint=alpha or 0.0, rescaled="rescale" in names)
    if "on_input" in names:
        return Update(algo="ia3", on_input=bool(tensors["on_input"].item()))
    return Update(algo="full") if "diff" in names else None


def weight_size(update: Update, tensors: Tensors) -> tuple[int | None, int | None]:
    """(rows, columns) of the weight that the tensors change; None where they do not tell."""
    size = {name: tensor.shape for name, tensor in tensors.items()}
    match update.algo:
        case "lokr":
            first = size["lokr_w1"] if "lokr_w1" in size else (size["lokr_w1_a"][0], size["lokr_w1_b"][1])
            second = size["lokr_w2"] if "lokr_w2" in size else (size["lokr_w2_a"][0], size["lokr_w2_b"][1])
            return first[0] * second[0], first[1] * second[1]
        case "loha":
            return size["hada_w1_a"][0], size["hada_w1_b"][1]
        case "lora":
            return size["lora_up"][0], size["lora_down"][1]
        case "glora":
            return size["b1"][0], size["b2"][1]
        case "ia3":
            (length,) = size["weight"]
            return (None, length) if update.on_input else (length, None)
        case "full":
            return size["diff"][0], size["diff"][1]
    return size["oft_blocks"][-3] * size["oft_blocks"][-1], None


def tensor_name(entry: str) -> str:
    """The name of a trained tensor that a file calls `entry`."""
    return _TENSOR_NAMES.get(entry, entry)


_KAIMING: Mapping[str, tuple[str, ...]] = {
    "lokr": ("lokr_w2_a", "lokr_w1", "lokr_w1_a", "lokr_w1_b"),
    "loha": (),
    "lora": ("lora_down",),
    "glora": ("a1", "b1"),
    "ia3": (),
    "diag-oft": (),
    "boft": (),
    "full": (),
}
_FILE_NAMES = {name: f"{name}.weight" for name in ("lora_up", "lora_down", "a1", "a2", "b1", "b2")}
_TENSOR_NAMES = {entry: name for name, entry in _FILE_NAMES.items()}


def _rotations(update: Update, blocks: Tensor, rows: int) -> Tensor:
    """Cayley's rotations of the skew-symmetric parts of `blocks` [..., n, n], in float32."""
    skew = (blocks - blocks.transpose(-1, -2)).float()
    limit = update.constraint * rows
    if limit > 0:
        norm = skew.norm() + 1e-8
        skew = torch.where(norm > limit, skew * limit / norm, skew)
    unit = torch.eye(skew.shape[-1], device=skew.device)
    turns: Tensor = (unit + skew) @ torch.linalg.inv(unit - skew)
    return turns


def _turned(update: Update, tensors: Tensors, y: Tensor, strength: float) -> Tensor:
    """y with each of its runs rotated: Qiu et al. 2023, https://arxiv.org/abs/2306.07280."""
    turn = _rotations(update, tensors["oft_blocks"], y.shape[-1])
    unit = torch.eye(turn.shape[-1], device=turn.device)
    runs = y.unflatten(-1, turn.shape[:2])
    moved = torch.einsum("knm,...kn->...km", ((turn - unit) * strength).to(y.dtype), runs)
    return _rescaled(tensors, (runs + moved).flatten(-2))


def _butterfly(update: Update, tensors: Tensors, y: Tensor, strength: float) -> Tensor:
    """y through stages of rotations whose runs lie ever further apart: Liu et al. 2024,
    https://arxiv.org/abs/2311.06243."""
    turns = _rotations(update, tensors["oft_blocks"], y.shape[-1])
    size = turns.shape[-1]
    unit = torch.eye(size, device=turns.device)
    for stage, turn in enumerate((unit + (turns - unit) * strength).to(y.dtype)):
        half = 2**stage * (size // 2)
        y = y.unflatten(-1, (-1, 2, half)).transpose(-1, -2).flatten(-3).unflatten(-1, (-1, size))
        y = torch.einsum("nij,...nj->...ni", turn, y).flatten(-2)
        y = y.unflatten(-1, (-1, half, 2)).transpose(-1, -2).flatten(-3)
    return _rescaled(tensors, y)


def _rescaled(tensors: Tensors, y: Tensor) -> Tensor:
    return y * tensors["rescale"].to(y.dtype).flatten() if "rescale" in tensors else y


class _Hadamard(torch.autograd.Function):
    """((A B) o (C D)) x. The matrices as large as the layer's weight are made again in backward, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a_OR: Tensor, b_RI: Tensor, c_OR: Tensor, d_RI: Tensor) -> Tensor:
        ctx.save_for_backward(x, a_OR, b_RI, c_OR, d_RI)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, (a_OR @ b_RI).mul_(c_OR @ d_RI))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, a_OR, b_RI, c_OR, d_RI = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            first, second = a_OR @ b_RI, c_OR @ d_RI
            of_weight = gradient.reshape(-1, gradient.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
            of_first, of_second = of_weight * second, of_weight.mul_(first)
            return (
                gradient @ first.mul_(second),
                of_first @ b_RI.t(),
                a_OR.t() @ of_first,
                of_second @ d_RI.t(),
                c_OR.t() @ of_second,
            )
