"""The adapters of generated images: found, attached, scaled, and changed for those of another checkpoint."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from simpletuner.adapters.files import LORA_FILE_NAME, load_lora
from simpletuner.adapters.frozen import attach_frozen, load_fitting
from simpletuner.adapters.lora import LoraSettings, activate_, set_scale, start_from_
from simpletuner.adapters.lycoris import attach_lycoris, is_lycoris, load_lycoris, lycoris_layers, set_lycoris_
from simpletuner.adapters.targets import linear_names
from simpletuner.events.paths import RunDirectory
from simpletuner.generate.request import BASE, LAST, AdapterChoice, Axis
from simpletuner.models.hub import OnDownload
from simpletuner.models.weights import resolve_file
from simpletuner.problems import ConfigError, Problem


@dataclass(frozen=True, kw_only=True)
class FoundAdapter:
    """An adapter's file. `checkpoints`: those of the run that it belongs to, by their step, oldest first."""

    file: Path
    strength: float
    label: str
    checkpoints: Mapping[str, Path]


def find_adapter(choice: AdapterChoice, on_download: OnDownload | None = None) -> FoundAdapter:
    """The file that a choice stands for: of a run, the finished adapter, or else the newest checkpoint's.

    Raises:
        ConfigError: the run has saved nothing yet.
        ModelError: there is no such file or repository.
    """
    path = Path(choice.place).expanduser()
    if RunDirectory(path).run_json.is_file():
        found = checkpoint_files(path)
        last = path / LORA_FILE_NAME
        if not found and not last.is_file():
            raise ConfigError(Problem(code="E-GENERATE-EMPTY-RUN", params={"path": str(path)}, origin="--lora"))
        file = last if last.is_file() else list(found.values())[-1]
        return FoundAdapter(file=file, strength=choice.strength, label=path.absolute().name, checkpoints=found)
    file = resolve_file(choice.place, file_name=LORA_FILE_NAME, part="adapter", option="lora", on_download=on_download)
    label = path.absolute().name if file.name == LORA_FILE_NAME and path.is_dir() else file.stem
    return FoundAdapter(file=file, strength=choice.strength, label=label, checkpoints={})


def checkpoint_files(run_dir: Path) -> dict[str, Path]:
    """Step -> adapter file of every checkpoint that has one, oldest first."""
    files = {str(step): folder / LORA_FILE_NAME for step, folder in RunDirectory(run_dir).checkpoints().items()}
    return {step: file for step, file in files.items() if file.is_file()}


def complete_axis(axis: Axis, adapters: Sequence[FoundAdapter]) -> Axis:
    """Checkpoints that are not named are the base, all that the run has, and its end if it is another; those named must
    be there.

    Raises:
        ConfigError: not exactly one adapter is a run's, or the run has no such checkpoint.
    """
    if axis.name != "checkpoint":
        return axis
    of_runs = [adapter for adapter in adapters if adapter.checkpoints]
    if len(of_runs) != 1:
        raise ConfigError(Problem(code="E-GENERATE-CHECKPOINTS", params={"count": len(of_runs)}, origin="--grid"))
    run = of_runs[0]
    newest = list(run.checkpoints.values())[-1]
    has_end = not filecmp.cmp(run.file, newest, shallow=False)
    known = (BASE, *run.checkpoints, *([LAST] if has_end else []))
    for value in axis.values:
        if value not in (*known, LAST):
            params = {"value": value, "known": ", ".join(known)}
            raise ConfigError(Problem(code="E-GENERATE-CHECKPOINT", params=params, origin="--grid"))
    return Axis(name=axis.name, values=axis.values or known)


class AdapterStack:
    """Adapters around one model. Nothing of them is trained."""

    def __init__(self, model: nn.Module, adapters: Sequence[FoundAdapter], *, dtype: torch.dtype) -> None:
        """Raises ConfigError or ModelError for a file that is for another model."""
        self._model = model
        self._adapters = tuple(adapters)
        self._names = tuple(f"adapter_{index}" for index in range(len(adapters)))
        self._settings: list[LoraSettings | None] = []  # None: of a LyCORIS adapter
        self._loaded = [adapter.file for adapter in adapters]
        self.modules: frozenset[str] = frozenset()
        for name, adapter in zip(self._names, adapters, strict=True):
            if is_lycoris(adapter.file):
                lycoris = load_lycoris(adapter.file, linear_names(model))
                modules = attach_lycoris(model, lycoris, dtype=dtype, adapter_name=name, path="/lora")
                self._settings.append(None)
                self.modules |= frozenset(modules)
                continue
            lora = load_fitting(model, adapter.file, option="/lora")
            settings, report = attach_frozen(model, lora, dtype=dtype, adapter_name=name, option="/lora")
            self._settings.append(settings)
            self.modules |= frozenset(report.modules)
        for _, layer in lycoris_layers(model):
            # No gradient is taken, but torch.matmul adds up in another order for tensors that ask for none, and images
            # would differ from those of the training in the last bit.
            layer.trained.requires_grad_(True)
        activate_(model, self._names)

    def use(self, checkpoint: str, strength: float) -> None:
        """Let every adapter count `strength` times its own strength, those of a run as they were at `checkpoint`."""
        for index, (name, adapter) in enumerate(zip(self._names, self._adapters, strict=True)):
            file = adapter.checkpoints.get(checkpoint, adapter.file)
            if file != self._loaded[index]:
                settings, names = self._settings[index], linear_names(self._model)
                if settings is None:
                    set_lycoris_(self._model, load_lycoris(file, names), name)
                else:
                    start_from_(self._model, load_lora(file, names), settings, name)
                self._loaded[index] = file
            is_absent = checkpoint == BASE and bool(adapter.checkpoints)
            set_scale(self._model, 0.0 if is_absent else strength * adapter.strength, name)
