"""Rules about the law of the noise levels, the noise, the loss and scheduled sampling."""

from __future__ import annotations

from collections.abc import Mapping

from simpletuner.config.number_list import parse_numbers
from simpletuner.config.root import Config
from simpletuner.config.rule import Origins, Rule, rule, was_changed
from simpletuner.config.sections.flow import FlowSection
from simpletuner.problems import Fix, Problem, Severity

_WARNING = Severity.WARNING
_NO_LAW = "flow_sigmoid_scale"
_LARGEST_TIMESTEP = 1000


@rule(
    "flow_use_uniform_schedule",
    "flow_use_beta_schedule",
    "flow_cubic_schedule_weights",
    "flow_custom_timesteps",
)
def one_law_at_a_time(c: Config, origins: Origins) -> Problem | None:
    laws = _laws(c.flow)
    if len(laws) < 2:
        return None
    first, second, *_ = laws
    fixes = tuple(Fix(key=name, value=_off(name)) for name in (second, first))
    return Problem(code="E-SIGMA-LAW-TWICE", params={"first": first, "second": second}, path=f"/{second}", fixes=fixes)


@rule("flow_cubic_schedule_weights")
def weights_make_a_density(c: Config, origins: Origins) -> Problem | None:
    text = c.flow.flow_cubic_schedule_weights
    if text is None:
        return None
    numbers = _numbers(text)
    if numbers is not None and len(numbers) >= 2 and min(numbers) >= 0 and max(numbers) > 0:
        return None
    return Problem(code="E-CUBIC-WEIGHTS", params={"value": text})


@rule("flow_custom_timesteps")
def timesteps_are_levels(c: Config, origins: Origins) -> Problem | None:
    text = c.flow.flow_custom_timesteps
    if text is None:
        return None
    numbers = _numbers(text)
    if numbers and min(numbers) > 0 and max(numbers) <= _LARGEST_TIMESTEP:
        return None
    return Problem(code="E-CUSTOM-TIMESTEPS", params={"value": text})


@rule(
    "flow_sigmoid_scale",
    "flow_beta_schedule_alpha",
    "flow_beta_schedule_beta",
    "flow_timesteps_mode",
    "flow_schedule_shift",
    "flow_schedule_auto_shift",
    "flow_use_uniform_schedule",
    "flow_use_beta_schedule",
    "flow_cubic_schedule_weights",
    "flow_custom_timesteps",
)
def law_reads_what_is_set(c: Config, origins: Origins) -> Problem | None:
    laws = _laws(c.flow)
    if len(laws) > 1:  # told already
        return None
    law = laws[0] if laws else _NO_LAW
    readers = {
        "flow_sigmoid_scale": law == _NO_LAW,
        "flow_beta_schedule_alpha": law == "flow_use_beta_schedule",
        "flow_beta_schedule_beta": law == "flow_use_beta_schedule",
        "flow_timesteps_mode": law == "flow_custom_timesteps",
        "flow_schedule_shift": law != "flow_custom_timesteps",
        "flow_schedule_auto_shift": law != "flow_custom_timesteps",
    }
    unread = [name for name, is_read in readers.items() if not is_read and was_changed(c, name, origins)]
    if not unread:
        return None
    params = {"unread": ", ".join(unread), "law": law}
    return Problem(code="W-SIGMA-UNREAD", severity=_WARNING, params=params, path=f"/{unread[0]}")


@rule(
    "huber_schedule",
    "huber_c",
    "input_perturbation_steps",
    "noise_offset",
    "noise_offset_probability",
    "loss_type",
    "input_perturbation",
    "offset_noise",
)
def loss_and_noise_read_what_is_set(c: Config, origins: Origins) -> Problem | None:
    flow = c.flow
    readers = {
        "huber_schedule": ("loss_type=huber", flow.loss_type != "l2"),
        "huber_c": ("loss_type=huber", flow.loss_type != "l2"),
        "input_perturbation_steps": ("input_perturbation", flow.input_perturbation > 0),
        "noise_offset": ("offset_noise=true", flow.offset_noise),
        "noise_offset_probability": ("offset_noise=true", flow.offset_noise),
    }
    return _unread(readers, c, origins)


@rule(
    "scheduled_sampling_max_step_offset",
    "scheduled_sampling_probability",
    "scheduled_sampling_ramp_steps",
    "scheduled_sampling_prob_start",
    "scheduled_sampling_prob_end",
)
def rollouts_happen(c: Config, origins: Origins) -> Problem | None:
    """Somebody asks for rollouts, and there are none."""
    options = c.experimental
    share = options.scheduled_sampling_probability
    if options.scheduled_sampling_ramp_steps:
        share = max(options.scheduled_sampling_prob_start, options.scheduled_sampling_prob_end)
    if options.scheduled_sampling_max_step_offset and not share:
        fixes = (Fix(key="scheduled_sampling_probability", value=0.5),)
        if options.scheduled_sampling_ramp_steps:
            fixes = (Fix(key="scheduled_sampling_prob_end", value=0.5),)
        return Problem(code="W-ROLLOUT-NEVER", severity=_WARNING, params={"needs": fixes[0].key}, fixes=fixes)
    asked = options.scheduled_sampling_probability > 0 or options.scheduled_sampling_ramp_steps > 0
    if asked and not options.scheduled_sampling_max_step_offset:
        fixes = (Fix(key="scheduled_sampling_max_step_offset", value=2),)
        params = {"needs": "scheduled_sampling_max_step_offset"}
        return Problem(code="W-ROLLOUT-NEVER", severity=_WARNING, params=params, fixes=fixes)
    return None


@rule(
    "scheduled_sampling_probability",
    "scheduled_sampling_prob_start",
    "scheduled_sampling_prob_end",
    "scheduled_sampling_ramp_shape",
    "scheduled_sampling_order",
    "scheduled_sampling_ramp_steps",
    "scheduled_sampling_sampler",
)
def rollouts_read_what_is_set(c: Config, origins: Origins) -> Problem | None:
    options = c.experimental
    has_ramp = options.scheduled_sampling_ramp_steps > 0
    ramp = "scheduled_sampling_ramp_steps"
    readers = {
        "scheduled_sampling_probability": (f"{ramp}=0", not has_ramp),
        "scheduled_sampling_prob_start": (ramp, has_ramp),
        "scheduled_sampling_prob_end": (ramp, has_ramp),
        "scheduled_sampling_ramp_shape": (ramp, has_ramp),
        "scheduled_sampling_order": (
            "scheduled_sampling_sampler=unipc",
            options.scheduled_sampling_sampler != "euler",
        ),
    }
    return _unread(readers, c, origins)


def _laws(flow: FlowSection) -> list[str]:
    """The options that ask for another law than the sigmoid."""
    asked = {
        "flow_use_uniform_schedule": flow.flow_use_uniform_schedule,
        "flow_use_beta_schedule": flow.flow_use_beta_schedule,
        "flow_cubic_schedule_weights": flow.flow_cubic_schedule_weights is not None,
        "flow_custom_timesteps": flow.flow_custom_timesteps is not None,
    }
    return [name for name, is_asked in asked.items() if is_asked]


def _unread(readers: Mapping[str, tuple[str, bool]], c: Config, origins: Origins) -> Problem | None:
    """A warning of the options that somebody changed and that are not read; `readers`: option -> (what it takes to
    read it, whether that is so)."""
    unread = {
        name: reader for name, (reader, is_read) in readers.items() if not is_read and was_changed(c, name, origins)
    }
    if not unread:
        return None
    params = {"unread": ", ".join(unread), "readers": ", ".join(dict.fromkeys(unread.values()))}
    return Problem(code="W-FLOW-UNREAD", severity=_WARNING, params=params, path=f"/{next(iter(unread))}")


def _off(name: str) -> object:
    return False if name.startswith("flow_use_") else None


def _numbers(text: str) -> tuple[float, ...] | None:
    try:
        return parse_numbers(text)
    except ValueError:
        return None


FLOW_RULES = tuple(value for value in list(globals().values()) if isinstance(value, Rule))
