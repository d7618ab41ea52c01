"""`memory_plan: auto` and `fit`: the settings of least cost with which a run fits into the memory there is.

Rungs of a ladder, from the fastest and finest on: the first that fits is taken, so more memory never gives a slower
or coarser plan. What the user has set stays as it is, with one exception: a batch may be made in several parts, whose
gradients are added up. The images of an update stay as many as were asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.config.datasets import DatasetsConfig
from simpletuner.config.load import LoadedConfig
from simpletuner.config.root import Config, options, sections
from simpletuner.config.rule import was_set
from simpletuner.config.settings import Origin, OriginKind
from simpletuner.config.sizes import parse_bytes
from simpletuner.events.formats import size
from simpletuner.planner.estimate import ROOM, device_peak
from simpletuner.planner.from_config import Machine, find_machine, plan_input
from simpletuner.planner.inputs import Offload, PlanInput
from simpletuner.planner.remedies import smaller_formats
from simpletuner.planner.speed import step_flops
from simpletuner.problems import Problem, Severity

PLAN_ORIGIN = Origin(kind=OriginKind.PLAN, place="memory_plan")
_SWAP = "musubi_blocks_to_swap"
_KEEP = "gradient_checkpointing_keep"
_BATCH, _ACCUMULATION = "train_batch_size", "gradient_accumulation_steps"
_INTERVALS = (None, 4, 3, 2, 1)  # None: nothing is recomputed
_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the blocks that leave the device


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One choice. `interval` None: without gradient checkpointing. `parts`: in which a batch is made, one after the
    other."""

    precision: str
    interval: int | None
    keeps_product: bool = False
    parts: int = 1
    swapped: int = 0

    def applied(self, plan: PlanInput) -> PlanInput:
        """The plan with this choice."""
        changed = replace(
            plan,
            precision=PRECISIONS[self.precision],
            checkpointing=self.interval is not None,
            interval=self.interval or 1,
            keeps_product=self.keeps_product,
            train=replace(plan.train, count=plan.train.count // self.parts),
            is_mixed=plan.is_mixed and plan.train.count > self.parts,
            accumulation=plan.accumulation * self.parts,
        )
        return replace(changed, offload=Offload(blocks=self.swapped, overlap=True)) if self.swapped else changed

    @property
    def values(self) -> dict[str, object]:
        """As options."""
        found: dict[str, object] = {
            "base_model_precision": self.precision,
            "gradient_checkpointing": self.interval is not None,
        }
        if self.interval is not None:
            found["gradient_checkpointing_interval"] = self.interval
            found[_KEEP] = "product" if self.keeps_product else "input"
        return {**found, _SWAP: self.swapped} if self.swapped else found

    def batch_values(self, config: Config) -> dict[str, object]:
        """As options: what becomes of the batch."""
        if self.parts == 1:
            return {}
        optimizer = config.optimizer
        return {
            _BATCH: optimizer.train_batch_size // self.parts,
            _ACCUMULATION: optimizer.gradient_accumulation_steps * self.parts,
        }


@dataclass(frozen=True, kw_only=True)
class Choice:
    """An option that the plan changed."""

    option: str
    before: object
    after: object


@dataclass(frozen=True, kw_only=True)
class Planned:
    """`loaded` with what was chosen; `fits` None: nothing was to be planned."""

    loaded: LoadedConfig
    choices: tuple[Choice, ...] = ()
    budget_bytes: int | None = None
    fits: bool | None = None


def planned(loaded: LoadedConfig, machine: Machine | None = None) -> Planned:
    """Choose what `memory_plan` and `fit` ask to choose; as it is where they ask for nothing. `machine`: this one."""
    memory = loaded.config.memory
    if memory.memory_plan == "off" and memory.fit is None:
        return Planned(loaded=loaded)
    machine = machine or find_machine(loaded.config.run.device)
    budget_bytes = _budget(loaded.config, machine)
    if budget_bytes is None:
        problem = Problem(code="W-PLAN-NO-MEMORY", severity=Severity.WARNING, params={}, path="/fit")
        return Planned(loaded=replace(loaded, warnings=(*loaded.warnings, problem)))
    asked = plan_input(loaded.config, loaded.datasets, machine)
    fixed = {name: loaded.config.option(name) for name in options() if was_set(name, loaded.origins)}
    if fixed.get(_KEEP) == "auto":
        del fixed[_KEEP]
    batch = loaded.config.optimizer.train_batch_size
    if any(dataset.train_batch_size != batch for dataset in loaded.datasets.images):
        fixed[_ACCUMULATION] = loaded.config.optimizer.gradient_accumulation_steps
    rungs = list(ladder(asked, fixed))
    rung = choose(asked, rungs, budget_bytes)
    values = {**rung.values, **_text_precision(asked, fixed, budget_bytes)}
    choices = tuple(
        Choice(option=name, before=loaded.config.option(name), after=value)
        for name, value in values.items()
        if name not in fixed and loaded.config.option(name) != value
    )
    choices += tuple(
        Choice(option=name, before=loaded.config.option(name), after=value)
        for name, value in rung.batch_values(loaded.config).items()
    )
    chosen = {choice.option: choice.after for choice in choices}
    result = replace(
        loaded,
        config=with_options(loaded.config, chosen),
        datasets=_with_batch(loaded.datasets, chosen),
        origins={**loaded.origins, **dict.fromkeys(chosen, PLAN_ORIGIN)},
    )
    after = plan_input(result.config, result.datasets, machine)
    peak = device_peak(after)
    if peak > budget_bytes:
        params = {"needed": size(peak, "en"), "there": size(budget_bytes, "en")}
        problem = Problem(code="W-PLAN-TOO-SMALL", severity=Severity.WARNING, params=params, path="/fit")
        result = replace(result, warnings=(*result.warnings, problem))
    return Planned(loaded=result, choices=choices, budget_bytes=budget_bytes, fits=peak <= budget_bytes)


def ladder(plan: PlanInput, fixed: dict[str, object]) -> Iterator[Rung]:
    """Every choice that leaves what is `fixed` as it is, from the least cost on."""
    formats = [str(fixed["base_model_precision"])] if "base_model_precision" in fixed else None
    formats = formats or ["no_change", *smaller_formats(None)]
    intervals = [x for x in _INTERVALS if _allowed(x, fixed)]
    for name in formats:
        whole = [
            Rung(precision=name, interval=interval, keeps_product=keeps)
            for interval in intervals
            for keeps in ((False,) if interval is None else _keeps(fixed))
        ]
        parts = _parts(plan, fixed)
        for rung in sorted(whole, key=lambda rung: step_flops(rung.applied(plan)).step):
            yield from (replace(rung, parts=count) for count in parts)
        is_whole = name == "no_change" and len(formats) > 1  # halved weights are quicker than whole ones that travel
        if _SWAP in options() and _SWAP not in fixed and plan.device == "cuda" and not is_whole:
            for share in _SHARES if PRECISIONS[name].offloadable else ():
                swapped = round(share * (plan.sizes.transformer.n_layers - 1))
                keeps = _keeps(fixed)[-1]
                last = Rung(precision=name, interval=intervals[-1], keeps_product=keeps, parts=parts[-1])
                yield replace(last, swapped=swapped)


def choose(plan: PlanInput, rungs: list[Rung], budget_bytes: int) -> Rung:
    """The first rung that fits; of none that fits, the one that needs least."""
    peaks = [(rung, _peak_without_text(rung.applied(plan))) for rung in rungs]
    fitting = next((rung for rung, peak in peaks if peak <= budget_bytes), None)
    return fitting or min(peaks, key=lambda pair: pair[1])[0]


def with_options(config: Config, values: dict[str, object]) -> Config:
    """The configuration with other values of some options."""
    changed = {}
    for section in sections():
        mine = {name: value for name, value in values.items() if options()[name].section == section}
        if mine:
            changed[section] = getattr(config, section).model_copy(update=mine)
    return config.model_copy(update=changed)


def _parts(plan: PlanInput, fixed: dict[str, object]) -> tuple[int, ...]:
    """In how many parts a batch may be made, all at once first."""
    if _BATCH not in fixed or _ACCUMULATION in fixed:
        return (1,)
    batch = plan.train.count
    return tuple(count for count in range(1, batch + 1) if batch % count == 0)


def _keeps(fixed: dict[str, object]) -> tuple[bool, ...]:
    """Whether recomputed blocks keep a product: what may be chosen, what takes least memory last."""
    return (True, False) if _KEEP not in fixed else (fixed[_KEEP] == "product",)


def _with_batch(datasets: DatasetsConfig, chosen: dict[str, object]) -> DatasetsConfig:
    """The datasets, which all have the batch size of the run, with another one."""
    if _BATCH not in chosen:
        return datasets
    changed = tuple(dataset.model_copy(update={_BATCH: chosen[_BATCH]}) for dataset in datasets.images)
    return replace(datasets, images=changed)


def _allowed(interval: int | None, fixed: dict[str, object]) -> bool:
    if "gradient_checkpointing" in fixed and fixed["gradient_checkpointing"] != (interval is not None):
        return False
    wanted = fixed.get("gradient_checkpointing_interval")
    return interval is None or wanted is None or interval == (wanted or 1)


def _text_precision(plan: PlanInput, fixed: dict[str, object], budget_bytes: int) -> dict[str, object]:
    """The text encoder is alone when it works: its format is a choice of its own."""
    name = "text_encoder_precision"
    if name in fixed:
        return {}
    found = ["no_change", *smaller_formats(None)]
    fitting = (x for x in found if _prompts_peak(replace(plan, text_precision=PRECISIONS[x])) <= budget_bytes)
    return {name: next(fitting, found[-1])}


def _peak_without_text(plan: PlanInput) -> int:
    return device_peak(plan, phases=("latents", "training", "validation"))


def _prompts_peak(plan: PlanInput) -> int:
    return device_peak(plan, phases=("prompts",))


def _budget(config: Config, machine: Machine) -> int | None:
    """Bytes that may be used: what was asked for, or what is free with some room left."""
    if config.memory.fit is not None:
        return parse_bytes(config.memory.fit)
    space = machine.host if machine.kind == "cpu" else machine.device
    if space is None:
        return None
    return int(ROOM * (space.total_bytes if space.free_bytes is None else space.free_bytes))
