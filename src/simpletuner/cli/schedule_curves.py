"""What noise levels a configuration trains on, as curves to draw: one for each shift that its images get."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from simpletuner.config.datasets import DatasetsConfig, ImageDataset
from simpletuner.config.load import LoadedConfig
from simpletuner.config.root import Config
from simpletuner.events.formats import decimal
from simpletuner.i18n import text
from simpletuner.planner.from_config import picture_px
from simpletuner.planner.inputs import PX_PER_TOKEN
from simpletuner.train.sigma_law import (
    Beta,
    Cubic,
    Listed,
    LogitNormal,
    SigmaLaw,
    auto_shift,
    law_of,
    shifted,
    shifted_density,
)

PERCENTILES = (5, 25, 50, 75, 95)
_USUAL_EDGES_PX = (512, 768, 1024)  # with auto shift and no datasets to ask


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The levels of some images. `factor`: shift of the law, the offset of the dataset included."""

    label: str
    law: SigmaLaw
    factor: float

    def quantile(self, u: float) -> float:
        """The level that a share `u` of all draws stays below."""
        level = self.law.quantile(u)
        return level if isinstance(self.law, Listed) else shifted(level, self.factor)

    def density(self, sigma: float) -> float:
        """Probability per unit of sigma, for 0 < sigma < 1."""
        return shifted_density(self.law, self.factor, sigma)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Everything that is drawn. `sampling`: the levels at which the sampler of validation images steps; `caption`
    describes them."""

    name: str
    curves: tuple[Curve, ...]
    sampling: tuple[float, ...]
    caption: str
    stratified: bool

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels of a law that has only some, else none."""
        law = self.curves[0].law
        return tuple(sorted(set(law.values))) if isinstance(law, Listed) else ()

    def share(self, level: float) -> float:
        """Of all draws, for one of `levels`."""
        law = self.curves[0].law
        assert isinstance(law, Listed)
        return law.values.count(level) / len(law.values)


def schedule_of(loaded: LoadedConfig, language: str) -> Schedule:
    """The curves of a configuration, labelled in `language`."""
    config = loaded.config
    law = law_of(config.flow)
    options = config.validation
    num_steps, shift = options.validation_num_inference_steps, options.validation_sampling_shift
    return Schedule(
        name=_name(law, language),
        curves=tuple(_curves(config, loaded.datasets, law, language)),
        sampling=tuple(shifted((num_steps - i) / num_steps, shift) for i in range(num_steps)),
        caption=text("plot.sampling", language, steps=num_steps, shift=_number(shift, language)),
        stratified=not config.flow.disable_segmented_timestep_sampling,
    )


def _curves(config: Config, datasets: DatasetsConfig, law: SigmaLaw, language: str) -> Iterator[Curve]:
    if isinstance(law, Listed):
        yield Curve(label=text("plot.listed", language), law=law, factor=1.0)
        return
    found: dict[float, str] = {}
    for label, shift, offset in _shifts(config, datasets, language):
        found.setdefault(round(shift * math.exp(offset), 6), label)
    for factor, label in sorted(found.items()):
        yield Curve(label=label, law=law, factor=factor)


def _shifts(config: Config, datasets: DatasetsConfig, language: str) -> Iterator[tuple[str, float, float]]:
    """(label, shift, offset) for each dataset; without any, for usual sizes."""
    is_auto = config.flow.flow_schedule_auto_shift
    if is_auto and not datasets.images:
        for edge_px in _USUAL_EDGES_PX:
            yield _shift_of_size((edge_px, edge_px), language)
    elif not datasets.images:
        yield (
            text("plot.shift", language, shift=_number(config.flow.flow_schedule_shift, language)),
            (config.flow.flow_schedule_shift),
            0.0,
        )
    for dataset in datasets.images:
        yield _shift_of(dataset, config, language)


def _shift_of(dataset: ImageDataset, config: Config, language: str) -> tuple[str, float, float]:
    shift = config.flow.flow_schedule_shift
    label = text("plot.shift", language, shift=_number(shift, language))
    if config.flow.flow_schedule_auto_shift:
        label, shift, _ = _shift_of_size(picture_px(dataset, config.data.aspect_bucket_alignment), language)
    offset = dataset.timestep_sampling_offset
    if offset:
        told = ("+" if offset > 0 else "") + _number(offset, language)
        label = text("plot.offset", language, label=label, id=dataset.id, offset=told)
    return label, shift, offset


def _shift_of_size(size: tuple[int, int], language: str) -> tuple[str, float, float]:
    width_px, height_px = size
    shift = auto_shift((width_px // PX_PER_TOKEN) * (height_px // PX_PER_TOKEN))
    label = text("plot.size", language, width=width_px, height=height_px, shift=decimal(shift, 2, language))
    return label, shift, 0.0


def _name(law: SigmaLaw, language: str) -> str:
    match law:
        case LogitNormal(scale=scale):
            return text("plot.law.sigmoid", language, scale=_number(scale, language))
        case Beta(alpha=alpha, beta=beta):
            numbers = {"alpha": _number(alpha, language), "beta": _number(beta, language)}
            return text("plot.law.beta", language, **numbers)
        case Cubic(weights=weights):
            return text("plot.law.cubic", language, weights="; ".join(_number(w, language) for w in weights))
        case Listed(values=values):
            return text("plot.law.listed", language, count=len(values))
        case _:
            return text("plot.law.uniform", language)


def _number(value: float, language: str) -> str:
    return f"{value:g}".replace(".", "," if language == "es" else ".")
