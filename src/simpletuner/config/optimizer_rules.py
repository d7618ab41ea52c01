"""Rules about the optimizer, its learning rate and its schedule, and whether this machine can run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from simpletuner.catalog.optimizers import ANY_DEVICE, OPTIMIZERS, REFUSED_OPTIMIZERS
from simpletuner.catalog.schedules import SCHEDULES
from simpletuner.config.libraries import missing_library
from simpletuner.config.optimizer_arguments import read_arguments
from simpletuner.config.root import Config
from simpletuner.config.rule import Origins, Rule, limit, rule, short_fix, was_changed, was_set
from simpletuner.hardware.probe import device_type
from simpletuner.problems import Fix, Problem, Severity

_WARNING = Severity.WARNING


@rule("optimizer")
def optimizer_is_to_be_had(c: Config, origins: Origins) -> Problem | None:
    refused = REFUSED_OPTIMIZERS.get(c.optimizer.optimizer)
    if refused is None:
        return None
    params = {"optimizer": refused.name, "instead": refused.instead}
    fixes = (Fix(key="optimizer", value=refused.instead),)
    return Problem(code=f"E-OPTIMIZER-{refused.why}", params=params, fixes=fixes)


@rule("optimizer_config", "optimizer")
def arguments_are_the_optimizers(c: Config, origins: Origins) -> Sequence[Problem]:
    optimizer = OPTIMIZERS.get(c.optimizer.optimizer)
    return () if optimizer is None else read_arguments(c.optimizer.optimizer_config, optimizer)[1]


@rule("optimizer_beta1", "optimizer_beta2", "optimizer")
def betas_come_together(c: Config, origins: Origins) -> Problem | None:
    betas = {"optimizer_beta1": c.optimizer.optimizer_beta1, "optimizer_beta2": c.optimizer.optimizer_beta2}
    given = [name for name, value in betas.items() if value is not None]
    optimizer = OPTIMIZERS.get(c.optimizer.optimizer)
    if len(given) != 1 or optimizer is None or not optimizer.betas:
        return None
    missing = next(name for name in betas if name not in given)
    fixes = (Fix(key=missing, value=optimizer.betas[list(betas).index(missing)]),)
    return Problem(code="E-BETAS", params={"given": given[0], "missing": missing}, path=f"/{given[0]}", fixes=fixes)


@rule("optimizer_beta1", "optimizer_beta2", "adam_epsilon", "optimizer")
def optimizer_reads_what_is_set(c: Config, origins: Origins) -> Problem | None:
    optimizer = OPTIMIZERS.get(c.optimizer.optimizer)
    if optimizer is None:
        return None
    reads = {
        "optimizer_beta1": bool(optimizer.betas),
        "optimizer_beta2": bool(optimizer.betas),
        "adam_epsilon": optimizer.epsilon,
    }
    return _unread("W-OPTIMIZER-UNREAD", reads, {"optimizer": optimizer.name}, c, origins)


@rule("learning_rate", "optimizer")
def learning_rate_is_plausible(c: Config, origins: Origins) -> Problem | None:
    optimizer, rate = OPTIMIZERS.get(c.optimizer.optimizer), c.optimizer.learning_rate
    if optimizer is None or optimizer.rates.low <= rate <= optimizer.rates.high:
        return None
    rates = optimizer.rates
    code, bound = ("HIGH", rates.high) if rate > rates.high else ("LOW", rates.low)
    params = {"value": f"{rate:g}", "bound": f"{bound:g}", "optimizer": optimizer.name}
    # Nobody chose the default for this optimizer: what wants mending is that none was chosen.
    path = "/learning_rate" if was_set("learning_rate", origins) else "/optimizer"
    fixes = (short_fix("learning_rate", rates.usual),)
    return Problem(code=f"W-LEARNING-RATE-{code}", severity=_WARNING, params=params, path=path, fixes=fixes)


@rule("lr_warmup_steps", "lr_end", "lr_num_cycles", "lr_power", "lr_scheduler")
def schedule_reads_what_is_set(c: Config, origins: Origins) -> Problem | None:
    schedule = SCHEDULES[c.optimizer.lr_scheduler]
    reads = {
        "lr_warmup_steps": schedule.warms_up or not c.optimizer.lr_warmup_steps,
        "lr_end": schedule.ends,
        "lr_num_cycles": schedule.cycles,
        "lr_power": schedule.power,
    }
    return _unread("W-SCHEDULE-UNREAD", reads, {"schedule": schedule.name}, c, origins)


@rule("lr_scheduler", "optimizer")
def averaging_replaces_a_falling_rate(c: Config, origins: Origins) -> Problem | None:
    optimizer, schedule = OPTIMIZERS.get(c.optimizer.optimizer), SCHEDULES[c.optimizer.lr_scheduler]
    if optimizer is None or not optimizer.averages_weights or not schedule.ends:
        return None
    params = {"optimizer": optimizer.name, "schedule": schedule.name}
    fixes = (Fix(key="lr_scheduler", value="constant_with_warmup"),)
    return Problem(code="W-OPTIMIZER-SCHEDULE", severity=_WARNING, params=params, fixes=fixes)


@rule("use_ema", "optimizer")
def one_average_is_enough(c: Config, origins: Origins) -> Problem | None:
    optimizer = OPTIMIZERS.get(c.optimizer.optimizer)
    if optimizer is None or not optimizer.averages_weights or not c.optimizer.use_ema:
        return None
    params = {"optimizer": optimizer.name}
    return Problem(code="E-EMA-TWICE", params=params, fixes=(Fix(key="use_ema", value=False),))


@rule(
    "ema_decay",
    "ema_update_interval",
    "ema_warmup_steps",
    "ema_device",
    "ema_cpu_only",
    "ema_foreach_disable",
    "ema_validation",
    "use_ema",
)
def ema_reads_what_is_set(c: Config, origins: Origins) -> Problem | None:
    names = ("ema_decay", "ema_update_interval", "ema_warmup_steps", "ema_device", "ema_cpu_only")
    reads = dict.fromkeys((*names, "ema_foreach_disable", "ema_validation"), c.optimizer.use_ema)
    return _unread("W-EMA-UNREAD", reads, {}, c, origins)


@limit("optimizer")
def library_is_installed(c: Config, origins: Origins) -> Problem | None:
    optimizer = OPTIMIZERS.get(c.optimizer.optimizer)
    if optimizer is None:
        return None
    own = "lion" if "lion" in optimizer.name else "adamw_bf16"
    return missing_library("optimizer", optimizer.name, optimizer.library, instead=own)


@limit("optimizer", "device")
def optimizer_runs_on_the_device(c: Config, origins: Origins) -> Problem | None:
    optimizer = OPTIMIZERS.get(c.optimizer.optimizer)
    if optimizer is None or optimizer.devices == ANY_DEVICE:
        return None
    device = device_type(c.run.device)
    if device in optimizer.devices:
        return None
    params = {"optimizer": optimizer.name, "devices": ", ".join(optimizer.devices), "device": device}
    return Problem(code="E-OPTIMIZER-DEVICE", params=params, fixes=(Fix(key="optimizer", value=optimizer.instead),))


def _unread(
    code: str, reads: Mapping[str, bool], params: Mapping[str, object], c: Config, origins: Origins
) -> Problem | None:
    """The warning `code` about the options that somebody changed and that are not read; `reads`: option -> is it."""
    unread = [name for name, is_read in reads.items() if not is_read and was_changed(c, name, origins)]
    if not unread:
        return None
    told = {"unread": ", ".join(unread), **params}
    return Problem(code=code, severity=_WARNING, params=told, path=f"/{unread[0]}")


OPTIMIZER_RULES = tuple(value for value in list(globals().values()) if isinstance(value, Rule))
