"""The whole configuration of a run, and the index of its options."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict

from simpletuner.config.fields import Option, Section, describe
from simpletuner.config.sections.adapter import AdapterSection
from simpletuner.config.sections.data import DataSection
from simpletuner.config.sections.experimental import ExperimentalSection
from simpletuner.config.sections.flow import FlowSection
from simpletuner.config.sections.memory import MemorySection
from simpletuner.config.sections.model import ModelSection
from simpletuner.config.sections.optimizer import OptimizerSection
from simpletuner.config.sections.parallel import ParallelSection
from simpletuner.config.sections.publish import PublishSection
from simpletuner.config.sections.run import RunSection
from simpletuner.config.sections.tracking import TrackingSection
from simpletuner.config.sections.validation import ValidationSection


class Config(BaseModel):
    """Every option of a run, by section. Frozen: nothing writes to a configuration after it is parsed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    adapter: AdapterSection = AdapterSection()
    optimizer: OptimizerSection = OptimizerSection()
    data: DataSection = DataSection()
    flow: FlowSection = FlowSection()
    experimental: ExperimentalSection = ExperimentalSection()
    memory: MemorySection = MemorySection()
    parallel: ParallelSection = ParallelSection()
    validation: ValidationSection = ValidationSection()
    tracking: TrackingSection = TrackingSection()
    publish: PublishSection = PublishSection()

    def option(self, name: str) -> object:
        """The value of an option by its name. Raises KeyError if there is none."""
        value: object = getattr(getattr(self, options()[name].section), name)
        return value


def sections() -> Mapping[str, type[Section]]:
    """Section name -> its class, in the order of the reference."""
    found: dict[str, type[Section]] = {}
    for name, info in Config.model_fields.items():
        assert isinstance(info.annotation, type)
        assert issubclass(info.annotation, Section)
        found[name] = info.annotation
    return MappingProxyType(found)


@cache
def options() -> Mapping[str, Option]:
    """Option name -> its declaration, in the order of the reference."""
    found: dict[str, Option] = {}
    for section, model in sections().items():
        for option in describe(model, section):
            assert option.name not in found, f"{option.name} is declared twice"
            found[option.name] = option
    return MappingProxyType(found)


@cache
def option_aliases() -> Mapping[str, str]:
    """Other name -> option name."""
    return MappingProxyType({alias: o.name for o in options().values() for alias in o.opt.aliases})
