"""Rules about what is trained: a LyCORIS file that can be read, and options that the choice leaves unread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simpletuner.config.lycoris import read_lycoris
from simpletuner.config.paths import is_file, shown_path
from simpletuner.config.root import Config
from simpletuner.config.rule import Origins, Rule, limit, rule, was_changed, was_set
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


@rule("lora_type", "model_type", *_OF_LORA, *_OF_LYCORIS)
def adapter_reads_what_is_set(c: Config, origins: Origins) -> Problem | None:
    is_lora, is_lycoris = c.model.model_type == "lora", c.adapter.lora_type == "lycoris"
    unread = ((*_OF_LYCORIS,) if not (is_lora and is_lycoris) else ()) + (_OF_LORA if not is_lora or is_lycoris else ())
    told = [name for name in unread if was_changed(c, name, origins) and was_set(name, origins)]
    if not told:
        return None
    kind = "model_type full" if not is_lora else f"lora_type {c.adapter.lora_type}"
    params = {"unread": ", ".join(told), "kind": kind}
    return Problem(code="W-ADAPTER-UNREAD", severity=Severity.WARNING, params=params, path=f"/{told[0]}")


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


ADAPTER_RULES = tuple(value for value in list(globals().values()) if isinstance(value, Rule))
