"""Offload as the options ask for it: which layers of which model stream, whether there is room, how they are loaded."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.config.sections.memory import MemorySection
from simpletuner.events.progress import Reporter
from simpletuner.events.types import ProblemReported, SettingOverridden
from simpletuner.hardware.memory import available_ram_bytes
from simpletuner.memory.groups import GroupSettings, StreamPlan, choose_groups, plan_stream
from simpletuner.memory.spill import SpillStore, is_spilled
from simpletuner.memory.store import RamStore
from simpletuner.memory.streaming import StreamBuilder
from simpletuner.models.files import WeightFiles, fingerprint
from simpletuner.models.streaming import Conversion
from simpletuner.models.z_image.load import empty_transformer, quantisable_layers
from simpletuner.models.z_image.text import linear_layers
from simpletuner.problems import ConfigError, Fix, Problem, Severity
from simpletuner.quant.build import FORMATS, PLAIN, quantiser
from simpletuner.quant.linear import FrozenLinear
from simpletuner.train.device import Compute

PrecisionOption = Literal["base_model_precision", "text_encoder_precision"]

_GIB = 1 << 30
_ROOM_BYTES = 256 << 20  # of main memory, left for everything else that a run takes


@dataclass(frozen=True, kw_only=True)
class Offload:
    """How one model streams. `ahead`: the next group is fetched while one is used."""

    groups: GroupSettings
    ahead: bool
    directory: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ModelStream:
    """One model's layers, grouped: what is known before any weight is read.

    shapes: (rows, columns) of each linear layer that could stream, in the model's order.
    key: stands for the stored weights, their form and the groups.
    """

    offload: Offload
    precision: str
    precision_option: str
    dtype: torch.dtype
    device: torch.device
    shapes: Mapping[str, tuple[int, int]]
    groups: tuple[tuple[str, ...], ...]
    key: str

    @property
    def plan(self) -> StreamPlan:
        """What it takes of the device, of main memory and of the disk."""
        row = PRECISIONS[self.precision]
        sizes = {
            name: [row.weight_bytes(rows, columns, default_bytes=self.dtype.itemsize)]
            for name, (rows, columns) in self.shapes.items()
        }
        on_disk = self.offload.directory is not None
        return plan_stream(sizes, self.groups, ahead=self.offload.ahead, on_disk=on_disk)

    def check_room(self) -> None:
        """Raises ConfigError if main memory or the disk cannot hold what would be put there."""
        plan, directory = self.plan, self.offload.directory
        needed_bytes = plan.ram_bytes + (plan.device_bytes if self.device.type == "cpu" else 0)
        free_bytes = available_ram_bytes()
        if free_bytes is not None and needed_bytes + _ROOM_BYTES > free_bytes:
            raise ConfigError(self._no_ram(needed_bytes + _ROOM_BYTES, free_bytes))
        if directory is None or is_spilled(directory, self.key, self.groups):
            return
        free_bytes = shutil.disk_usage(_existing(directory)).free
        if plan.disk_bytes > free_bytes:
            params = {"needed": _gib(plan.disk_bytes), "free": _gib(free_bytes), "path": directory}
            path = "/group_offload_to_disk_path"
            raise ConfigError(Problem(code="E-OFFLOAD-DISK", params=params, path=path, fixes=self._fixes()))

    def builder(self) -> StreamBuilder:
        """What takes the layers in as they are loaded.

        Raises:
            FileSystemError: the folder of the spill cannot be written to.
        """
        ahead, directory = self.offload.ahead, self.offload.directory
        if directory is not None:
            spill = SpillStore(directory, self.key, self.groups)
            return StreamBuilder(self.groups, spill, device=self.device, ahead=ahead, is_ready=spill.is_ready)
        ram = RamStore(len(self.groups), pinned=self.device.type == "cuda")
        return StreamBuilder(self.groups, ram, device=self.device, ahead=ahead)

    def _no_ram(self, needed_bytes: int, free_bytes: int) -> Problem:
        params = {"needed": _gib(needed_bytes), "free": _gib(free_bytes)}
        code = "E-OFFLOAD-RAM" if self.offload.directory is None else "E-OFFLOAD-RAM-DISK"
        return Problem(code=code, params=params, fixes=self._fixes())

    def _fixes(self) -> tuple[Fix, ...]:
        if PRECISIONS[self.precision].is_quantised:
            return ()
        return (Fix(key=self.precision_option, value="int8-torchao"),)


class TextEncoderStream:
    """The text encoder's stream, if it has one: `convert` is called with the empty model, `attach` with the loaded."""

    def __init__(self, memory: MemorySection, files: WeightFiles, compute: Compute) -> None:
        self._memory = memory
        self._files = files
        self._compute = compute
        self._builder: StreamBuilder | None = None

    def convert(self, model: nn.Module) -> Conversion | None:
        """What becomes of the layers of `model`, which is on the meta device; None: nothing.

        Raises:
            ConfigError: there is no room for the offload.
        """
        memory, compute = self._memory, self._compute
        offload = text_encoder_offload(memory, compute.device)
        if offload is None:
            return None
        option: PrecisionOption = "text_encoder_precision"
        stream = model_stream(
            model, linear_layers(model), self._files, offload, memory=memory, precision_option=option, compute=compute
        )
        stream.check_room()
        self._builder = stream.builder()
        return stream_conversion(stream, self._builder, quantise_on_device=memory.quantize_via != "cpu")

    def attach(self, model: nn.Module) -> None:
        """Let it stream from now on."""
        if self._builder is not None:
            self._builder.attach(model)


def transformer_offload(memory: MemorySection, device: torch.device) -> Offload | None:
    """How the trained model streams; None: not at all."""
    has_streams = device.type == "cuda"
    if memory.musubi_blocks_to_swap:
        groups = GroupSettings(num_blocks=memory.musubi_blocks_to_swap)
        return Offload(groups=groups, ahead=has_streams)
    if memory.ramtorch:
        groups = GroupSettings(
            blocks_per_group=None,
            share=memory.ramtorch_transformer_percent / 100,
            targets=memory.ramtorch_target_modules,
        )
        return Offload(groups=groups, ahead=has_streams)
    if not memory.enable_group_offload:
        return None
    return _group_offload(memory, device, num_blocks=memory.group_offload_blocks)


def text_encoder_offload(memory: MemorySection, device: torch.device) -> Offload | None:
    """How the text encoder streams; None: not at all."""
    if memory.ramtorch_text_encoder:
        groups = GroupSettings(blocks_per_group=None, share=memory.ramtorch_text_encoder_percent / 100)
        return Offload(groups=groups, ahead=device.type == "cuda")
    return _group_offload(memory, device) if memory.group_offload_text_encoder else None


def vae_is_offloaded(memory: MemorySection) -> bool:
    """Whether the autoencoder is on the device only while it runs, piece by piece."""
    return memory.group_offload_vae or memory.ramtorch_vae


def transformer_stream(
    memory: MemorySection, files: WeightFiles, compute: Compute, *, addition_key: str = ""
) -> ModelStream | None:
    """The trained model's stream, from its config alone; None if it does not stream. `addition_key` stands for what is
    added to the weights.

    Raises:
        ConfigError: E-OFFLOAD-TARGETS, the options choose no layer.
        ModelError: the config describes a model that cannot be built.
    """
    offload = transformer_offload(memory, compute.device)
    if offload is None:
        return None
    model = empty_transformer(files)
    return model_stream(
        model,
        quantisable_layers(model),
        files,
        offload,
        memory=memory,
        precision_option="base_model_precision",
        compute=compute,
        addition_key=addition_key,
    )


def model_stream(
    model: nn.Module,
    layers: frozenset[str],
    files: WeightFiles,
    offload: Offload,
    *,
    memory: MemorySection,
    precision_option: PrecisionOption,
    compute: Compute,
    addition_key: str = "",
) -> ModelStream:
    """The stream of a model on the meta device, of which `layers` could stream.

    Raises:
        ConfigError: E-OFFLOAD-TARGETS.
    """
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name in layers and isinstance(module, nn.Linear)
    }
    groups = choose_groups(list(shapes), offload.groups)
    if not groups:
        params = {"targets": ", ".join(offload.groups.targets or ()), "names": ", ".join(list(shapes)[:7])}
        raise ConfigError(Problem(code="E-OFFLOAD-TARGETS", params=params, path="/ramtorch_target_modules"))
    is_trained = precision_option == "base_model_precision"
    precision = memory.base_model_precision if is_trained else memory.text_encoder_precision
    # Quantised elsewhere, the last bit of a scale may differ.
    quantised_on = "cpu" if memory.quantize_via == "cpu" else compute.device.type
    made = [fingerprint(files), precision, quantised_on, str(compute.weights), repr(groups)]
    made += [addition_key] if addition_key else []
    return ModelStream(
        offload=offload,
        precision=precision,
        precision_option=precision_option,
        dtype=compute.weights,
        device=compute.device,
        shapes=shapes,
        groups=groups,
        key=hashlib.sha256("\0".join(made).encode()).hexdigest()[:32],
    )


def stream_conversion(stream: ModelStream, builder: StreamBuilder, *, quantise_on_device: bool) -> Conversion:
    """How the layers are made while a model is loaded: quantised if they shall be, and taken in by `builder`."""
    quantise = quantiser(stream.precision, stream.dtype)
    make = _packer(stream.dtype) if quantise is None else quantise
    form = FORMATS.get(stream.precision, PLAIN)

    def convert(name: str, weight: Tensor) -> nn.Module:
        if name in builder.ready:
            rows, columns = weight.shape
            layer: nn.Module = FrozenLinear(builder.parts_of(name), (rows, columns), None, form=form)
        else:
            layer = make(weight)
        if name in builder.names:
            assert isinstance(layer, FrozenLinear)
            builder.take(name, layer)
        return layer

    return Conversion(
        layers=builder.names if quantise is None else frozenset(stream.shapes),
        make=convert,
        on_device=quantise is not None and quantise_on_device,
        ready=builder.ready,
    )


def announce_offload(
    memory: MemorySection, files: WeightFiles, compute: Compute, run: Reporter, *, addition_key: str = ""
) -> None:
    """Say what the offload of the trained model comes to, before anything is loaded.

    Raises:
        ConfigError: there is no room for it.
    """
    if memory.group_offload_use_stream and compute.device.type != "cuda" and asks_for_groups(memory):
        option = "group_offload_use_stream"
        run.emit(SettingOverridden(option=option, requested=True, used=False, reason="override.no_streams"))
    stream = transformer_stream(memory, files, compute, addition_key=addition_key)
    if stream is None:
        return
    stream.check_room()
    plan = stream.plan
    if compute.device.type == "cpu" and not plan.on_disk:
        run.emit(ProblemReported(problem=Problem(code="W-OFFLOAD-CPU", severity=Severity.WARNING)))
    params = {
        "groups": len(plan.group_bytes),
        "slots": plan.num_slots,
        "device": _gib(plan.device_bytes),
        "ram": _gib(plan.ram_bytes),
        "disk": _gib(plan.disk_bytes),
    }
    run.emit(ProblemReported(problem=Problem(code="I-OFFLOAD", severity=Severity.INFO, params=params)))


def asks_for_groups(memory: MemorySection) -> bool:
    """Whether the options of group offload are read."""
    return memory.enable_group_offload or memory.group_offload_text_encoder


def _group_offload(memory: MemorySection, device: torch.device, *, num_blocks: int | None = None) -> Offload:
    is_leaf = memory.group_offload_type == "leaf_level"
    directory = memory.group_offload_to_disk_path
    return Offload(
        groups=GroupSettings(
            blocks_per_group=None if is_leaf else memory.group_offload_blocks_per_group, num_blocks=num_blocks
        ),
        ahead=memory.group_offload_use_stream and device.type == "cuda",
        directory=Path(directory) if directory else None,
    )


def _packer(dtype: torch.dtype) -> Callable[[Tensor], nn.Module]:
    return lambda weight: FrozenLinear.from_weight(weight.to(dtype), None, form=PLAIN)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.1f}"
