"""What follows from other values: the flavour's defaults, the length of the run, derived folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from simpletuner.catalog.families import CUSTOM_FLAVOUR, DEFAULT_FLAVOUR, FLAVOURS, REPOSITORY_SPELLINGS
from simpletuner.catalog.families import flavour_of_model as flavour_of_known_model
from simpletuner.catalog.schedules import SCHEDULES
from simpletuner.config.paths import fill_package, fill_path, path_exists
from simpletuner.config.root import options
from simpletuner.config.settings import DEFAULT_ORIGIN, Origin, OriginKind, Setting
from simpletuner.problems import Fix, Problem, Severity

Settings = Mapping[str, Setting]


@dataclass(frozen=True, kw_only=True)
class Derived:
    """Settings with everything that follows from them, and what the user should know about it."""

    settings: Settings
    notices: tuple[Problem, ...] = ()


def derive(chosen: Settings, *, config_path: Path | None, cwd: Path) -> Derived:
    """Add what follows from `chosen` (converted settings by option name). Later steps see what earlier ones set."""
    settings = dict(chosen)
    notices: list[Problem] = []
    for step in (_model_location, _flavour, _length, _schedule, _alpha):
        step(settings, notices)
    _targets(settings, notices, cwd)
    _folders(settings, config_path, cwd)
    return Derived(settings=settings, notices=tuple(notices))


def _model_location(settings: dict[str, Setting], notices: list[Problem]) -> None:
    """Hub ids in the spelling that exists. A folder of that name stays a folder."""
    for name, option in options().items():
        setting = settings.get(name)
        if option.opt.holds != "location" or setting is None:
            continue
        written = fill_package(str(setting.value))
        known = None if path_exists(Path(written)) else REPOSITORY_SPELLINGS.get(written.lower())
        settings[name] = replace(setting, value=known or written)
        if known is not None and known.lower() != written.lower():
            params = {"key": name, "value": written, "used": known}
            notices.append(_notice("I-MODEL-RENAMED", setting, params))


def _flavour(settings: dict[str, Setting], notices: list[Problem]) -> None:
    location = settings.get("pretrained_model_name_or_path")
    if "model_flavour" in settings:
        name = str(settings["model_flavour"].value)
    elif location is None:
        name = DEFAULT_FLAVOUR
    else:
        name = flavour_of_known_model(str(location.value)) or _guessed_flavour(location, notices)
        settings["model_flavour"] = Setting(key="model_flavour", value=name, origin=location.origin)
    flavour = FLAVOURS[name]
    origin = Origin(kind=OriginKind.FLAVOUR, place=name)
    wants_assistant = not _is_on(settings, "disable_assistant_lora") and "assistant_lora_path" not in settings
    for field in fields(flavour):
        value = getattr(flavour, field.name)
        if field.name not in options() or value is None or field.name in settings:
            continue
        if field.name.startswith("assistant_") and not wants_assistant:
            continue
        settings[field.name] = Setting(key=field.name, value=value, origin=origin)
    settings.setdefault(
        "pretrained_model_name_or_path",
        Setting(key="pretrained_model_name_or_path", value=fill_package(flavour.repository), origin=origin),
    )


def _guessed_flavour(location: Setting, notices: list[Problem]) -> str:
    name = DEFAULT_FLAVOUR if "turbo" in Path(str(location.value)).name.lower() else CUSTOM_FLAVOUR
    params = {"value": location.value, "flavour": name}
    notices.append(_notice("W-FLAVOUR-GUESSED", location, params, severity=Severity.WARNING, key="model_flavour"))
    return name


def _length(settings: dict[str, Setting], notices: list[Problem]) -> None:
    """Steps or epochs: the one of higher precedence wins; of none, one epoch."""
    steps, epochs = settings.get("max_train_steps"), settings.get("num_train_epochs")
    if epochs is None and (steps is None or steps.value == 0):
        settings["num_train_epochs"] = Setting(key="num_train_epochs", value=1, origin=DEFAULT_ORIGIN)
    if steps is None or epochs is None or not steps.value or not epochs.value:
        return
    if steps.origin.kind.rank == epochs.origin.kind.rank:
        return  # a rule reports it
    winner, loser = sorted((steps, epochs), key=lambda setting: -setting.origin.kind.rank)
    settings[loser.key] = replace(loser, value=0, origin=winner.origin)
    params = {"winner": winner.key, "loser": loser.key, "value": loser.value}
    notices.append(_notice("I-LENGTH-OVERRIDDEN", winner, params))


def _schedule(settings: dict[str, Setting], notices: list[Problem]) -> None:
    schedule, warmup = settings.get("lr_scheduler"), settings.get("lr_warmup_steps")
    if schedule is None or warmup is None or not warmup.value:
        return
    if schedule.value == "constant" and not SCHEDULES["constant"].warms_up:
        settings["lr_scheduler"] = replace(schedule, value="constant_with_warmup")
        notices.append(_notice("I-SCHEDULE-WARMUP", schedule, {"steps": warmup.value}))


def _alpha(settings: dict[str, Setting], notices: list[Problem]) -> None:
    rank = settings["lora_rank"].value if "lora_rank" in settings else options()["lora_rank"].default
    if isinstance(rank, int) and rank > 0:
        settings.setdefault("lora_alpha", Setting(key="lora_alpha", value=rank, origin=DEFAULT_ORIGIN))


def _targets(settings: dict[str, Setting], notices: list[Problem], cwd: Path) -> None:
    """A JSON file in place of the list that it holds."""
    setting = settings.get("peft_lora_target_modules")
    if setting is None or not isinstance(setting.value, tuple) or len(setting.value) != 1:
        return
    (written,) = setting.value
    if not str(written).endswith(".json"):
        return
    path = Path(fill_path(str(written), cwd))
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        names = None
    if isinstance(names, list) and names and all(isinstance(name, str) and name for name in names):
        settings[setting.key] = replace(setting, value=tuple(names))
    else:
        params = {"path": written}
        notices.append(_notice("E-LORA-TARGETS-FILE", setting, params, severity=Severity.ERROR))


def _folders(settings: dict[str, Setting], config_path: Path | None, cwd: Path) -> None:
    def default(name: str, value: Callable[[], str]) -> None:
        if name not in settings:
            settings[name] = Setting(key=name, value=value(), origin=DEFAULT_ORIGIN)

    default("output_dir", lambda: str(options()["output_dir"].default))
    default("cache_dir", lambda: f"{settings['output_dir'].value}/cache")
    beside = config_path.parent if config_path is not None else cwd / "config"
    default("data_backend_config", lambda: str(beside / "multidatabackend.json"))
    if "lora_type" in settings and settings["lora_type"].value == "lycoris":
        default("lycoris_config", lambda: str(beside / "lycoris_config.json"))
    for name, option in options().items():
        if option.opt.holds == "path" and name in settings:
            settings[name] = replace(settings[name], value=fill_path(str(settings[name].value), cwd))


def _is_on(settings: Settings, name: str) -> bool:
    return name in settings and settings[name].value is True


def _notice(
    code: str,
    setting: Setting,
    params: Mapping[str, object],
    *,
    severity: Severity = Severity.INFO,
    key: str | None = None,
    fixes: tuple[Fix, ...] = (),
) -> Problem:
    path = f"/{key or setting.key}"
    return Problem(code=code, severity=severity, params=params, origin=setting.origin.place, path=path, fixes=fixes)
