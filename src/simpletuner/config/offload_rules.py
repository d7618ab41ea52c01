"""Rules about offload: what excludes what, and which options are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.config.root import Config
from simpletuner.config.rule import Origins, Rule, rule, was_changed
from simpletuner.problems import Fix, Problem, Severity

_STRATEGIES: Mapping[str, tuple[str, ...]] = {
    "group offload": ("enable_group_offload", "group_offload_text_encoder", "group_offload_vae"),
    "RamTorch": ("ramtorch", "ramtorch_text_encoder", "ramtorch_vae"),
    "block swap": ("musubi_blocks_to_swap",),
}
_TRANSFORMER = ("enable_group_offload", "ramtorch", "musubi_blocks_to_swap")
_TEXT_ENCODER = ("group_offload_text_encoder", "ramtorch_text_encoder")
_GROUPS = ("enable_group_offload", "group_offload_text_encoder")
# An option -> those that make it count.
_READ_WITH: Mapping[str, tuple[str, ...]] = {
    "group_offload_type": _GROUPS,
    "group_offload_blocks_per_group": _GROUPS,
    "group_offload_use_stream": _GROUPS,
    "group_offload_to_disk_path": _GROUPS,
    "group_offload_blocks": ("enable_group_offload",),
    "ramtorch_target_modules": ("ramtorch",),
    "ramtorch_transformer_percent": ("ramtorch",),
    "ramtorch_text_encoder_percent": ("ramtorch_text_encoder",),
}
_ALL = (*_READ_WITH, *(name for names in _STRATEGIES.values() for name in names))


@rule(*(name for names in _STRATEGIES.values() for name in names))
def strategies_are_not_mixed(c: Config, origins: Origins) -> Problem | None:
    used = {strategy: _on(c, names) for strategy, names in _STRATEGIES.items() if _on(c, names)}
    if len(used) < 2:
        return None
    first, *others = [options[0] for options in used.values()]
    fixes = tuple(Fix(key=name, value=None) for options in list(used.values())[1:] for name in options)
    params = {"first": first, "second": ", ".join(others)}
    return Problem(code="E-OFFLOAD-TWICE", params=params, path=f"/{others[0]}", fixes=fixes)


@rule("base_model_precision", "text_encoder_precision", *_TRANSFORMER, *_TEXT_ENCODER)
def weights_can_move(c: Config, origins: Origins) -> Sequence[Problem]:
    chosen = (
        ("base_model_precision", c.memory.base_model_precision, _on(c, _TRANSFORMER)),
        ("text_encoder_precision", c.memory.text_encoder_precision, _on(c, _TEXT_ENCODER)),
    )
    return [_cannot_move(key, name, offload[0]) for key, name, offload in chosen if offload and not _moves(name)]


@rule("model_type", *_TRANSFORMER)
def only_frozen_weights_stream(c: Config, origins: Origins) -> Problem | None:
    offload = _on(c, _TRANSFORMER)
    if c.model.model_type == "lora" or not offload:
        return None
    params = {"option": offload[0], "value": c.model.model_type}
    return Problem(code="E-OFFLOAD-TRAINED", params=params, path=f"/{offload[0]}", fixes=_off(offload))


@rule("group_offload_to_disk_path", "quantized_model_dir", "enable_group_offload", "base_model_precision")
def quantised_weights_are_kept_once(c: Config, origins: Origins) -> Problem | None:
    memory = c.memory
    is_spilled = memory.enable_group_offload and memory.group_offload_to_disk_path
    is_kept = memory.quantized_model_dir and PRECISIONS[memory.base_model_precision].keeps_plain_parts
    if not (is_spilled and is_kept):
        return None
    fixes = (Fix(key="quantized_model_dir", value=None),)
    return Problem(code="E-OFFLOAD-KEPT-TWICE", path="/quantized_model_dir", fixes=fixes)


@rule(*_ALL)
def offload_options_are_read(c: Config, origins: Origins) -> Problem | None:
    unread = [name for name, readers in _READ_WITH.items() if was_changed(c, name, origins) and not _on(c, readers)]
    by_type = "group_offload_blocks_per_group"
    if by_type not in unread and c.memory.group_offload_type == "leaf_level" and was_changed(c, by_type, origins):
        unread.append(by_type)
    if not unread:
        return None
    readers = dict.fromkeys(reader for name in unread for reader in _needs(name, c))
    params = {"unread": ", ".join(unread), "readers": ", ".join(readers)}
    return Problem(code="W-OFFLOAD-UNREAD", severity=Severity.WARNING, params=params, path=f"/{unread[0]}")


def _needs(name: str, c: Config) -> tuple[str, ...]:
    if name == "group_offload_blocks_per_group" and _on(c, _GROUPS):
        return ("group_offload_type = block_level",)
    return _READ_WITH[name]


def _on(c: Config, names: Sequence[str]) -> list[str]:
    """Those of the options that are switched on."""
    return [name for name in names if c.option(name)]


def _off(names: Sequence[str]) -> tuple[Fix, ...]:
    return tuple(Fix(key=name, value=None) for name in names)


def _moves(precision: str) -> bool:
    return PRECISIONS[precision].offloadable


def _cannot_move(key: str, precision: str, option: str) -> Problem:
    instead = PRECISIONS[precision].instead
    params = {"key": key, "value": precision, "option": option, "instead": instead}
    return Problem(code="E-OFFLOAD-PRECISION", params=params, path=f"/{key}", fixes=(Fix(key=key, value=instead),))


OFFLOAD_RULES = tuple(value for value in list(globals().values()) if isinstance(value, Rule))
