"""Bytes that a run needs, phase by phase and part by part. What is on the device and what in main memory add up apart;
on a CPU they are one. The peak of a run is that of its hungriest phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from simpletuner.planner.blocks import BlockMemory, adapter_params, block_memory, idle_bytes, largest_weight
from simpletuner.planner.inputs import Picture, PlanInput, padded

PartName = Literal[
    "runtime", "weights", "adapter", "optimizer", "gradients", "activations", "working", "contexts", "latents",
    "text_encoder", "vae", "pictures", "average",
]  # fmt: skip
PhaseName = Literal["prompts", "latents", "training", "validation"]
PHASES: tuple[PhaseName, ...] = ("prompts", "latents", "training", "validation")

_MB = 1_000_000
_FLOAT32 = 4
CONTEXT_BUDGET_BYTES = 1 << 30  # of `train.context.ContextCache`
LATENTS_BUDGET_BYTES = 1 << 30  # of `data.latents.LatentStore`
_BUCKET_ELEMENTS = {"cpu": 1 << 16}  # of `optim.bucketed`
_DEVICE_BUCKET_ELEMENTS = 1 << 22
_BROKEN_UP = 0.7  # of the holes of quantised weights, measured
_MOST_BROKEN_UP = 4  # blocks: later ones fill the holes of earlier ones, measured
_CPU_COPIES = {"nf4-bnb": 3}  # of a weight, while bitsandbytes looks its codes up
_HEAP_TENSOR_BYTES = 32 << 20  # glibc's largest threshold of mapping
_BUCKET_COPIES = 6  # moments, values and their roundings in float32


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What is there before any model: interpreter and libraries in main memory, the driver's context on a GPU."""

    host_bytes: int
    device_bytes: int


RUNTIMES = {
    "cpu": Runtime(host_bytes=430 * _MB, device_bytes=0),
    "cuda": Runtime(host_bytes=1_600 * _MB, device_bytes=520 * _MB),
    "mps": Runtime(host_bytes=700 * _MB, device_bytes=0),
}
"""By device kind. Measured on Linux with torch 2.13 on a CPU; the others are what users report of CUDA 12 and 13."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Bytes that one thing takes at the peak of a phase."""

    name: PartName
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase at its peak: what lies on the device, and what in main memory beside it."""

    name: PhaseName
    device: tuple[Part, ...]
    host: tuple[Part, ...]

    @property
    def device_bytes(self) -> int:
        return sum(part.num_bytes for part in self.device)

    @property
    def host_bytes(self) -> int:
        return sum(part.num_bytes for part in self.host)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """All phases of a run. On a CPU everything is in `host`."""

    phases: tuple[Phase, ...]

    def phase(self, name: PhaseName) -> Phase | None:
        """The phase of that name, if the run has it."""
        return next((phase for phase in self.phases if phase.name == name), None)

    @property
    def device_peak(self) -> Phase:
        """The phase that needs most on the device."""
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def host_peak(self) -> Phase:
        """The phase that needs most in main memory."""
        return max(self.phases, key=lambda phase: phase.host_bytes)


def estimate_memory(plan: PlanInput, *, runtime: Runtime | None = None) -> Memory:
    """Compute every phase. `runtime` as measured on this machine, else from `RUNTIMES`."""
    base = runtime or RUNTIMES[plan.device]
    phases = [_prompts(plan), _latents(plan), _training(plan)]
    if plan.validation is not None:
        phases.append(_validation(plan, plan.validation))
    return Memory(phases=tuple(_placed(phase, base, plan) for phase in phases))


def streamed_bytes(plan: PlanInput) -> tuple[int, int, int]:
    """(on the device, in main memory, on disk): the weights of the blocks that are streamed.

    One group of blocks is on the device while it computes, and with overlap the next one beside it.
    """
    offload = plan.offload
    if not offload.blocks:
        return 0, 0, 0
    block = plan.sizes.transformer.block_bytes(plan.precision, default_bytes=plan.weight_bytes)
    num_slots = 2 if offload.overlap else 1
    away = offload.blocks * block
    here = min(offload.blocks, offload.group * num_slots) * block
    if offload.by_layer:
        sizes = plan.sizes.transformer
        one = plan.precision.weight_bytes(sizes.ffn_dim, sizes.dim, default_bytes=plan.weight_bytes)
        here = min(here, num_slots * one)
    return here, 0 if offload.on_disk else away, away if offload.on_disk else 0


def resident_weights(plan: PlanInput) -> int:
    """Bytes of the transformer that lie on the device."""
    whole = plan.sizes.transformer.weight_bytes(plan.precision, default_bytes=plan.weight_bytes)
    block = plan.sizes.transformer.block_bytes(plan.precision, default_bytes=plan.weight_bytes)
    return whole - plan.offload.blocks * block + streamed_bytes(plan)[0]


def held_weights(plan: PlanInput) -> int:
    """Bytes of the transformer in main memory: the streamed blocks."""
    return streamed_bytes(plan)[1]


@dataclass(frozen=True, kw_only=True)
class _Height:
    """A step at its height."""

    activations: int
    working: int
    gradients: int

    @property
    def total(self) -> int:
        return self.activations + self.working + self.gradients


def step_height(plan: PlanInput) -> _Height:
    """The largest of: backward of each block in turn, and the optimizer's update."""
    block, count = block_memory(plan), plan.sizes.transformer.n_layers
    params = adapter_params(plan, plan.adapter)
    gradients = params * plan.adapter.weight_bytes
    if plan.releases:
        gradients = min(gradients, _block_gradients(plan))
    buckets = min(params, _BUCKET_ELEMENTS.get(plan.device, _DEVICE_BUCKET_ELEMENTS))
    if plan.adapter.whole:  # a long parameter is a bucket of its own
        buckets = max(buckets, plan.sizes.transformer.dim * plan.sizes.transformer.ffn_dim)
    working = buckets * _BUCKET_COPIES if plan.updates_in_rows else params
    update = _Height(activations=0, working=working * _FLOAT32, gradients=gradients)
    heights = [update]
    before = 0
    entry = (0 if plan.inputs_on_host else block.entry) + (block.product if plan.keeps_product else 0)
    for index in range(count):
        later = gradients if plan.accumulation > 1 or plan.releases else gradients * (count - 1 - index) // count
        heights.append(_backward(plan, block, index, before, later))
        before += entry if _is_recomputed(plan, index) else block.kept
        if plan.keep_bytes is not None and plan.checkpointing:
            before = max(before, min(plan.keep_bytes, (index + 1) * block.kept))
    return max(heights, key=lambda height: height.total)


def _block_gradients(plan: PlanInput) -> int:
    """Bytes of gradients that are freed when they were used. A recomputed block hands on those of all its weights
    together: half of them are there when its activations are at their height."""
    layers = plan.sizes.transformer.block_linears("layers.0", modulated=True)
    params = [layer.rows * layer.columns for layer in layers]
    return (max(sum(params) // 2, max(params)) if plan.checkpointing else max(params)) * plan.adapter.weight_bytes


def _backward(plan: PlanInput, block: BlockMemory, index: int, before: int, gradients: int) -> _Height:
    # A recomputed block keeps its input, and its new output until the gradient is there.
    again = block.entry if _is_recomputed(plan, index) else 0
    return _Height(activations=before + block.kept + again, working=block.working, gradients=gradients)


def _holes(plan: PlanInput) -> int:
    """What a CPU's C library holds of freed tensors below 32 MB, which share a heap; larger ones are mapped apart.

    A block gives back in another order than it took: holes as large as all that it takes stay. The numbers of its
    quantised weights leave holes that activations of the same block then break up, in each block that keeps any.
    """
    if plan.device != "cpu":
        return 0
    block, sizes = block_memory(plan), plan.sizes.transformer
    holes = block.kept + block.working if block.entry < _HEAP_TENSOR_BYTES else 0
    if 0 < largest_weight(plan) < _HEAP_TENSOR_BYTES:
        layers = [layer for layer in sizes.block_linears("layers.0", modulated=True) if layer.is_quantisable]
        numbers = sum(layer.rows * layer.columns for layer in layers) * plan.compute_bytes
        num_recomputed = sum(_is_recomputed(plan, index) for index in range(sizes.n_layers))
        num_keeping = sizes.n_layers - num_recomputed + (num_recomputed > 0)
        copies = _CPU_COPIES.get(plan.precision.name, 1)
        holes += round(_BROKEN_UP * min(num_keeping, _MOST_BROKEN_UP) * numbers * copies)
    return holes


def _is_recomputed(plan: PlanInput, index: int) -> bool:
    last = plan.sizes.transformer.n_layers - 1
    return plan.checkpointing and index < last and index % plan.interval == 0


def _training(plan: PlanInput) -> Phase:
    height = step_height(plan)
    params = adapter_params(plan, plan.adapter)
    device = (
        Part(name="weights", num_bytes=resident_weights(plan)),
        Part(name="adapter", num_bytes=_adapter_bytes(plan, in_images=False)),
        Part(name="optimizer", num_bytes=round(params * plan.state_bytes)),
        Part(name="gradients", num_bytes=height.gradients),
        Part(name="activations", num_bytes=height.activations),
        Part(name="working", num_bytes=height.working + _holes(plan)),
        Part(name="contexts", num_bytes=_context_bytes(plan)),
        Part(name="average", num_bytes=average_bytes(plan) if plan.average == "device" else 0),
        Part(name="vae", num_bytes=vae_weights(plan) if plan.keeps_vae or plan.encodes_while_training else 0),
        Part(name="pictures", num_bytes=encode_bytes(plan) if plan.encodes_while_training else 0),
    )
    waiting = _adapter_bytes(plan, in_images=True) - _adapter_bytes(plan, in_images=False)
    host = [
        Part(name="weights", num_bytes=held_weights(plan)),
        Part(name="adapter", num_bytes=waiting),
        Part(name="average", num_bytes=average_bytes(plan) if plan.average == "host" else 0),
    ]
    if plan.inputs_on_host:
        recomputed = sum(_is_recomputed(plan, index) for index in range(plan.sizes.transformer.n_layers))
        host.append(Part(name="activations", num_bytes=recomputed * block_memory(plan).entry))
    return Phase(name="training", device=device, host=tuple(host))


def _validation(plan: PlanInput, picture: Picture) -> Phase:
    """A forward without a graph, or the VAE that decodes one image beside the transformer."""
    params = adapter_params(plan, plan.adapter)
    tokens = picture.count * picture.tokens * (2 if plan.guided else 1)
    forward = idle_bytes(plan, tokens)
    decoding = vae_weights(plan) + decode_bytes(plan, picture)
    device = [
        Part(name="weights", num_bytes=resident_weights(plan)),
        Part(name="adapter", num_bytes=_adapter_bytes(plan, in_images=True)),
        Part(name="optimizer", num_bytes=round(params * plan.state_bytes)),
        Part(name="contexts", num_bytes=_context_bytes(plan)),
        # While the average stands in for the weights, they wait beside it.
        Part(name="average", num_bytes=average_bytes(plan) * (2 if plan.average == "device" else 1)),
    ]
    if decoding > forward:
        device.append(Part(name="vae", num_bytes=vae_weights(plan)))
        device.append(Part(name="pictures", num_bytes=decode_bytes(plan, picture)))
    else:
        device.append(Part(name="working", num_bytes=forward))
    host = (
        Part(name="weights", num_bytes=held_weights(plan)),
        Part(name="average", num_bytes=average_bytes(plan) if plan.average == "host" else 0),
    )
    return Phase(name="validation", device=tuple(device), host=host)


def _prompts(plan: PlanInput) -> Phase:
    sizes, tokens = plan.sizes.text_encoder, plan.train.caption_tokens
    weights = sizes.weight_bytes(plan.text_precision, default_bytes=plan.weight_bytes)
    rows = 6 * sizes.hidden_size + 3 * sizes.intermediate_size
    dequantised = sizes.hidden_size * sizes.intermediate_size * plan.compute_bytes * plan.text_precision.is_quantised
    working = rows * tokens * plan.compute_bytes + dequantised
    device = (Part(name="text_encoder", num_bytes=weights), Part(name="working", num_bytes=working))
    return Phase(name="prompts", device=device, host=())


def _latents(plan: PlanInput) -> Phase:
    device = (Part(name="vae", num_bytes=vae_weights(plan)), Part(name="working", num_bytes=encode_bytes(plan)))
    pictures = 3 * plan.vae_batch * plan.train.width_px * plan.train.height_px * (_FLOAT32 + 1)
    return Phase(name="latents", device=device, host=(Part(name="pictures", num_bytes=pictures),))


def encode_bytes(plan: PlanInput) -> int:
    """What encoding takes. At full size: the input, its norm and the convolution of a residual block."""
    pixels = plan.train.width_px * plan.train.height_px
    tile = pixels if plan.tile_px is None else min(pixels, plan.tile_px**2)
    return 4 * plan.sizes.vae.block_out_channels[0] * tile * plan.vae_bytes


def average_bytes(plan: PlanInput) -> int:
    """Bytes of the moving average of the trained weights."""
    return adapter_params(plan, plan.adapter) * _FLOAT32 if plan.average else 0


def vae_weights(plan: PlanInput) -> int:
    """Bytes of the VAE."""
    return plan.sizes.vae.num_params * plan.vae_bytes


def decode_bytes(plan: PlanInput, picture: Picture) -> int:
    """What decoding one image takes: three maps of the second width at full size, in the last upsampling block."""
    pixels = picture.width_px * picture.height_px
    tile = pixels if plan.tile_px is None else min(pixels, plan.tile_px**2)
    channels = plan.sizes.vae.block_out_channels
    return 3 * channels[min(1, len(channels) - 1)] * tile * plan.vae_bytes + 3 * pixels * _FLOAT32


def _adapter_bytes(plan: PlanInput, *, in_images: bool) -> int:
    """What adapters take on the device, while images are made or while training."""
    adapters = [a for a in (plan.adapter, plan.assistant) if a is not None and not a.whole]
    adapters = [adapter for adapter in adapters if in_images or not adapter.only_in_images]
    return sum(adapter_params(plan, adapter) * adapter.weight_bytes for adapter in adapters)


def _context_bytes(plan: PlanInput) -> int:
    one = padded(plan.train.caption_tokens) * plan.sizes.transformer.dim * plan.compute_bytes
    return min(plan.num_contexts * one, CONTEXT_BUDGET_BYTES)


def _placed(phase: Phase, runtime: Runtime, plan: PlanInput) -> Phase:
    """With the runtime; on a CPU all of it in main memory."""
    host = (Part(name="runtime", num_bytes=runtime.host_bytes), *phase.host)
    if plan.device == "cpu":
        return Phase(name=phase.name, device=(), host=tuple(_merged((*host, *phase.device))))
    device = (Part(name="runtime", num_bytes=runtime.device_bytes), *phase.device)
    reading = Part(name="working", num_bytes=_largest_stored(plan))
    return Phase(name=phase.name, device=tuple(_merged(device)), host=tuple(_merged((*host, reading))))


def _largest_stored(plan: PlanInput) -> int:
    """The tensor that is being read: the text encoder's embeddings, in the format of the file."""
    sizes = plan.sizes.text_encoder
    return sizes.vocab_size * sizes.hidden_size * plan.weight_bytes


def _merged(parts: tuple[Part, ...]) -> Iterator[Part]:
    sums: dict[PartName, int] = {}
    for part in parts:
        sums[part.name] = sums.get(part.name, 0) + part.num_bytes
    return (Part(name=name, num_bytes=num_bytes) for name, num_bytes in sums.items() if num_bytes)
