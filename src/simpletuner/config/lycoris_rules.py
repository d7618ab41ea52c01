"""Rules about what is trained: a LyCORIS file that can be read, and options that the choice leaves unread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simpletuner.catalog.optimizers import ROUNDS_WELL
from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.config.datasets import DatasetsConfig
from simpletuner.config.lycoris import read_lycoris
from simpletuner.config.paths import is_file, shown_path
from simpletuner.config.release import release_obstacles
from simpletuner.config.root import Config
from simpletuner.config.rule import Origins, Rule, limit, rule, was_changed, was_set
from simpletuner.config.sections.adapter import has_assistant
from simpletuner.problems import ConfigError, Fix, Problem, Severity

_OF_LORA = (
    "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "peft_lora_target_modules", "lora_init_type", "use_dora",
)  # fmt: skip
_OF_LYCORIS = ("lycoris_config", "init_lokr_norm", "validation_lycoris_strength")


@rule("lycoris_config", "lora_type", "model_type")
def lycoris_file_can_be_read(c: Config, origins: Origins) -> Sequence[Problem]:
    if c.adapter.lora_type != "lycoris" or c.model.model_type != "lora":
        return ()
    path = Path(c.adapter.lycoris_config or "")
    if c.adapter.lycoris_config is None or not is_file(path):
        return (Problem(code="E-LYCORIS-FILE", params={"value": c.adapter.lycoris_config or "-"}),)
    try:
        read_lycoris(path, shown=shown_path(path, Path.cwd()))
    except ConfigError as error:
        return error.problems
    return ()


@rule("lora_type", "model_type", "init_lora", *_OF_LORA, *_OF_LYCORIS)
def adapter_reads_what_is_set(c: Config, origins: Origins) -> Problem | None:
    is_lora, is_lycoris = c.model.model_type == "lora", c.adapter.lora_type == "lycoris"
    unread = ((*_OF_LYCORIS,) if not (is_lora and is_lycoris) else ()) + (_OF_LORA if not is_lora or is_lycoris else ())
    unread += () if is_lora else ("init_lora",)
    told = [name for name in unread if was_changed(c, name, origins) and was_set(name, origins)]
    if not told:
        return None
    kind = "model_type full" if not is_lora else f"lora_type {c.adapter.lora_type}"
    params = {"unread": ", ".join(told), "kind": kind}
    return Problem(code="W-ADAPTER-UNREAD", severity=Severity.WARNING, params=params, path=f"/{told[0]}")


_MOVED = ("enable_group_offload", "ramtorch", "musubi_blocks_to_swap")


@rule("model_type", "base_model_precision", *_MOVED)
def trained_weights_are_plain(c: Config, origins: Origins) -> Sequence[Problem]:
    """What is trained must be there as numbers that can move."""
    if c.model.model_type != "full":
        return ()
    precision, found = c.memory.base_model_precision, []
    if PRECISIONS[precision].is_quantised:
        params = {"key": "base_model_precision", "value": precision}
        fixes = (Fix(key="base_model_precision", value="no_change"), Fix(key="model_type", value="lora"))
        found.append(Problem(code="E-FULL-BASE", params=params, path="/base_model_precision", fixes=fixes))
    for name in _MOVED:
        if c.option(name):
            off = 0 if name == "musubi_blocks_to_swap" else False
            fixes = (Fix(key=name, value=off), Fix(key="model_type", value="lora"))
            params = {"key": name, "value": str(c.option(name)).lower()}
            found.append(Problem(code="E-FULL-BASE", params=params, path=f"/{name}", fixes=fixes))
    return found


@rule("model_type", "optimizer", "mixed_precision", "base_model_default_dtype")
def trained_weights_are_rounded_well(c: Config, origins: Origins) -> Problem | None:
    is_bf16 = c.memory.mixed_precision == "bf16" and c.memory.base_model_default_dtype == "bf16"
    if c.model.model_type != "full" or not is_bf16 or c.optimizer.optimizer in ROUNDS_WELL:
        return None
    params = {"optimizer": c.optimizer.optimizer}
    fixes = (Fix(key="optimizer", value="adamw_bf16"), Fix(key="base_model_default_dtype", value="fp32"))
    return Problem(code="W-FULL-ROUNDING", severity=Severity.WARNING, params=params, fixes=fixes)


@rule("model_type", "mixed_precision", "base_model_default_dtype")
def trained_weights_are_not_fp16(c: Config, origins: Origins) -> Problem | None:
    is_fp16 = c.memory.mixed_precision == "fp16" and c.memory.base_model_default_dtype != "fp32"
    if c.model.model_type != "full" or not is_fp16:
        return None
    fixes = (Fix(key="mixed_precision", value="bf16"), Fix(key="base_model_default_dtype", value="fp32"))
    return Problem(code="E-FULL-FP16", path="/mixed_precision", fixes=fixes)


@rule(
    "optimizer_release_gradients",
    "model_type",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "grad_clip_method",
    "optimizer",
)
def gradients_are_released(c: Config, origins: Origins) -> Problem | None:
    wanted, obstacles = c.optimizer.optimizer_release_gradients, release_obstacles(c)
    if not obstacles or wanted is False or (wanted is None and c.model.model_type != "full"):
        return None
    params = {"obstacles": ", ".join(obstacles)}
    if wanted:
        return Problem(code="E-RELEASE-GRADIENTS", params=params, path="/optimizer_release_gradients")
    return Problem(code="I-FULL-GRADIENTS", severity=Severity.INFO, params=params)


@rule("assistant_lora_mode", "model_type", "use_dora")
def merged_assistant_stays_out_of_the_file(c: Config, origins: Origins) -> Problem | None:
    """What is trained would hold the assistant: the weights themselves, or the lengths of their rows."""
    whole = c.model.model_type == "full"
    if not has_assistant(c.adapter) or c.adapter.assistant_lora_mode != "merged" or not (whole or c.adapter.use_dora):
        return None
    params = {"trained": "model_type full" if whole else "use_dora"}
    fixes = (Fix(key="assistant_lora_mode", value="live"),)
    return Problem(code="E-ASSISTANT-IN-FILE", params=params, fixes=fixes)


@limit("lora_init_type")
def adapter_start_is_offered(c: Config, origins: Origins) -> Problem | None:
    if c.adapter.lora_init_type != "loftq":
        return None
    return Problem(code="E-LORA-INIT-LOFTQ", fixes=(Fix(key="lora_init_type", value="pissa"),))


@rule("lora_init_type", "use_dora", "init_lora")
def adapter_starts_once(c: Config, origins: Origins) -> Problem | None:
    """Starts from the weight are subtracted beside it: neither a DoRA's lengths nor a file's weights know of that."""
    start = c.adapter.lora_init_type
    if start not in ("pissa", "olora") or not (c.adapter.use_dora or c.adapter.init_lora):
        return None
    other = "use_dora" if c.adapter.use_dora else "init_lora"
    params = {"start": start, "other": other}
    return Problem(code="E-LORA-INIT-TWICE", params=params, fixes=(Fix(key="lora_init_type", value="default"),))


def full_without_regularisation(c: Config, datasets: DatasetsConfig | None, origins: Origins) -> Sequence[Problem]:
    """Regularisation asks what the untrained model predicts. Where all weights are trained there is none left."""
    if c.model.model_type != "full" or datasets is None:
        return ()
    origin = origins["model_type"].place
    return [
        Problem(code="E-FULL-REGULARISATION", params={"dataset": dataset.id}, path="/model_type", origin=origin)
        for dataset in datasets.images
        if dataset.is_regularisation_data
    ]


ADAPTER_RULES = tuple(value for value in list(globals().values()) if isinstance(value, Rule))
