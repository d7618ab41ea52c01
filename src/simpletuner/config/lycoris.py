"""The file that `lycoris_config` names: checked key by key, and read into what the catalog knows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from simpletuner.catalog.lycoris import (
    ALGO_SPELLINGS,
    ALGOS,
    CLASSES,
    NEEDS_DIM,
    REFUSED_ALGOS,
    USUAL_CLASSES,
    LycorisSettings,
    Update,
)
from simpletuner.config.json_text import JsonDocument, parse_json, read_text
from simpletuner.config.names import closest
from simpletuner.config.values import show
from simpletuner.problems import ConfigError, Problem

_OPTION = "/lycoris_config"


@dataclass(frozen=True, kw_only=True)
class _Key:
    """A key of an update: its field, and the range of a number; flags have none."""

    field: str
    low: float | None = None
    high: float = math.inf
    whole: bool = False


_UPDATE_KEYS: Mapping[str, _Key] = MappingProxyType(
    {
        "linear_dim": _Key(field="dim", low=1, whole=True),
        "dim": _Key(field="dim", low=1, whole=True),
        "linear_alpha": _Key(field="alpha", low=0),
        "alpha": _Key(field="alpha", low=0),
        "factor": _Key(field="factor", low=-1, whole=True),
        "constraint": _Key(field="constraint", low=0),
        "dropout": _Key(field="dropout", low=0, high=0.999),
        "rank_dropout": _Key(field="rank_dropout", low=0, high=0.999),
        "module_dropout": _Key(field="module_dropout", low=0, high=0.999),
        "full_matrix": _Key(field="full_matrix"),
        "decompose_both": _Key(field="decompose_both"),
        "unbalanced_factorization": _Key(field="unbalanced"),
        "rescaled": _Key(field="rescaled"),
        "train_on_input": _Key(field="on_input"),
        "rank_dropout_scale": _Key(field="rank_dropout_scale"),
    }
)
_TOP_KEYS = ("algo", "multiplier", "apply_preset")
_IDLE_KEYS = (  # of convolutions, which the model lacks, or about how the library computes
    "conv_dim", "conv_alpha", "use_tucker", "use_cp", "use_conv_cp", "disable_conv_cp", "block_size", "bypass_mode",
    "wd_on_output", "warn_on_unmatched", "train_llm_adapter",
)  # fmt: skip
_REFUSED_KEYS = ("use_scalar", "dora_wd", "weight_decompose", "train_norm", "rs_lora", "preset")
_PRESET_LISTS = ("target_module", "target_name", "exclude_name")
_PRESET_MAPS = ("module_algo_map", "name_algo_map")
_IDLE_PRESET_KEYS = (
    "enable_conv", "lora_prefix", "unet_target_module", "unet_target_name", "text_encoder_target_module",
    "text_encoder_target_name",
)  # fmt: skip


def read_lycoris(path: Path, *, shown: str | None = None) -> LycorisSettings:
    """The settings in the file.

    Raises:
        ConfigError: every problem of the file at once, each with its line.
    """
    name = shown or path.as_posix()
    document = parse_json(read_text(path, name), name)
    reader = _Reader(document=document, shown=name)
    settings = reader.settings()
    if settings is None or reader.problems:
        raise ConfigError(reader.problems)
    return settings


def canonical_lycoris(path: Path) -> str:
    """The file's content with its keys in order: equal for equal settings."""
    document = parse_json(read_text(path, path.as_posix()), path.as_posix())
    return json.dumps(document.value, sort_keys=True, ensure_ascii=False)


LYCORIS_KEYS = frozenset((*_TOP_KEYS, *_UPDATE_KEYS, *_PRESET_LISTS, *_PRESET_MAPS, "use_fnmatch"))
"""Every key that means something in such a file."""


@dataclass(kw_only=True)
class _Reader:
    document: JsonDocument
    shown: str
    problems: list[Problem] = field(default_factory=list)

    def settings(self) -> LycorisSettings | None:
        content = self.document.value
        if not isinstance(content, dict):
            self._tell("E-LYCORIS-VALUE", "", key=self.shown, value=show(content), expected="{...}")
            return None
        self._check_keys(content, "", (*_TOP_KEYS, *_UPDATE_KEYS, *_IDLE_KEYS), _REFUSED_KEYS)
        algo = self._algo(content.get("algo", ""), "/algo") if "algo" in content else None
        needs_dim = (algo or "lokr") in NEEDS_DIM and content.get("full_matrix") is not True
        needed = ("algo", "multiplier", "linear_alpha", *(("linear_dim",) if needs_dim else ()))
        short = {"linear_alpha": "alpha", "linear_dim": "dim"}
        missing = [key for key in needed if key not in content and short.get(key, key) not in content]
        if missing:
            self._tell("E-LYCORIS-MISSING", "", file=self.shown, keys=", ".join(missing))
        preset = content.get("apply_preset", {})
        if not isinstance(preset, dict):
            self._tell("E-LYCORIS-VALUE", "/apply_preset", key="apply_preset", value=show(preset), expected="{...}")
            preset = {}
        known = (*_PRESET_LISTS, *_PRESET_MAPS, *_IDLE_PRESET_KEYS, "use_fnmatch")
        self._check_keys(preset, "/apply_preset", known, ())
        update = self._update(Update(algo=algo or "lokr"), content, "")
        lists = {key: self._names(preset.get(key, []), key) for key in _PRESET_LISTS}
        maps = {key: self._map(preset.get(key, {}), key, update) for key in _PRESET_MAPS}
        chooses = any(preset.get(key) for key in ("target_module", "target_name", *_PRESET_MAPS))
        self._check_classes((*lists["target_module"], *maps["module_algo_map"]))
        return LycorisSettings(
            update=update,
            multiplier=self._number(content.get("multiplier", 1.0), "multiplier", "/multiplier", _Key(field="", low=0)),
            classes=lists["target_module"] if chooses else USUAL_CLASSES,
            names=lists["target_name"],
            excluded=lists["exclude_name"],
            wildcards=preset.get("use_fnmatch") is True,
            by_class=maps["module_algo_map"],
            by_name=maps["name_algo_map"],
        )

    def _update(self, base: Update, content: Mapping[str, object], place: str) -> Update:
        """`base` with what `content` says of it. As in the library, an alpha of 0 stands for the dimension."""
        changes: dict[str, object] = {}
        for name, key in _UPDATE_KEYS.items():
            if name not in content:
                continue
            value, where = content[name], f"{place}/{name}"
            if key.low is None:
                changes[key.field] = value is True
                if not isinstance(value, bool):
                    self._tell("E-LYCORIS-VALUE", where, key=name, value=show(value), expected="true, false")
            else:
                number = self._number(value, name, where, key)
                changes[key.field] = int(number) if key.whole else number
        if "algo" in content and place:
            changes["algo"] = self._algo(content["algo"], f"{place}/algo") or base.algo
        update = replace(base, **changes)  # type: ignore[arg-type]
        return replace(update, alpha=float(update.dim)) if update.alpha == 0 else update

    def _algo(self, value: object, where: str) -> str | None:
        name = str(value).lower()
        name = ALGO_SPELLINGS.get(name, name)
        if name in ALGOS:
            return name
        code = "E-LYCORIS-NOT-YET" if name in REFUSED_ALGOS else "E-LYCORIS-ALGO"
        self._tell(code, where, key="algo", value=show(value), choices=", ".join(ALGOS))
        return None

    def _number(self, value: object, name: str, where: str, key: _Key) -> float:
        low = key.low or 0
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            is_inside = low <= value <= key.high and math.isfinite(value)
            if is_inside and not (key.whole and value != int(value)):
                return float(value)
        bounds = f">= {low:g}" + ("" if math.isinf(key.high) else f", <= {key.high:g}")
        self._tell("E-LYCORIS-VALUE", where, key=name, value=show(value), expected=bounds)
        return max(low, 1.0)

    def _names(self, value: object, key: str) -> tuple[str, ...]:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        self._tell("E-LYCORIS-VALUE", f"/apply_preset/{key}", key=key, value=show(value), expected='["..."]')
        return ()

    def _map(self, value: object, key: str, update: Update) -> dict[str, Update]:
        where = f"/apply_preset/{key}"
        if not isinstance(value, dict) or not all(isinstance(item, dict) for item in value.values()):
            self._tell("E-LYCORIS-VALUE", where, key=key, value=show(value), expected='{"...": {...}}')
            return {}
        found = {}
        for name, content in value.items():
            place = f"{where}/{name.replace('~', '~0').replace('/', '~1')}"
            self._check_keys(content, place, ("algo", *_UPDATE_KEYS, *_IDLE_KEYS), _REFUSED_KEYS)
            found[name] = self._update(update, content, place)
        return found

    def _check_classes(self, names: tuple[str, ...]) -> None:
        for name in dict.fromkeys(names):
            if name not in CLASSES:
                self._tell("E-LYCORIS-CLASS", "/apply_preset", name=name, classes=", ".join(CLASSES))

    def _check_keys(
        self, content: Mapping[str, object], place: str, known: tuple[str, ...], refused: tuple[str, ...]
    ) -> None:
        for key, value in content.items():
            if key in refused and value not in (False, None, 0):
                self._tell("E-LYCORIS-NOT-YET", f"{place}/{key}", key=key, value=show(value), choices=", ".join(ALGOS))
            elif key not in known and key not in refused:
                near = closest(key, known) or ", ".join(known[:8])
                self._tell("E-LYCORIS-KEY", f"{place}/{key}", key=key, near=near)

    def _tell(self, code: str, place: str, **params: object) -> None:
        line = self.document.lines.get(place)
        origin = self.shown if line is None else f"{self.shown}:{line}"
        self.problems.append(Problem(code=code, params=params, path=_OPTION, origin=origin))
