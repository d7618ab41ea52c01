"""What one main block keeps between forward and backward, and needs besides while it goes backward: from its shapes.

The walk follows `models/z_image/transformer.py`, `kernels.py` and `adapters/layer.py`, whose autograd functions keep
their inputs and nothing else. Letters: T tokens of the batch, D width, F width inside the feed-forward, H heads,
R rank, a bytes of an activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from simpletuner.catalog.lycoris import LycorisSettings, chosen_updates, kronecker_blocks, num_params
from simpletuner.catalog.modules import is_target
from simpletuner.planner.inputs import Adapter, PlanInput
from simpletuner.planner.sizes import Linear

_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One operation of a block, in the order of forward.

    keeps: bytes that are freed once its backward is done. works: bytes that its backward takes beside the gradient it
    is given. gives: of these, the gradient that it hands on. frees: gradients that others handed on and that end here.
    """

    name: str
    keeps: int
    works: int
    gives: int
    frees: int = 0


@dataclass(frozen=True, kw_only=True)
class BlockMemory:
    """Bytes of one main block. `entry`: its input; `product`: the products that it may keep beside it; `kept`: all that
    backward reads, these included; `working`: what backward needs beside that at its height; `idle`: what a forward
    without a graph needs at its height."""

    entry: int
    product: int
    kept: int
    working: int
    idle: int


def block_memory(plan: PlanInput) -> BlockMemory:
    """A main block of the plan's model on its largest batch."""
    stages = list(_stages(plan))
    kept = sum(stage.keeps for stage in stages)
    entry = _tokens(plan) * plan.sizes.transformer.dim * plan.compute_bytes
    # Gradients: that of the residual stream, and what the last stage handed on.
    alive, gradients, height = kept, 2 * entry, 0
    for stage in reversed(stages):
        height = max(height, alive + gradients + stage.works)
        alive -= stage.keeps
        gradients += stage.gives - stage.frees
    return BlockMemory(
        entry=entry, product=2 * entry, kept=kept, working=height - kept, idle=idle_bytes(plan, _tokens(plan))
    )


def idle_bytes(plan: PlanInput, tokens: int) -> int:
    """A block without a graph at its height: residual, normed input, and three rows of the feed-forward."""
    sizes = plan.sizes.transformer
    return (2 * sizes.dim + 3 * sizes.ffn_dim) * tokens * plan.compute_bytes + largest_weight(plan)


def largest_weight(plan: PlanInput) -> int:
    """The numbers of one quantised weight of a block while it is multiplied by; 0 for a plain one."""
    sizes = plan.sizes.transformer
    plain = not plan.precision.is_quantised and plan.weight_bytes == plan.compute_bytes
    return 0 if plain else sizes.dim * sizes.ffn_dim * plan.compute_bytes


def adapter_params(plan: PlanInput, adapter: Adapter) -> int:
    """Elements of an adapter over the whole model."""
    if adapter.whole:
        return plan.sizes.transformer.num_params
    linears = {layer.name: layer for layer in plan.sizes.transformer.linears()}
    if adapter.lycoris is not None:
        updates = chosen_updates(adapter.lycoris, linears)
        return sum(num_params(update, linears[n].rows, linears[n].columns) for n, update in updates.items())
    layers = (layer for layer in linears.values() if _is_adapted(layer.name, adapter))
    return sum(adapter.rank * (layer.rows + layer.columns) + adapter.dora * layer.rows for layer in layers)


def _stages(plan: PlanInput) -> Iterator[Stage]:
    sizes, a, tokens = plan.sizes.transformer, plan.compute_bytes, _tokens(plan)
    row, wide, heads = tokens * sizes.dim * a, tokens * sizes.ffn_dim * a, tokens * sizes.n_heads * _FLOAT32
    layers = {x.name.removeprefix("layers.0."): x for x in sizes.block_linears("layers.0", modulated=True)}
    attention = "attention."
    exact = tokens * sizes.dim * _FLOAT32
    # In float32 the scaled gradient is the result; in half precision it is made from two float32 copies.
    norm_works = exact if a == _FLOAT32 else 3 * exact + row
    coefficient = row if plan.is_mixed else 0
    norm = row + coefficient + tokens * _FLOAT32
    turned = row if a == _FLOAT32 else row + 2 * exact
    query, keys, values = (layers[f"{attention}to_{name}"] for name in "qkv")
    out = layers[f"{attention}to_out.0"]

    yield Stage(name="norm in", keeps=norm, works=norm_works + row, gives=0)
    yield _product(plan, query, keeps_input=True, gives=row, frees=row)
    yield _product(plan, keys, keeps_input=False, gives=row, frees=row)
    yield _product(plan, values, keeps_input=False, gives=row, frees=row)
    yield Stage(name="norm q", keeps=row + heads, works=norm_works, gives=row, frees=row)
    yield Stage(name="norm k", keeps=row + heads, works=norm_works, gives=row, frees=row)
    yield Stage(name="turn", keeps=0, works=turned, gives=row, frees=row)
    spread = exact if plan.device == "cuda" and a != _FLOAT32 else 0
    joined = row if plan.is_mixed else 0
    yield Stage(name="attention", keeps=4 * row + heads, works=3 * row + spread, gives=3 * row, frees=row)
    yield _product(plan, out, keeps_input=False, gives=row, frees=row, extra=joined)
    yield Stage(name="norm attention", keeps=norm, works=norm_works, gives=row, frees=0)
    yield Stage(name="norm feed-forward", keeps=norm, works=norm_works + row, gives=0, frees=row)
    yield _product(plan, layers["feed_forward.w1"], keeps_input=True, gives=row, frees=wide)
    yield _product(plan, layers["feed_forward.w3"], keeps_input=False, gives=row, frees=wide)
    yield Stage(name="swiglu", keeps=2 * wide, works=2 * wide, gives=2 * wide, frees=wide)
    yield _product(plan, layers["feed_forward.w2"], keeps_input=True, gives=wide, frees=row)
    yield Stage(name="norm out", keeps=norm, works=norm_works, gives=0, frees=0)


def _product(plan: PlanInput, layer: Linear, *, keeps_input: bool, gives: int, frees: int, extra: int = 0) -> Stage:
    """A linear layer. One that is not adapted keeps nothing: its weight is frozen."""
    keeps, works = extra, gives + largest_weight(plan)
    taken = _tokens(plan) * layer.columns * plan.compute_bytes
    if plan.precision.row_bytes:  # the gradient times the scales of its rows, in float32 first
        half = plan.compute_bytes != _FLOAT32
        works += _tokens(plan) * layer.rows * (_FLOAT32 + plan.compute_bytes * half)
    acting = [x for x in (plan.adapter, plan.assistant) if x is not None and not x.only_in_images]
    adapters = [adapter for adapter in acting if _is_adapted(layer.name, adapter)]
    for adapter in adapters:
        if adapter.lycoris is not None:
            kept, worked = _of_lycoris(plan, layer, adapter.lycoris)
            keeps, works = keeps + kept, works + worked
            continue
        keeps += _tokens(plan) * adapter.rank * plan.compute_bytes
        works += _tokens(plan) * adapter.rank * plan.compute_bytes
        if adapter.dora:  # the base's product and the update's, whose lengths are trained
            keeps += 2 * _tokens(plan) * layer.rows * plan.compute_bytes
            works += 3 * _tokens(plan) * layer.rows * plan.compute_bytes
    if adapters and keeps_input:
        keeps += taken
    if plan.adapter in adapters and plan.adapter.dropout and plan.adapter.lycoris is None:
        # The mask and the input that it left.
        keeps += _tokens(plan) * layer.columns + taken
    return Stage(name=layer.name, keeps=keeps, works=works, gives=gives, frees=frees)


def _of_lycoris(plan: PlanInput, layer: Linear, settings: LycorisSettings) -> tuple[int, int]:
    """Bytes that an update (keeps beside its input, needs in backward). LoKr keeps nothing; what
    turns the layer's output keeps that, and LoHa makes matrices as large as the weight."""
    (update,) = chosen_updates(settings, (layer.name,)).values()
    row = _tokens(plan) * layer.rows * plan.compute_bytes
    if update.algo == "lokr":
        rows, columns = kronecker_blocks(update, layer.rows, layer.columns)
        mixed = 2 * _tokens(plan) * layer.columns * plan.compute_bytes * rows // columns
        return (2 * row if update.drops else 0), mixed
    whole = 3 * layer.rows * layer.columns * plan.compute_bytes if update.algo == "loha" else 0
    return (row if update.algo in ("ia3", "diag-oft", "boft") else 0), row + whole


def _is_adapted(name: str, adapter: Adapter) -> bool:
    if adapter.lycoris is not None:
        return bool(chosen_updates(adapter.lycoris, (name,)))
    return any(is_target(name, target) for target in adapter.targets)


def _tokens(plan: PlanInput) -> int:
    return plan.train.count * plan.train.tokens
