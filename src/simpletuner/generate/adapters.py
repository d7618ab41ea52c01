"""The adapters of generated images: found, attached, scaled, and changed for those of another checkpoint."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from simpletuner.adapters.files import LORA_FILE_NAME, load_lora
from simpletuner.adapters.frozen import attach_frozen, load_fitting
from simpletuner.adapters.lora import ADAPTER_NAME, activate_, set_scale, start_from_
from simpletuner.adapters.lycoris import LYCORIS_CONFIG_NAME, apply_lycoris, load_lycoris, load_lycoris_
from simpletuner.adapters.targets import linear_names
from simpletuner.config.lycoris import read_lycoris
from simpletuner.events.paths import RunDirectory
from simpletuner.generate.request import BASE, LAST, AdapterChoice, Axis
from simpletuner.models.hub import OnDownload
from simpletuner.models.weights import resolve_file
from simpletuner.problems import ConfigError, Problem

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


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
    found = {}
    for folder in run_dir.iterdir():
        match = _CHECKPOINT.fullmatch(folder.name)
        if match is not None and (folder / LORA_FILE_NAME).is_file():
            found[int(match[1])] = folder / LORA_FILE_NAME
    return {str(step): found[step] for step in sorted(found)}


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


class _AttachedLora:
    """A LoRA or DoRA on the model."""

    def __init__(self, model: nn.Module, file: Path, name: str, dtype: torch.dtype) -> None:
        self.name, self._model = name, model
        lora = load_fitting(model, file, option="/lora")
        self._settings, report = attach_frozen(model, lora, dtype=dtype, adapter_name=name, option="/lora")
        self.modules = report.modules

    def load(self, file: Path) -> None:
        """Be what another file of the same run holds."""
        start_from_(self._model, load_lora(file, linear_names(self._model)), self._settings, self.name, path="/lora")


class _AttachedLycoris:
    """A LyCORIS adapter on the model, of the settings that lie beside its file."""

    name = ADAPTER_NAME

    def __init__(self, model: nn.Module, file: Path, settings_file: Path) -> None:
        self._model = model
        self.modules = apply_lycoris(model, read_lycoris(settings_file), seed=0).modules
        self.load(file)
        model.requires_grad_(False)

    def load(self, file: Path) -> None:
        """Be what another file of the same run holds."""
        load_lycoris_(self._model, load_lycoris(file, linear_names(self._model)), path="/lora")


class AdapterStack:
    """Adapters around one model. Nothing of them is trained."""

    def __init__(self, model: nn.Module, adapters: Sequence[FoundAdapter], *, dtype: torch.dtype) -> None:
        """
        Raises:
            ConfigError: more than one LyCORIS adapter.
            ModelError: a file is damaged, of another kind, or for another model.
        """
        self._model = model
        self._adapters = tuple(adapters)
        self._loaded = [adapter.file for adapter in adapters]
        configs = [adapter.file.parent / LYCORIS_CONFIG_NAME for adapter in adapters]
        if sum(config.is_file() for config in configs) > 1:
            raise ConfigError(Problem(code="E-GENERATE-LYCORIS", origin="--lora"))
        attached: dict[int, _AttachedLora | _AttachedLycoris] = {}
        # Around the others: a LyCORIS layer takes a layer with LoRA as its base, not the other way round.
        for index in sorted(range(len(adapters)), key=lambda index: configs[index].is_file()):
            file, config = adapters[index].file, configs[index]
            attached[index] = (
                _AttachedLycoris(model, file, config)
                if config.is_file()
                else _AttachedLora(model, file, f"adapter_{index}", dtype)
            )
        self._attached = [attached[index] for index in range(len(adapters))]
        self.modules = frozenset(name for one in self._attached for name in one.modules)
        activate_(model, [one.name for one in self._attached])

    def use(self, checkpoint: str, strength: float) -> None:
        """Let every adapter count `strength` times its own strength, those of a run as they were at `checkpoint`."""
        for index, (attached, adapter) in enumerate(zip(self._attached, self._adapters, strict=True)):
            file = adapter.checkpoints.get(checkpoint, adapter.file)
            if file != self._loaded[index]:
                attached.load(file)
                self._loaded[index] = file
            is_absent = checkpoint == BASE and bool(adapter.checkpoints)
            set_scale(self._model, 0.0 if is_absent else strength * adapter.strength, attached.name)
