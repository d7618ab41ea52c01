"""Small transformers with adapters, streamed and not, for the laws of offload."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.adapters.lora import LoraSettings, apply_lora, trainable_parameters
from simpletuner.memory.checkpointing import apply_checkpointing
from simpletuner.memory.groups import GroupSettings, choose_groups
from simpletuner.memory.spill import SpillStore
from simpletuner.memory.store import GroupLayout, GroupStore, Parts, RamStore
from simpletuner.memory.streaming import StreamBuilder, Streamer
from simpletuner.models.z_image.load import quantisable_layers
from simpletuner.models.z_image.transformer import ZImageTransformer, ZImageTransformerConfig
from simpletuner.quant.build import FORMATS, PLAIN, quantiser
from simpletuner.quant.linear import FrozenLinear

SIZES = {"dim": 96, "n_layers": 5, "n_refiner_layers": 2, "n_heads": 3, "cap_feat_dim": 12, "axes_dims": (8, 12, 12)}
POISON = 0xFF
CPU = torch.device("cpu")
BLOCKS = GroupSettings()


class PoisonedStore(GroupStore):
    """As the store it is made of, but the slots are poisoned before they are filled: with bytes that mean NaN in every
    floating-point format, and -1 in integers."""

    def __init__(self, inner: GroupStore, device: torch.device) -> None:
        self.inner = inner
        self.on_cpu = device.type == "cpu"

    def put(self, group: int, layers: dict[str, Parts]) -> None:
        self.inner.put(group, layers)

    def finish(self) -> None:
        self.inner.finish()

    def layout(self, group: int) -> GroupLayout:
        return self.inner.layout(group)

    def block(self, group: int) -> Tensor | None:
        return None if self.on_cpu else self.inner.block(group)  # so that `read` fills the slot itself

    def read(self, group: int, into: Tensor) -> None:
        if self.on_cpu:
            whole = torch.empty(0, dtype=torch.uint8).set_(into.untyped_storage())
            whole.fill_(POISON)
        self.inner.read(group, into)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting of a model and its offload; `settings` None: without."""

    precision: str = "no_change"
    settings: GroupSettings | None = BLOCKS
    ahead: bool = True
    every: int = 0  # checkpointing interval; 0: off
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    targets: tuple[str, ...] = ("layers.*.attention.*", "layers.*.feed_forward.*")
    dropout: float = 0.0
    directory: Path | None = None
    poisoned: bool = True
    device: torch.device = CPU


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """A model, and its streamer if it streams."""

    model: ZImageTransformer
    streamer: Streamer | None
    groups: tuple[tuple[str, ...], ...]
    case: Case


def build(case: Case) -> Streamed:
    """A seeded model with an adapter, as `train.build` makes it: frozen weights first, then LoRA, then checkpoints."""
    torch.manual_seed(0)
    model = ZImageTransformer(ZImageTransformerConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.requires_grad_(False).to(case.dtype)
    quantise = quantiser(case.precision, case.dtype)
    chosen = quantisable_layers(model)
    names = [name for name, module in model.named_modules() if name in chosen]
    groups = () if case.settings is None else choose_groups(names, case.settings)
    builder = None
    if groups:
        store: GroupStore = (
            RamStore(len(groups), pinned=case.device.type == "cuda")
            if case.directory is None
            else SpillStore(case.directory, "key", groups)
        )
        is_ready = isinstance(store, SpillStore) and store.is_ready
        store = PoisonedStore(store, case.device) if case.poisoned else store
        builder = StreamBuilder(groups, store, device=case.device, ahead=case.ahead, is_ready=is_ready)
    for name in names:
        weight = model.get_submodule(name).weight.data
        if builder is not None and name in builder.ready:
            form = FORMATS.get(case.precision, PLAIN)
            layer: nn.Module = FrozenLinear(builder.parts_of(name), tuple(weight.shape), None, form=form)
        elif quantise is not None:
            layer = quantise(weight)
        elif builder is not None and name in builder.names:
            layer = FrozenLinear.from_weight(weight, None, form=PLAIN)
        else:
            continue
        if builder is not None and name in builder.names:
            builder.take(name, layer)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    streamer = builder.attach(model) if builder is not None else None
    model.to(case.device)
    apply_lora(model, LoraSettings(rank=4, alpha=4.0, targets=case.targets, dropout=case.dropout))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if case.every:
        apply_checkpointing(model.layers, every=case.every, preserve_rng_state=case.dropout > 0)
    return Streamed(model=model.train(), streamer=streamer, groups=groups, case=case)


def batch(seed: int, *, sizes: Sequence[tuple[int, int]] = ((4, 6), (8, 4)), device: torch.device) -> tuple[list, list]:
    """Noisy latents and prompts of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(16, *size, generator=generator).to(device) for size in sizes]
    prompts = [
        torch.randn(3 + 37 * i, SIZES["cap_feat_dim"], generator=generator).to(device) for i in range(len(sizes))
    ]
    return latents, prompts


def predict(streamed: Streamed, seed: int, **options: object) -> list[Tensor]:
    case = streamed.case
    latents, prompts = batch(seed, device=case.device, **options)
    t_B = torch.linspace(0.2, 0.9, len(latents), device=case.device)
    with torch.autocast(case.device.type, dtype=case.autocast, enabled=case.autocast is not None):
        return streamed.model(latents, t_B, streamed.model.refine_context(prompts))


def step(streamed: Streamed, seed: int, **options: object) -> list[Tensor]:
    """Outputs and gradients of one step; then the parameters take a small step along them."""
    torch.manual_seed(seed)
    outs = predict(streamed, seed, **options)
    params = trainable_parameters(streamed.model)
    loss = sum(out.float().square().mean() for out in outs)
    gradients = torch.autograd.grad(loss, params)
    with torch.no_grad():
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter.sub_(gradient, alpha=0.01)
    return [*(out.detach() for out in outs), *gradients]


def frozen_layers(model: nn.Module) -> Iterator[FrozenLinear]:
    yield from (module for module in model.modules() if isinstance(module, FrozenLinear))


def assert_same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.dtype == other.dtype and torch.isfinite(one).all()
        assert torch.equal(one, other)
