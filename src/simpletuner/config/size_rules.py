"""What resolution, maximum and target sizes may be, for the run and for each dataset alike."""

from __future__ import annotations

from dataclasses import dataclass

from simpletuner.config.sections.data import ResolutionType
from simpletuner.problems import Fix, Problem

GLOBAL_LIMIT_MEGAPIXELS = 5.0
DATASET_LIMIT_MEGAPIXELS = 20.0
_LOWEST_EDGE_PX = 16
_SAFE_MAXIMUM_PX = 512


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The size options that belong together, all in the unit of `resolution_type`."""

    resolution: float
    resolution_type: ResolutionType
    maximum: float | None
    target: float | None


def broken_size_rule(sizes: Sizes, *, limit_megapixels: float) -> Problem | None:
    """The first mistake in the sizes; its path names the option that it is about."""
    return _unit_problem(sizes, limit_megapixels) or _pair_problem(sizes) or _low_maximum(sizes)


def _pair_problem(sizes: Sizes) -> Problem | None:
    if (sizes.maximum is None) == (sizes.target is None):
        return None
    given, missing = "maximum_image_size", "target_downsample_size"
    if sizes.maximum is None:
        given, missing = missing, given
    value = sizes.target if sizes.maximum is None else sizes.maximum
    params = {"given": given, "missing": missing}
    return Problem(code="E-SIZE-PAIR", params=params, path=f"/{given}", fixes=(Fix(key=missing, value=value),))


def _unit_problem(sizes: Sizes, limit_megapixels: float) -> Problem | None:
    named = {
        "resolution": sizes.resolution,
        "maximum_image_size": sizes.maximum,
        "target_downsample_size": sizes.target,
    }
    for key, value in named.items():
        if value is None:
            continue
        params = {"key": key, "value": f"{value:g}", "type": sizes.resolution_type}
        if sizes.resolution_type == "area":
            if value > (DATASET_LIMIT_MEGAPIXELS if key == "resolution" else limit_megapixels):
                limit = DATASET_LIMIT_MEGAPIXELS if key == "resolution" else limit_megapixels
                return Problem(code="E-SIZE-MEGAPIXELS", params={**params, "limit": f"{limit:g}"}, path=f"/{key}")
        elif value < _LOWEST_EDGE_PX:
            return Problem(code="E-SIZE-PIXELS", params=params, path=f"/{key}")
    return None


def _low_maximum(sizes: Sizes) -> Problem | None:
    """A maximum below what is trained at means that images are shrunk and then enlarged again."""
    if sizes.resolution_type == "area" or sizes.maximum is None:
        return None
    if sizes.maximum >= min(_SAFE_MAXIMUM_PX, sizes.resolution):
        return None
    params = {"value": f"{sizes.maximum:g}", "resolution": f"{sizes.resolution:g}"}
    fixes = (Fix(key="maximum_image_size", value=sizes.resolution),)
    return Problem(code="E-SIZE-MAXIMUM-LOW", params=params, path="/maximum_image_size", fixes=fixes)
