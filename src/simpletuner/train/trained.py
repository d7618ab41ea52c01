"""What a run trains: how it gets onto the model, into a folder, and back."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from simpletuner.adapters.files import DEFAULT_LAYOUT, LORA_FILE_NAME, LoraInfo, load_lora, save_lora
from simpletuner.adapters.lora import (
    WEIGHT_STARTS,
    LoraReport,
    LoraSettings,
    adapter_state,
    apply_lora,
    load_adapter_state,
    start_from_,
)
from simpletuner.adapters.lycoris import apply_lycoris, load_lycoris, load_lycoris_, save_lycoris
from simpletuner.adapters.targets import linear_names
from simpletuner.catalog.lycoris import LycorisSettings
from simpletuner.events.paths import MODEL_FOLDER
from simpletuner.events.types import AdapterCreated
from simpletuner.models.z_image.save import load_weights_of_, save_transformer
from simpletuner.models.z_image.transformer import ZImageTransformer

_OF_ADAPTER = re.compile(r"\.lora_[AB]\.")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What two runs must have in common for one to go on from the other's checkpoint. `adapter` tells the kind."""

    adapter: str
    targets: tuple[str, ...] = ()
    rank: int = 0
    alpha: float = 0.0


class Trained(ABC):
    """One kind of trained weights."""

    label: str  # for people
    identity: Identity
    uses_dropout: bool
    multiplier: float = 1.0  # how often they count in training steps
    sampling_multiplier: float = 1.0  # and in images
    name: str = LORA_FILE_NAME  # of the file or folder
    averaged_name: str = LORA_FILE_NAME.replace(".", "_ema.")

    @abstractmethod
    def attach(self, transformer: ZImageTransformer, *, start: Path | None) -> LoraReport:
        """Make `transformer` train them, and nothing else; `start`: from the file that init_lora names.

        Raises:
            ConfigError: they do not fit the model.
            ModelError: the file does not fit them.
        """

    @abstractmethod
    def created(self, report: LoraReport) -> AdapterCreated:
        """What the run tells of them."""

    def save(
        self,
        folder: Path,
        transformer: ZImageTransformer,
        *,
        step: int,
        exported: bool = False,
        averaged: bool = False,
    ) -> Path:
        """Write them into `folder`; return the file, or the folder, that people load.

        Args:
            exported: for other programs, in the layout that was asked for; `load` need not read it.
            averaged: it is their moving average that they hold now, which lies beside them under a name of its own.
        Raises:
            FileSystemError: there is no room, or no right to write there.
        """
        path = folder / (self.averaged_name if averaged else self.name)
        self._write(path, transformer, step=step, exported=exported)
        return path

    @abstractmethod
    def _write(self, path: Path, transformer: ZImageTransformer, *, step: int, exported: bool) -> None:
        """What `save` does, at the place that it has chosen."""

    @abstractmethod
    def load(self, folder: Path, transformer: ZImageTransformer) -> None:
        """Put back what `save` wrote, exactly.

        Raises:
            ModelError: it is not of this adapter, or damaged.
        """


class TrainedLora(Trained):
    """A LoRA; see `adapters.lora`."""

    def __init__(
        self, settings: LoraSettings, info: Callable[[int], LoraInfo], *, layout: str = DEFAULT_LAYOUT
    ) -> None:
        """`info(step)` is what its file says about itself; `layout` of the exported one."""
        self._settings, self._info, self._layout = settings, info, layout
        kind = "DoRA" if settings.dora else "LoRA"
        self.label = f"{kind} rank {settings.rank}"
        # What the weights in a checkpoint mean; how they began matters where it is a part of them.
        begun = f" {settings.start}" if settings.start in WEIGHT_STARTS else ""
        self.uses_dropout = settings.dropout > 0
        self.identity = Identity(
            adapter=f"{kind.lower()}{begun}", targets=settings.targets, rank=settings.rank, alpha=settings.alpha
        )

    def attach(self, transformer: ZImageTransformer, *, start: Path | None) -> LoraReport:
        report = apply_lora(transformer, self._settings)
        if start is not None:
            start_from_(transformer, load_lora(start, linear_names(transformer)), self._settings, path="/init_lora")
        return report

    def created(self, report: LoraReport) -> AdapterCreated:
        settings = self._settings
        return AdapterCreated(
            num_params=report.num_params,
            num_modules=report.num_modules,
            rank=settings.rank,
            alpha=settings.alpha,
            targets=settings.targets,
            kind="DoRA" if settings.dora else "LoRA",
        )

    def _write(self, path: Path, transformer: ZImageTransformer, *, step: int, exported: bool) -> None:
        info = self._info(step)
        if self._settings.start in WEIGHT_STARTS:  # the file has what was learnt, less what it began with
            info = replace(info, rank=2 * info.rank, alpha=2 * info.alpha)
        save_lora(path, adapter_state(transformer), info, layout=self._layout if exported else DEFAULT_LAYOUT)

    def load(self, folder: Path, transformer: ZImageTransformer) -> None:
        load_adapter_state(transformer, load_lora(folder / LORA_FILE_NAME).tensors)


class TrainedModel(Trained):
    """Every weight of the transformer."""

    label = "all weights"
    name, averaged_name = MODEL_FOLDER, f"{MODEL_FOLDER}_ema"
    identity = Identity(adapter="full")
    uses_dropout = False

    def attach(self, transformer: ZImageTransformer, *, start: Path | None) -> LoraReport:
        weights = _whole_model(transformer)
        for parameter in weights.values():
            parameter.requires_grad_(True)
        modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in weights))
        return LoraReport(modules=modules, num_params=sum(parameter.numel() for parameter in weights.values()))

    def created(self, report: LoraReport) -> AdapterCreated:
        return AdapterCreated(
            num_params=report.num_params,
            num_modules=report.num_modules,
            rank=0,
            alpha=0.0,
            targets=("*",),
            kind=self.label,
        )

    def _write(self, path: Path, transformer: ZImageTransformer, *, step: int, exported: bool) -> None:
        save_transformer(path, transformer.config, _whole_model(transformer))

    def load(self, folder: Path, transformer: ZImageTransformer) -> None:
        load_weights_of_(folder / MODEL_FOLDER, _whole_model(transformer))


def _whole_model(transformer: ZImageTransformer) -> dict[str, nn.Parameter]:
    """The model's own parameters under the checkpoint's names, without an assistant adapter's."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in transformer.named_parameters()
        if not _OF_ADAPTER.search(name)
    }


class TrainedLycoris(Trained):
    """LoKr and its relatives; see `adapters.lycoris`."""

    def __init__(
        self,
        settings: LycorisSettings,
        *,
        config: str,
        seed: int,
        first_norm: float | None,
        sampling_multiplier: float,
        metadata: Callable[[int], dict[str, str]],
    ) -> None:
        """`config` are the settings as JSON text; `metadata(step)` is what its file says about itself."""
        self._settings, self._config, self._seed = settings, config, seed
        self._first_norm, self._metadata = first_norm, metadata
        self.multiplier, self.sampling_multiplier = settings.multiplier, sampling_multiplier
        self.label = "LyCORIS " + ", ".join(dict.fromkeys(update.algo for update in settings.updates))
        self.uses_dropout = any(update.drops for update in settings.updates)
        self.identity = Identity(adapter=f"lycoris {config}")

    def attach(self, transformer: ZImageTransformer, *, start: Path | None) -> LoraReport:
        report = apply_lycoris(transformer, self._settings, seed=self._seed, first_norm=self._first_norm)
        if start is not None:
            load_lycoris_(transformer, load_lycoris(start, linear_names(transformer)), path="/init_lora")
        return report

    def created(self, report: LoraReport) -> AdapterCreated:
        update = self._settings.update
        return AdapterCreated(
            num_params=report.num_params,
            num_modules=report.num_modules,
            rank=update.dim,
            alpha=update.alpha,
            targets=(*self._settings.classes, *self._settings.names),
            kind=self.label,
        )

    def _write(self, path: Path, transformer: ZImageTransformer, *, step: int, exported: bool) -> None:
        save_lycoris(path, transformer, config=self._config, metadata=self._metadata(step))

    def load(self, folder: Path, transformer: ZImageTransformer) -> None:
        load_lycoris_(transformer, load_lycoris(folder / LORA_FILE_NAME, linear_names(transformer)))
