"""An estimate as people read it: a line for each figure, the parts at the peak, the verdict, what would help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.text import Text

from simpletuner.config.effective import value_text
from simpletuner.events import formats
from simpletuner.hardware.space import Space, free_disk
from simpletuner.i18n import text
from simpletuner.planner.choose import Choice
from simpletuner.planner.estimate import Estimate, Verdict, judge
from simpletuner.planner.remedies import remedies
from simpletuner.problems import Fix

_MOST_REMEDIES = 5
_COLOURS = {Verdict.FITS: "green", Verdict.CLOSE: "yellow", Verdict.DOES_NOT_FIT: "red", Verdict.UNKNOWN: "yellow"}


def print_estimate(found: Estimate, choices: Sequence[Choice], language: str, *, output_dir: Path, out: TextIO) -> None:
    """Print it to `out`."""
    console = Console(file=out, highlight=False, soft_wrap=True)
    console.print(Text(_device_line(found, language)))
    for choice in choices:
        values = {"option": choice.option, "before": value_text(choice.before), "after": value_text(choice.after)}
        console.print(Text(text("estimate.chosen", language, **values)))
    for figure in _figure_lines(found, language, output_dir):
        console.print(figure)
    console.print(Text(_assumed(found, language), style="dim"))
    verdict = found.verdict
    console.print(Text(_verdict_line(found, language), style=_COLOURS[verdict]))
    if verdict in (Verdict.DOES_NOT_FIT, Verdict.CLOSE):
        for line in _remedy_lines(found, language):
            console.print(Text(f"  {line}"))


def _figure_lines(found: Estimate, language: str, output_dir: Path) -> Iterator[Text]:
    """Each figure with its source, and below it what it is made of."""
    figures = [("ram", found.host, found.memory.host_peak, found.memory.host_peak.host)]
    if found.device is not None:
        phase = found.memory.device_peak
        figures.insert(0, ("vram", found.device, phase, phase.device))
    width = max(len(text(f"estimate.{name}", language)) for name in ("ram", "vram", "disk", "time"))
    for name, figure, phase, parts in figures:
        source = text(f"estimate.source.{figure.source}", language, n=found.near)
        yield _figure_line(name, formats.size(figure.num_bytes, language), source, width, language)
        largest = sorted(parts, key=lambda part: -part.num_bytes)
        told = (f"{text(f'estimate.part.{part.name}', language)} {_size(part.num_bytes, language)}" for part in largest)
        yield Text(f"  {text(f'estimate.phase.{phase.name}', language)}: {', '.join(told)}", style="dim")
    free = free_disk(output_dir)
    room = "" if free is None else f", {text('console.free', language, size=_size(free, language))}"
    source = text("estimate.source.computed", language) + room
    yield _figure_line("disk", _size(sum(found.disk.values()), language), source, width, language)
    parts_on_disk = (
        f"{text(f'estimate.disk.{name}', language)} {_size(n, language)}" for name, n in found.disk.items()
    )
    yield Text(f"  {', '.join(parts_on_disk)}", style="dim")
    yield Text(f"{text('estimate.time', language):{width}}  {_time_text(found, language)}")


def _figure_line(name: str, amount: str, source: str, width: int, language: str) -> Text:
    return Text(f"{text(f'estimate.{name}', language):{width}}  {amount:>7}  {source}")


def _size(num_bytes: int, language: str) -> str:
    return formats.size(num_bytes, language)


def _time_text(found: Estimate, language: str) -> str:
    time = found.time
    if time.step_s is None:
        return text("estimate.time.unknown", language)
    total = "?" if time.total_s is None else formats.duration(time.total_s, language)
    values = {"step": formats.duration(time.step_s, language), "total": total}
    return text(f"estimate.time.{time.source}", language, **values)


def _device_line(found: Estimate, language: str) -> str:
    space = found.space
    if space is None:
        return text("estimate.device.unknown", language, name=found.machine.name)
    if found.budget_bytes is not None:
        return text("estimate.device.fit", language, budget=formats.size(found.budget_bytes, language))
    values = {"name": found.machine.name, "total": formats.size(space.total_bytes, language)}
    return text("estimate.device", language, **values, free=formats.size(_free(space), language))


def _assumed(found: Estimate, language: str) -> str:
    picture = found.plan.train
    return text(
        "estimate.assumed",
        language,
        batch=picture.count,
        width=picture.width_px,
        height=picture.height_px,
        tokens=picture.caption_tokens,
        params=formats.parameters(found.num_params, language),
        model=text(f"estimate.model.{'read' if found.plan.sizes.is_read else 'released'}", language),
    )


def _verdict_line(found: Estimate, language: str) -> str:
    values = {"needed": formats.size(found.deciding.num_bytes, language)}
    values["free"] = formats.size(_free(found.space), language) if found.space is not None else "?"
    key = f"estimate.verdict.{found.verdict.value}"
    return (
        text(key, language, **values) if found.verdict in (Verdict.CLOSE, Verdict.DOES_NOT_FIT) else text(key, language)
    )


def _remedy_lines(found: Estimate, language: str) -> Iterator[str]:
    assert found.space is not None
    free = _free(found.space)
    for remedy in remedies(found.plan)[:_MOST_REMEDIES]:
        fits = judge(remedy.peak_bytes, free) is Verdict.FITS
        values = {"fix": _fix_text(remedy.fix), "saving": formats.size(remedy.saving_bytes, language)}
        yield text("estimate.remedy.fits" if fits else "estimate.remedy", language, **values)


def _fix_text(fix: Fix) -> str:
    return f"{fix.key}={fix.value if isinstance(fix.value, str) else value_text(fix.value)}"


def _free(space: Space) -> int:
    return space.total_bytes if space.free_bytes is None else space.free_bytes
