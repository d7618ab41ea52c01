"""Rules that concern the meaning of options or more than one of them.

A rule says what is wrong; a limit says what this version knows by name but cannot do. Both are checked at load time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from simpletuner.catalog.families import ASSISTANT_REPOSITORY, BASE_REPOSITORY, FLAVOURS, TURBO_REPOSITORY
from simpletuner.config.flow_rules import FLOW_RULES
from simpletuner.config.lycoris_rules import ADAPTER_RULES
from simpletuner.config.offload_rules import OFFLOAD_RULES
from simpletuner.config.optimizer_rules import OPTIMIZER_RULES
from simpletuner.config.paths import is_file
from simpletuner.config.placeholder import SUBJECT_PLACEHOLDER, has_placeholder
from simpletuner.config.precision_rules import PRECISION_RULES
from simpletuner.config.root import Config
from simpletuner.config.rule import Origins, Rule, limit, place_of, rule, short_fix, was_changed
from simpletuner.config.sections.adapter import has_assistant
from simpletuner.config.size_rules import GLOBAL_LIMIT_MEGAPIXELS, Sizes, broken_size_rule
from simpletuner.config.sizes import is_bytes
from simpletuner.problems import Fix, Problem, Severity

_WARNING = Severity.WARNING


def broken_rules(config: Config, origins: Origins, invalid: frozenset[str]) -> tuple[list[Problem], list[Problem]]:
    """(problems of the rules that `config` breaks, those of the limits that it exceeds)."""
    found: tuple[list[Problem], list[Problem]] = ([], [])
    for known in RULES:
        for problem in () if invalid & set(known.names) else known.problems(config, origins):
            name = problem.path[1:] if problem.path else known.names[0]
            told = replace(problem, origin=problem.origin or place_of((name, *known.names), origins), path=f"/{name}")
            found[known.is_limit and told.severity is Severity.ERROR].append(told)
    return found


# How long and how fast


@rule("max_train_steps", "num_train_epochs")
def run_has_one_length(c: Config, origins: Origins) -> Problem | None:
    steps, epochs = c.run.max_train_steps, c.run.num_train_epochs
    if steps and epochs:
        fixes = (Fix(key="num_train_epochs", value=0), Fix(key="max_train_steps", value=0))
        return Problem(code="E-LENGTH-TWICE", params={"steps": steps, "epochs": epochs}, fixes=fixes)
    return None if steps or epochs else Problem(code="E-LENGTH-NONE", fixes=(Fix(key="num_train_epochs", value=1),))


# The model and its flavour


@rule("model_flavour", "pretrained_model_name_or_path")
def flavour_fits_the_repository(c: Config, origins: Origins) -> Problem | None:
    location, flavour = c.model.pretrained_model_name_or_path, FLAVOURS[c.model.model_flavour]
    if location not in (BASE_REPOSITORY, TURBO_REPOSITORY) or location == flavour.repository:
        return None
    params = {"flavour": flavour.name, "location": location, "expected": flavour.repository}
    return Problem(code="W-FLAVOUR-REPOSITORY", severity=_WARNING, params=params)


@rule("disable_assistant_lora", "model_flavour", "assistant_lora_path")
def turbo_has_its_assistant(c: Config, origins: Origins) -> Problem | None:
    flavour = FLAVOURS[c.model.model_flavour]
    if not flavour.distilled:
        return None
    params = {"flavour": flavour.name}
    if c.adapter.disable_assistant_lora:
        on = Fix(key="disable_assistant_lora", value=False)
        return Problem(code="W-ASSISTANT-OFF", severity=_WARNING, params=params, fixes=(on,))
    if has_assistant(c.adapter):
        return None
    fixes = (Fix(key="disable_assistant_lora", value=True), Fix(key="assistant_lora_path", value=ASSISTANT_REPOSITORY))
    return Problem(code="E-ASSISTANT-MISSING", params=params, path="/assistant_lora_path", fixes=fixes)


@rule("assistant_lora_path", "model_flavour")
def only_turbo_needs_an_assistant(c: Config, origins: Origins) -> Problem | None:
    flavour = FLAVOURS[c.model.model_flavour]
    if flavour.distilled or not has_assistant(c.adapter):
        return None
    return Problem(code="W-ASSISTANT-NEEDLESS", severity=_WARNING, params={"flavour": flavour.name})


@rule("flow_schedule_shift", "model_flavour")
def turbo_keeps_its_shift(c: Config, origins: Origins) -> Problem | None:
    flavour, shift = FLAVOURS[c.model.model_flavour], c.flow.flow_schedule_shift
    if not flavour.distilled or shift == flavour.flow_schedule_shift:
        return None
    params = {"value": f"{shift:g}", "expected": f"{flavour.flow_schedule_shift:g}", "flavour": flavour.name}
    fixes = (short_fix("flow_schedule_shift", flavour.flow_schedule_shift),)
    return Problem(code="W-SHIFT-TURBO", severity=_WARNING, params=params, fixes=fixes)


@rule("flow_schedule_shift", "flow_schedule_auto_shift")
def one_shift_at_a_time(c: Config, origins: Origins) -> Problem | None:
    if not c.flow.flow_schedule_auto_shift or not was_changed(c, "flow_schedule_shift", origins):
        return None
    params = {"value": f"{c.flow.flow_schedule_shift:g}"}
    return Problem(code="W-SHIFT-AUTO", severity=_WARNING, params=params)


# Validation images


@rule("validation_guidance", "model_flavour", "validation_disable")
def guidance_suits_the_flavour(c: Config, origins: Origins) -> Problem | None:
    flavour, value = FLAVOURS[c.model.model_flavour], c.validation.validation_guidance
    low, high = flavour.guidance
    if c.validation.validation_disable or low <= value <= high:
        return None
    params = {"value": f"{value:g}", "low": f"{low:g}", "high": f"{high:g}", "flavour": flavour.name}
    params["usual"] = f"{1 + value:g}"
    fixes = (short_fix("validation_guidance", flavour.validation_guidance),)
    return Problem(code="W-GUIDANCE", severity=_WARNING, params=params, fixes=fixes)


@rule("validation_num_inference_steps", "model_flavour", "validation_disable")
def steps_suit_the_flavour(c: Config, origins: Origins) -> Problem | None:
    flavour, value = FLAVOURS[c.model.model_flavour], c.validation.validation_num_inference_steps
    low, high = flavour.steps
    if c.validation.validation_disable or low <= value <= high:
        return None
    params = {"value": value, "low": low, "high": high, "flavour": flavour.name}
    fixes = (short_fix("validation_num_inference_steps", flavour.validation_num_inference_steps),)
    return Problem(code="W-STEPS", severity=_WARNING, params=params, fixes=fixes)


@rule("validation_prompt", "user_prompt_library", "validation_disable")
def validation_has_a_prompt(c: Config, origins: Origins) -> Problem | None:
    v = c.validation
    if v.validation_disable or v.validation_prompt or v.user_prompt_library:
        return None
    return Problem(code="W-NO-PROMPT", severity=_WARNING, fixes=(Fix(key="validation_disable", value=True),))


@rule("user_prompt_library", "validation_disable")
def prompt_library_exists(c: Config, origins: Origins) -> Problem | None:
    library = c.validation.user_prompt_library
    if c.validation.validation_disable or library is None or is_file(Path(library)):
        return None
    return Problem(code="E-PATH-FILE", params={"key": "user_prompt_library", "value": library})


@rule("validation_prompt", "validation_disable")
def validation_names_the_subject(c: Config, origins: Origins) -> Problem | None:
    prompt = "" if c.validation.validation_disable else c.validation.validation_prompt or ""
    return _unnamed("validation_prompt") if has_placeholder(prompt) else None


@rule("user_prompt_library", "validation_disable")
def prompt_library_names_the_subject(c: Config, origins: Origins) -> Problem | None:
    library = c.validation.user_prompt_library
    if c.validation.validation_disable or library is None or not is_file(Path(library)):
        return None
    try:
        content = Path(library).read_text(encoding="utf-8", errors="replace")
    except OSError:  # told when the prompts are read
        return None
    return _unnamed("user_prompt_library") if has_placeholder(content) else None


@rule("instance_prompt")
def captions_name_the_subject(c: Config, origins: Origins) -> Problem | None:
    return _unnamed("instance_prompt") if has_placeholder(c.data.instance_prompt or "") else None


# Files, devices, memory


@rule("init_lora")
def starting_adapter_exists(c: Config, origins: Origins) -> Problem | None:
    path = c.adapter.init_lora
    if path is None or is_file(Path(path)):
        return None
    return Problem(code="E-PATH-FILE", params={"key": "init_lora", "value": path})


@rule("device")
def device_is_known(c: Config, origins: Origins) -> Problem | None:
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", c.run.device):
        return None
    return Problem(code="E-DEVICE", params={"value": c.run.device}, fixes=(Fix(key="device", value="auto"),))


@rule(
    "gradient_checkpointing_interval",
    "gradient_checkpointing_budget",
    "gradient_checkpointing_keep",
    "gradient_checkpointing_offload",
    "gradient_checkpointing",
)
def recomputation_reads_what_is_set(c: Config, origins: Origins) -> Problem | None:
    m = c.memory
    options = ("interval", "budget", "keep", "offload")
    names = (f"gradient_checkpointing_{name}" for name in options)
    unread = [name for name in names if was_changed(c, name, origins)]
    if unread and not m.gradient_checkpointing:
        fixes = (Fix(key="gradient_checkpointing", value=True),)
        told = {"unread": ", ".join(unread)}
        return Problem(code="W-CHECKPOINTING-OFF", severity=_WARNING, params=told, path=f"/{unread[0]}", fixes=fixes)
    if m.gradient_checkpointing_budget is None or m.gradient_checkpointing_interval == 0:
        return None
    fixes = (Fix(key="gradient_checkpointing_interval", value="auto"),)
    params = {"interval": m.gradient_checkpointing_interval}
    path = "/gradient_checkpointing_budget"
    return Problem(code="W-CHECKPOINTING-BUDGET", severity=_WARNING, params=params, path=path, fixes=fixes)


@rule("lora_targets", "peft_lora_target_modules")
def modules_replace_targets(c: Config, origins: Origins) -> Problem | None:
    if c.adapter.peft_lora_target_modules is None or not was_changed(c, "lora_targets", origins):
        return None
    return Problem(code="W-TARGETS-TWICE", severity=_WARNING, params={"value": c.adapter.lora_targets})


@rule("lora_format", "lora_targets")
def format_has_names_for_every_layer(c: Config, origins: Origins) -> Problem | None:
    if c.adapter.lora_format != "kohya" or c.adapter.lora_targets != "all" or c.adapter.peft_lora_target_modules:
        return None
    fixes = (Fix(key="lora_format", value="comfyui"),)
    return Problem(code="W-FORMAT-TARGETS", severity=_WARNING, params={}, fixes=fixes)


@rule("maximum_image_size", "target_downsample_size", "minimum_image_size", "resolution", "resolution_type")
def sizes_make_sense(c: Config, origins: Origins) -> Problem | None:
    return broken_size_rule(
        Sizes(
            resolution=c.data.resolution,
            resolution_type=c.data.resolution_type,
            maximum=c.data.maximum_image_size,
            target=c.data.target_downsample_size,
        ),
        limit_megapixels=GLOBAL_LIMIT_MEGAPIXELS,
    )


# Limits of this version


@limit("num_processes")
def one_process_only(c: Config, origins: Origins) -> Problem | None:
    return None if c.parallel.num_processes == 1 else _beyond("num_processes", c.parallel.num_processes, 1)


@limit("report_to")
def trackers_are_not_there_yet(c: Config, origins: Origins) -> Problem | None:
    return _unused("report_to", c.tracking.report_to) if c.tracking.report_to != "none" else None


@limit("webhook_config")
def webhooks_are_not_there_yet(c: Config, origins: Origins) -> Problem | None:
    return _unused("webhook_config", "...") if c.tracking.webhook_config else None


@limit("push_to_hub")
def uploads_are_not_there_yet(c: Config, origins: Origins) -> Problem | None:
    return _unused("push_to_hub", "true") if c.publish.push_to_hub else None


def _unnamed(name: str) -> Problem:
    """The example's words are still there."""
    return Problem(code="W-PLACEHOLDER", severity=_WARNING, params={"key": name, "text": SUBJECT_PLACEHOLDER})


def _beyond(name: str, value: object, instead: object) -> Problem:
    """The run would train something else than what was asked for: refuse."""
    params = {"key": name, "value": value, "instead": instead}
    return Problem(code="E-VALUE-NOT-YET", params=params, fixes=(Fix(key=name, value=instead),))


def _unused(name: str, value: str) -> Problem:
    """The run is the same without it: say so and go on."""
    return Problem(code="W-NOT-YET-OTHER", severity=_WARNING, params={"keys": f"{name} = {value}"})


@rule("fit")
def fit_is_a_size(c: Config, origins: Origins) -> Problem | None:
    if c.memory.fit is None or is_bytes(c.memory.fit):
        return None
    return Problem(code="E-FIT-SIZE", params={"value": c.memory.fit}, fixes=(Fix(key="fit", value="10GB"),))


def _all_rules() -> Iterator[Rule]:
    yield from (value for value in list(globals().values()) if isinstance(value, Rule))


RULES = (*_all_rules(), *OPTIMIZER_RULES, *PRECISION_RULES, *OFFLOAD_RULES, *ADAPTER_RULES, *FLOW_RULES)
