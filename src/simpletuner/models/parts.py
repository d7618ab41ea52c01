"""The parts of a pipeline inside one folder of the diffusers layout: which files each consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from simpletuner.models.family import FamilySpec
from simpletuner.models.files import WeightFiles, read_json
from simpletuner.models.places import WEIGHTS_SUFFIX
from simpletuner.problems import ModelError, Problem

_DIFFUSERS_STEM = "diffusion_pytorch_model"
_TRANSFORMERS_STEM = "model"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part with weights. `folder` is relative to the pipeline's root, "" for the root itself.

    `kind_key` in its config.json must have one of the values `kinds`. `needs` tells from a stored tensor's name and
    the config whether the tensor is used.
    """

    name: str
    folder: str
    stem: str
    kind_key: str
    kinds: tuple[str, ...]
    needs: Callable[[str, Mapping[str, Any]], bool] = lambda _name, _config: True

    def inside(self, name: str) -> str:
        return str(PurePosixPath(self.folder, name))


def transformer_part(spec: FamilySpec, folder: str) -> Part:
    return Part(
        name="transformer",
        folder=folder,
        stem=_DIFFUSERS_STEM,
        kind_key="_class_name",
        kinds=spec.transformer_classes,
    )


def vae_part(spec: FamilySpec, folder: str) -> Part:
    return Part(name="vae", folder=folder, stem=_DIFFUSERS_STEM, kind_key="_class_name", kinds=spec.vae_classes)


def text_encoder_part(spec: FamilySpec, folder: str = "text_encoder") -> Part:
    def needs(name: str, config: Mapping[str, Any]) -> bool:
        return spec.needs_text_tensor(name, int(config.get("num_hidden_layers", 0)))

    return Part(
        name="text_encoder",
        folder=folder,
        stem=_TRANSFORMERS_STEM,
        kind_key="model_type",
        kinds=spec.text_encoder_types,
        needs=needs,
    )


def read_part_config(root: Path, part: Part) -> Mapping[str, Any]:
    """The part's config.json.

    Raises:
        ModelError: E-MODEL-KIND, it describes something else; E-MODEL-JSON.
    """
    path = root / part.inside("config.json")
    config = read_json(path)
    kind = config.get(part.kind_key)
    if kind not in (None, *part.kinds):
        params = {"path": path, "found": kind, "expected": " / ".join(part.kinds), "part": part.name}
        raise ModelError(Problem(code="E-MODEL-KIND", params=params))
    return config


def wanted_names(root: Path, part: Part, variant: str | None) -> tuple[str, ...]:
    """Weight files of the part, relative to `root`, whether or not they are there yet.

    With an index, the shards that hold a needed tensor; without, the one name that it must have.
    """
    index_path = root / part.inside(_index_name(part, variant))
    if not index_path.is_file():
        return (part.inside(_single_name(part, variant)),)
    config = read_part_config(root, part)
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_plain_name(shard) for shard in weight_map.values()):
        raise ModelError(Problem(code="E-MODEL-INDEX", params={"path": index_path}))
    return tuple(sorted({part.inside(shard) for name, shard in weight_map.items() if part.needs(name, config)}))


def complete_weights(root: Path, part: Part, variant: str | None) -> WeightFiles | None:
    """The part's files if all of them are there: those of the variant, else the plain ones, else the only file."""
    config_path = root / part.inside("config.json")
    if not config_path.is_file():
        return None
    for wanted in dict.fromkeys((variant, None)):
        shards = tuple(root / name for name in wanted_names(root, part, wanted))
        if all(shard.is_file() for shard in shards):
            return WeightFiles(part=part.name, config_path=config_path, shards=shards)
    only = tuple(config_path.parent.glob(f"*{WEIGHTS_SUFFIX}"))
    has_index = any(config_path.parent.glob(f"*{WEIGHTS_SUFFIX}.index*.json"))
    return (
        WeightFiles(part=part.name, config_path=config_path, shards=only) if len(only) == 1 and not has_index else None
    )


def _index_name(part: Part, variant: str | None) -> str:
    return f"{part.stem}{WEIGHTS_SUFFIX}.index.{variant}.json" if variant else f"{part.stem}{WEIGHTS_SUFFIX}.index.json"


def _single_name(part: Part, variant: str | None) -> str:
    return f"{part.stem}.{variant}{WEIGHTS_SUFFIX}" if variant else f"{part.stem}{WEIGHTS_SUFFIX}"


def _is_plain_name(name: object) -> bool:
    """A file beside the index, never a path that leads elsewhere."""
    return isinstance(name, str) and "\\" not in name and PurePosixPath(name).name == name
