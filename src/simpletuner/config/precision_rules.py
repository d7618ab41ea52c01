"""Rules about number formats: which this version offers, and whether this machine can compute with them."""

from __future__ import annotations

from collections.abc import Sequence

from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.config.libraries import missing_library
from simpletuner.config.root import Config
from simpletuner.config.rule import Origins, Rule, limit, rule, was_set
from simpletuner.hardware.probe import cuda_capability, device_type
from simpletuner.problems import Fix, Problem, Severity

_OPTIONS = ("base_model_precision", "text_encoder_precision")


@limit(*_OPTIONS)
def precisions_are_offered(c: Config, origins: Origins) -> Sequence[Problem]:
    return [problem for key in _OPTIONS if (problem := _refusal(key, str(c.option(key)))) is not None]


@limit(*_OPTIONS, "device")
def precisions_run_on_the_device(c: Config, origins: Origins) -> Sequence[Problem]:
    return [problem for key in _OPTIONS if (problem := _wrong_device(key, str(c.option(key)), c)) is not None]


@rule("quantized_model_dir", "base_model_precision")
def kept_models_are_quantised(c: Config, origins: Origins) -> Problem | None:
    precision = c.memory.base_model_precision
    if not was_set("quantized_model_dir", origins) or PRECISIONS[precision].keeps_plain_parts:
        return None
    return Problem(code="W-QUANTISED-DIR-UNUSED", severity=Severity.WARNING, params={"precision": precision})


def _refusal(key: str, name: str) -> Problem | None:
    row = PRECISIONS[name]
    if row.refused is not None:
        params = {"key": key, "value": name, "instead": row.instead}
        return Problem(code=row.refused, params=params, path=f"/{key}", fixes=(Fix(key=key, value=row.instead),))
    return missing_library(key, name, row.library, instead="int8-torchao")


def _wrong_device(key: str, name: str, c: Config) -> Problem | None:
    row = PRECISIONS[name]
    if row.refused is not None or (row.runs_anywhere and not row.capability):
        return None
    device = device_type(c.run.device)
    params = {"key": key, "value": name, "device": device, "instead": "int8-torchao"}
    fixes = (Fix(key=key, value="int8-torchao"),)
    if device not in row.devices:
        return Problem(code="E-PRECISION-DEVICE", params=params, path=f"/{key}", fixes=fixes)
    capability = cuda_capability() if device == "cuda" else None
    if capability is None or capability >= row.capability:
        return None
    params |= {"needed": f"{row.capability / 10:.1f}", "found": f"{capability / 10:.1f}"}
    return Problem(code="E-PRECISION-CAPABILITY", params=params, path=f"/{key}", fixes=fixes)


PRECISION_RULES = tuple(value for value in list(globals().values()) if isinstance(value, Rule))
