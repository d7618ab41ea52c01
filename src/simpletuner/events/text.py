"""Events as sentences. The plain console, `log.txt` and `simpletuner runs logs` print these lines; the live console
prints those above its progress bars. Option names, codes and `key=value` lines are the same in every language.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import singledispatchmethod
from pathlib import Path
from typing import Literal, TypeAlias

from simpletuner.events import formats
from simpletuner.events import types as t
from simpletuner.events.eta import round_remaining
from simpletuner.events.journal import Record
from simpletuner.events.view import RunView
from simpletuner.i18n import catalog, render_problem, text
from simpletuner.problems import ExitCode, Fix, Problem, Severity

STEPS_PER_LINE = 10
SECONDS_PER_LINE = 30.0
NOTABLE_S = 0.05
SILENT_PHASES = frozenset({"train", "validation", "checkpoint", "drift", "evaluation"})  # their own events say it
_BANNER_ROWS = ("model", "data", "precision", "device", "estimate", "plan", "validation", "output")

Icon: TypeAlias = Literal["", "ok", "warning", "error", "saved", "images", "stop"]

_SHORT_BUCKET = "short_bucket"
_PACE_FROM_COUNT, _PACE_FROM_S = 2, 2.0
_SEVERITIES: Mapping[Severity, tuple[t.Level, Icon]] = {
    Severity.ERROR: ("error", "error"),
    Severity.WARNING: ("warning", "warning"),
    Severity.INFO: ("info", ""),
}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line for people. `progress` lines are left out where bars show the same."""

    text: str
    label: str = ""  # of a row of the banner
    level: t.Level = "info"
    icon: Icon = ""
    progress: bool = False


class Narrator:
    """Turns the records of a run into lines, a training line every 10 steps or 30 seconds."""

    def __init__(self, language: str) -> None:
        self._language = language
        self._output_dir = ""
        self._last_line_s = 0.0  # on the clock of the caller: the record's time, or now
        self._last_step_line = 0
        self.view = RunView()

    def tell(self, record: Record) -> list[Line]:
        """The lines of one event; none for most."""
        self.view.apply(record.event)
        lines = self._lines(record.event)
        now_s = record.time.timestamp()
        if isinstance(record.event, t.StepFinished) and not self._is_due(record.event, now_s):
            return []
        if isinstance(record.event, t.RunPhase) and not record.event.finished:
            lines = self.still_working(now_s)
        if lines:
            self._last_line_s = now_s
        return lines

    def still_working(self, now_s: float) -> list[Line]:
        """What the run is at, if nothing was said for 30 seconds; `now_s` is the time of day."""
        if now_s - self._last_line_s < SECONDS_PER_LINE or not (self.view.phases or self.view.validation):
            return []
        self._last_line_s = now_s
        if self.view.validation is not None:
            return [Line(text=self._validating(), progress=True)]
        phase = list(self.view.phases.values())[-1]
        return [Line(text=phase_text(phase, self._language), progress=True)]

    def _is_due(self, event: t.StepFinished, now_s: float) -> bool:
        due = (
            event.step % STEPS_PER_LINE == 0
            or event.step == event.total
            or self._last_step_line == 0
            or now_s - self._last_line_s >= SECONDS_PER_LINE
        )
        if due:
            self._last_step_line = event.step
        return due

    def _validating(self) -> str:
        validation = self.view.validation
        assert validation is not None
        return text("console.validating", self._language, done=self.view.validation_done, total=validation.num_images)

    @singledispatchmethod
    def _lines(self, event: t.Event) -> list[Line]:
        if isinstance(event, t.UnknownEvent):
            return []
        fields = ", ".join(f"{key}={value}" for key, value in t.to_json(event).items() if key != "event")
        return [Line(text=f"{event.name}: {fields}", level="debug")]

    @_lines.register
    def _(self, event: t.RunStarted) -> list[Line]:
        self._output_dir, self._last_step_line = event.output_dir, 0
        parts = [f"SimpleTuner {event.version}", *([event.config_path] if event.config_path else [])]
        parts.append(text("console.run", self._language, run=Path(event.output_dir).name))
        if event.session > 1:
            parts.append(text("console.session", self._language, session=event.session))
        return [Line(text=" · ".join(parts))]

    @_lines.register
    def _(self, event: t.RunPlanned) -> list[Line]:
        rows = dict(zip(_BANNER_ROWS, _banner(event, self._output_dir, self._language), strict=True))
        labels = {name: text(f"console.banner.{name}", self._language) for name, row in rows.items() if row}
        width = max(map(len, labels.values()))
        return [Line(text=row, label=f"  {labels[name]:{width}}  ") for name, row in rows.items() if row]

    @_lines.register
    def _(self, event: t.RunPhase) -> list[Line]:
        if not event.finished or event.key in SILENT_PHASES or is_trivial(event):
            return []
        return [Line(text=phase_text(event, self._language), icon="ok", progress=True)]

    @_lines.register
    def _(self, event: t.StepFinished) -> list[Line]:
        parts = [
            f"train step={event.step}/{event.total}",
            f"loss={self.view.loss or 0.0:.4f}",
            f"lr={event.learning_rate:.1e}",
            f"grad={event.grad_norm:.3g}",
            f"s_it={event.step_seconds:.3g}",
        ]
        if self.view.regularisation_loss is not None:
            parts.insert(2, f"reg={self.view.regularisation_loss:.4f}")
        if event.peak_memory_bytes is not None:
            parts.append(f"vram_gb={event.peak_memory_bytes / 1e9:.1f}")
        if event.step < event.total and (remaining_s := self.view.remaining_s()) is not None:
            parts.append(f"eta={formats.compact_duration(round_remaining(remaining_s))}")
        return [Line(text=" ".join(parts), progress=True)]

    @_lines.register
    def _(self, event: t.RunStopping) -> list[Line]:
        name = {1: "save", 2: "leave"}.get(event.level, "kill")
        again = (
            f" ({text(f'console.again.{name}', self._language)})"
            if event.source == "keyboard" and name != "kill"
            else ""
        )
        return [Line(text=text(f"console.stopping.{name}", self._language) + again, level="warning", icon="stop")]

    @_lines.register
    def _(self, event: t.RunFinished) -> list[Line]:
        return [_ending(event, self.view.resumed, self._language)]

    @_lines.register
    def _(self, event: t.SettingOverridden) -> list[Line]:
        reason = known_text(event.reason, self._language, event.params)
        values = {"option": event.option, "requested": event.requested, "used": event.used, "reason": reason}
        return [Line(text=text("console.overridden", self._language, **values), level="warning", icon="warning")]

    @_lines.register
    def _(self, event: t.ProblemReported) -> list[Line]:
        level, icon = _SEVERITIES[event.problem.severity]
        first, *rest = problem_lines(event.problem, self._language)
        return [Line(text=first, level=level, icon=icon), *(Line(text=f"  {line}", level=level) for line in rest)]

    @_lines.register
    def _(self, event: t.LogLine) -> list[Line]:
        prefix = "" if event.source == "traceback" else f"{event.source}: "
        return [Line(text=f"{prefix}{line}", level=event.level) for line in event.message.split("\n")]

    @_lines.register
    def _(self, event: t.DatasetPlanned) -> list[Line]:
        counts = [plural("images", event.num_images, self._language)]
        if event.num_samples != event.num_images:
            counts.append(plural("samples", event.num_samples, self._language))
        counts.append(plural("buckets", len(event.buckets), self._language))
        lines = [Line(text=f"{event.dataset}: {', '.join([*counts, *_schedule(event, self._language)])}")]
        for drop in event.dropped:
            reason = known_text(f"dropped.{drop.reason}", self._language, {}, fallback=drop.reason)
            left_out = plural("dropped", drop.num_images, self._language)
            which = f" ({_sizes(event.pruned)})" if drop.reason == _SHORT_BUCKET and event.pruned else ""
            lines.append(Line(text=f"{event.dataset}: {left_out}: {reason}{which}", level="warning", icon="warning"))
        if event.filled:
            filled = text("console.filled", self._language, sizes=_sizes(event.filled))
            lines.append(Line(text=f"{event.dataset}: {filled}", level="warning", icon="warning"))
        return lines

    @_lines.register
    def _(self, event: t.AdapterCreated) -> list[Line]:
        values = {
            "kind": event.kind,
            "rank": event.rank,
            "alpha": f"{event.alpha:g}",
            "params": formats.parameters(event.num_params, self._language),
            "modules": event.num_modules,
            "targets": ", ".join(dict.fromkeys(_last_name(target) for target in event.targets)),
        }
        key = "console.adapter" if event.kind == "LoRA" else "console.adapter.other"
        return [Line(text=text(key, self._language, **values))]

    @_lines.register
    def _(self, event: t.CheckpointSaved) -> list[Line]:
        key = "console.weights" if event.final else "console.checkpoint"
        size = formats.size(event.bytes, self._language)
        return [Line(text=text(key, self._language, step=event.step, path=event.path, size=size), icon="saved")]

    @_lines.register
    def _(self, event: t.MemoryMeasured) -> list[Line]:
        peak = event.device_bytes if event.device_bytes is not None else event.host_bytes
        if event.phase != "training" or peak is None:
            return []
        values = {"size": formats.size(peak, self._language)}
        if event.estimated_bytes is None:
            return [Line(text=text("console.memory", self._language, **values))]
        values["expected"] = formats.size(event.estimated_bytes, self._language)
        return [Line(text=text("console.memory.estimated", self._language, **values))]

    @_lines.register
    def _(self, event: t.EvaluationFinished) -> list[Line]:
        name = "eval-ema" if event.is_averaged else "eval"
        losses = " ".join(f"{one.dataset}={one.loss:.4f}" for one in event.losses)
        return [Line(text=f"{name} step={event.step} {losses} s={event.seconds:.3g}")]

    @_lines.register
    def _(self, event: t.ValidationDrift) -> list[Line]:
        values = {
            "step": event.step,
            "drift": formats.significant(event.drift, self._language),
            "base": formats.significant(event.base_drift, self._language),
            "few": event.few_steps,
            "many": event.many_steps,
            "images": plural("images", event.num_images, self._language),
            "duration": formats.duration(event.seconds, self._language),
        }
        key = "console.drift.base" if event.step == 0 else "console.drift"
        return [Line(text=text(key, self._language, **values), icon="images")]

    @_lines.register
    def _(self, event: t.ValidationFinished) -> list[Line]:
        key = "console.validated.base" if event.step == 0 else "console.validated"
        values = {
            "step": event.step,
            "images": plural("images", event.num_images, self._language),
            "duration": formats.duration(event.seconds, self._language),
        }
        sheet = f" · {event.contact_sheet}" if event.contact_sheet else ""
        return [Line(text=text(key, self._language, **values) + sheet, icon="images")]


class LogSink:
    """Writes `log.txt`: every line with its time and level, in English so that anybody can be asked about it."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be opened."""
        self._stream = path.open("a", encoding="utf-8", errors="replace", newline="\n")
        self._narrator = Narrator("en")

    def write(self, record: Record) -> None:
        """Append the lines of one event; they are readable at once."""
        lines = [format_line(line, record.time.timestamp()) for line in self._narrator.tell(record)]
        if lines:
            self._stream.write("".join(f"{line}\n" for line in lines))
            self._stream.flush()

    def tick(self) -> None:
        """Nothing: silence needs no log line."""

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def format_line(line: Line, time_s: float) -> str:
    """ "2026-03-12T10:58:03Z INFO  checkpoint 800 ..."."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))
    return f"{moment} {line.level.upper():7} {line.label}{line.text}".rstrip()


def problem_lines(problem: Problem, language: str) -> list[str]:
    """A problem as lines: code and place, what is wrong, what to do. Never fails, whatever the problem carries."""
    try:
        title, hint = render_problem(problem, language)
    except (KeyError, IndexError, ValueError):
        title, hint = f"problem.{problem.code}.title", None
    if title == f"problem.{problem.code}.title":  # of a newer version: no text here
        title = ", ".join(f"{key}={value}" for key, value in problem.params.items()) or problem.code
    head = "  ".join([problem.code, *([problem.origin] if problem.origin else [])])
    fixes = [text("console.fix", language, fix=_fix_text(fix)) for fix in problem.fixes]
    return [head, *title.split("\n"), *(hint.split("\n") if hint else []), *fixes]


def _fix_text(fix: Fix) -> str:
    value = fix.value if isinstance(fix.value, str) else json.dumps(fix.value, ensure_ascii=False, default=str)
    return f"{fix.key} {value}" if fix.key.startswith(("--", "simpletuner")) else f"{fix.key}={value}"


def _last_name(target: str) -> str:
    """ "to_q" of "layers.*.attention.to_q", "to_out.0" of "layers.*.attention.to_out.0"."""
    *_, before, last = ["", *target.split(".")]
    return f"{before}.{last}" if last.isdigit() and before else last


def phase_label(key: str, language: str) -> str:
    """The name of a phase."""
    return known_text(f"phase.{key}", language, {}, fallback=key)


def phase_text(phase: t.RunPhase, language: str) -> str:
    """ "latents: 12/24 images, 3.1 s"."""
    figures = [phase_amount(phase, language), formats.duration(phase.elapsed_s, language)]
    figures[1:1] = phase_news(phase, language) if phase.finished else phase_pace(phase, phase.elapsed_s, language)
    return f"{phase_label(phase.key, language)}: {', '.join(figure for figure in figures if figure)}"


def is_trivial(phase: t.RunPhase) -> bool:
    """Nothing was counted and no time passed: a finished phase of which there is nothing to say."""
    return phase.elapsed_s < NOTABLE_S and not phase.done and not phase.total


def phase_amount(phase: t.RunPhase, language: str, *, with_unit: bool = True) -> str:
    """ "12/24 images", "1.2 GB/12 GB"; empty if nothing is counted. A unit that only repeats the label is left out."""
    if phase.unit == "bytes" and (phase.done or phase.total):
        sizes = [phase.done, *([phase.total] if phase.total else [])]
        return "/".join(formats.size(number, language) for number in sizes)
    if phase.total is None:
        return ""
    unit = (
        known_text(f"console.unit.{phase.unit}", language, {}, fallback=phase.unit) if phase.unit and with_unit else ""
    )
    return f"{phase.done}/{phase.total} {'' if unit == phase_label(phase.key, language) else unit}".rstrip()


def phase_pace(phase: t.RunPhase, elapsed_s: float, language: str) -> list[str]:
    """ "23/s" and "3 m left", once there is something to go by; what a cache had does not count."""
    made = phase.done - phase.before
    if phase.total is None or made < _PACE_FROM_COUNT or elapsed_s < _PACE_FROM_S:
        return []
    rate = made / elapsed_s
    speed = formats.size(rate, language) if phase.unit == "bytes" else formats.significant(rate, language)
    left_s = (phase.total - phase.done) / rate
    if left_s <= 0:
        return [f"{speed}/s"]
    duration = formats.rounded_duration(round_remaining(left_s))
    return [f"{speed}/s", text("console.left", language, duration=duration)]


def phase_news(phase: t.RunPhase, language: str) -> list[str]:
    """ "new: 3" or "nothing new" of a finished phase that found some of its work done before; not of bytes."""
    if phase.before == 0 or phase.unit == "bytes":
        return []
    made = phase.done - phase.before
    return [text("console.phase.new", language, n=made) if made else text("console.phase.nothing_new", language)]


def plural(noun: str, count: int, language: str) -> str:
    """ "1 image", "24 images": the texts `count.<noun>.one` and `count.<noun>.other`."""
    return text(f"count.{noun}.{'one' if count == 1 else 'other'}", language, n=count)


def known_text(key: str, language: str, params: Mapping[str, object], *, fallback: str | None = None) -> str:
    """The text of a key that another layer or another version chose; `fallback` (or the key) if there is none."""
    if key not in catalog("en"):
        return key if fallback is None else fallback
    try:
        return text(key, language, **params)
    except (KeyError, IndexError, ValueError):
        return catalog(language).get(key, key)


def _schedule(dataset: t.DatasetPlanned, language: str) -> list[str]:
    """When a dataset takes part, where that is not all the time."""
    told = (
        ("console.schedule.start_epoch", dataset.start_epoch if dataset.start_epoch > 1 else None),
        ("console.schedule.start_step", dataset.start_step if dataset.start_step > 1 else None),
        ("console.schedule.end_epoch", dataset.end_epoch),
        ("console.schedule.end_step", dataset.end_step),
        ("console.schedule.steps_of_epoch", dataset.steps_of_epoch),
    )
    return [text(key, language, n=number) for key, number in told if number is not None]


def _sizes(buckets: Iterable[t.BucketCount]) -> str:
    """ "192x320: 1, 320x192: 3"."""
    return ", ".join(f"{b.width_px}x{b.height_px}: {b.num_samples}" for b in buckets)


def _banner(plan: t.RunPlanned, output_dir: str, language: str) -> list[str]:
    """The rows of _BANNER_ROWS; an empty one is left out."""
    device = plan.device_name if plan.device == "cpu" else f"{plan.device_name} ({plan.device})"
    if plan.memory_total_bytes:
        device += f" · {formats.size(plan.memory_total_bytes, language)}"
    if plan.memory_free_bytes:
        device += f" ({text('console.free', language, size=formats.size(plan.memory_free_bytes, language))})"
    epochs = plural("epochs", plan.num_epochs, language)
    if plan.steps_per_epoch not in (None, plan.total_steps):
        epochs = text("console.per_epoch", language, epochs=epochs, n=plan.steps_per_epoch)
    steps = [f"{plural('steps', plan.total_steps, language)} ({epochs})"]
    if plan.start_step:
        steps.append(text("console.from_step", language, step=plan.start_step))
    if plan.validation_step_interval:
        steps.append(text("console.validation_every", language, n=plan.validation_step_interval))
    if plan.checkpoint_step_interval:
        steps.append(text("console.checkpoint_every", language, n=plan.checkpoint_step_interval))
    data = [
        plural("datasets", plan.num_datasets, language),
        plural("images", plan.num_images, language),
        plural("buckets", plan.num_buckets, language),
        text("console.batch", language, n=plan.effective_batch_size),
    ]
    checkpointing = [text("console.gradient_checkpointing", language)] if plan.gradient_checkpointing else []
    return [
        f"{plan.model} · {plan.adapter}",
        " · ".join(data),
        " · ".join([plan.precision, *checkpointing]),
        device,
        _estimate(plan, language),
        " · ".join(steps),
        _sampling(plan, language),
        output_dir,
    ]


def _sampling(plan: t.RunPlanned, language: str) -> str:
    """How validation images are made; guidance as Z-Image and as others count it."""
    guidance, shift = plan.validation_guidance, plan.validation_sampling_shift
    if plan.validation_num_inference_steps is None or guidance is None or shift is None:
        return ""
    values = {"guidance": f"{guidance:g}", "usual": f"{1 + guidance:g}", "shift": f"{shift:g}"}
    steps = plural("steps", plan.validation_num_inference_steps, language)
    return f"{steps} · {text('console.sampling', language, **values)}"


def _estimate(plan: t.RunPlanned, language: str) -> str:
    """Memory at its height and time, as far as they are estimated."""
    if plan.estimated_bytes is None or plan.estimate_source is None:
        return ""
    source = text(f"console.estimate.{plan.estimate_source}", language)
    told = text("console.estimated", language, size=formats.size(plan.estimated_bytes, language), source=source)
    seconds = plan.estimated_seconds
    return told if seconds is None else f"{told} · ≈ {formats.rounded_duration(round_remaining(seconds))}"


def _ending(event: t.RunFinished, resumed: t.RunResumed | None, language: str) -> Line:
    values = {"step": event.step, "duration": formats.duration(event.seconds, language), "reason": event.reason or "?"}
    if event.state == "done":
        key = "console.done.cached" if event.reason == "cache-only" else "console.done"
        return Line(text=text(key, language, **values), icon="ok")
    if event.state == "failed":
        return Line(text=text("console.failed", language, **values), level="error", icon="error")
    saved = event.exit_code == ExitCode.STOPPED
    how = "saved" if saved else "left" if event.step else "early"
    if resumed is not None and resumed.step == event.step and not saved:  # no step was lost
        how, values = "resumed", {**values, "checkpoint": resumed.path}
    return Line(text=text(f"console.stopped.{how}", language, **values), icon="stop")
