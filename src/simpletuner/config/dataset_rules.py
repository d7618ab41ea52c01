"""Rules within one dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from simpletuner.config.caption_filters import bad_filters
from simpletuner.config.datasets import CONDITIONING_TYPES, ImageDataset
from simpletuner.config.placeholder import SUBJECT_PLACEHOLDER, has_placeholder
from simpletuner.config.schedule_rules import schedule_problem
from simpletuner.config.size_rules import DATASET_LIMIT_MEGAPIXELS, Sizes, broken_size_rule
from simpletuner.problems import Fix, Problem, Severity

_CONDITIONING_KEYS = frozenset(("conditioning_type", "source_dataset_id"))
_TRAINING_KEYS = frozenset(
    (
        "repeats",
        "probability",
        "is_regularisation_data",
        "train_batch_size",
        "caption_dropout_probability",
        "timestep_sampling_offset",
        "batch_mixing",
        "start_epoch",
        "start_step",
        "end_epoch",
        "end_step",
        "disable_after_epoch_step",
    )
)
IDLE_KEYS: Mapping[str, frozenset[str]] = {
    "image": _CONDITIONING_KEYS,
    "eval": _CONDITIONING_KEYS | _TRAINING_KEYS,
    "conditioning": _TRAINING_KEYS | {"conditioning_data"},
}
"""dataset_type -> keys that say nothing in such an entry."""

_WEIGHTS_TOLERANCE = 0.02  # of their sum: 0.33 three times is meant well
SIZE_KEYS = ("resolution", "resolution_type", "maximum_image_size", "target_downsample_size")


def broken_dataset_rules(dataset: ImageDataset, *, written: frozenset[str]) -> Iterator[Problem]:
    """The problems of one dataset; their paths name keys. `written` are the keys of the entry itself: what is wrong
    with inherited sizes or an inherited prompt alone is told once, for the run."""
    yield from _idle(dataset, written)
    if dataset.dataset_type == "conditioning":  # sizes and captions are those of the images
        problem = _conditioning(dataset)
        if problem is not None:
            yield problem
        return
    checks: tuple[Callable[[ImageDataset], Problem | None], ...] = (
        _prompt,
        _face,
        _aspects,
        _weights,
        _aspect_range,
        _one_mask,
        schedule_problem,
    )
    for check in checks:
        problem = check(dataset)
        if problem is not None:
            yield problem
    yield from bad_filters(dataset.caption_filter_list)
    problem = _sizes(dataset) if written & set(SIZE_KEYS) else None
    if problem is not None:
        yield problem
    if "instance_prompt" in written and any(map(has_placeholder, dataset.instance_prompt)):
        params = {"key": "instance_prompt", "text": SUBJECT_PLACEHOLDER}
        yield Problem(code="W-PLACEHOLDER", severity=Severity.WARNING, params=params, path="/instance_prompt")


def _idle(dataset: ImageDataset, written: frozenset[str]) -> Iterator[Problem]:
    """What an entry says that an entry of its kind has no use for."""
    keys = sorted(
        key
        for key in written & IDLE_KEYS[dataset.dataset_type]
        if getattr(dataset, key) != ImageDataset.model_fields[key].default
    )
    if keys:
        params = {"id": dataset.id, "keys": ", ".join(keys), "kind": dataset.dataset_type}
        yield Problem(code="W-DATASET-KEYS-IDLE", severity=Severity.WARNING, params=params, path=f"/{keys[0]}")


def _conditioning(dataset: ImageDataset) -> Problem | None:
    if dataset.conditioning_type in CONDITIONING_TYPES:
        return None
    params = {"id": dataset.id, "value": dataset.conditioning_type or "-"}
    fixes = (Fix(key="conditioning_type", value=CONDITIONING_TYPES[0]),)
    return Problem(code="E-CONDITIONING-TYPE", params=params, path="/conditioning_type", fixes=fixes)


def _one_mask(dataset: ImageDataset) -> Problem | None:
    if len(dataset.conditioning_data) < 2:
        return None
    params = {"id": dataset.id, "value": ", ".join(dataset.conditioning_data)}
    return Problem(code="E-CONDITIONING-MANY", params=params, path="/conditioning_data")


def _sizes(dataset: ImageDataset) -> Problem | None:
    sizes = Sizes(
        resolution=dataset.resolution,
        resolution_type=dataset.resolution_type,
        maximum=dataset.maximum_image_size,
        target=dataset.target_downsample_size,
    )
    return broken_size_rule(sizes, limit_megapixels=DATASET_LIMIT_MEGAPIXELS)


def _prompt(dataset: ImageDataset) -> Problem | None:
    uses = (
        ("caption_strategy", dataset.caption_strategy == "instanceprompt"),
        ("prepend_instance_prompt", dataset.prepend_instance_prompt),
        ("only_instance_prompt", dataset.only_instance_prompt),
    )
    reason = next((key for key, needs_it in uses if needs_it), None)
    if reason is None or dataset.instance_prompt:
        return None
    return Problem(code="E-DATASET-PROMPT", params={"id": dataset.id, "reason": reason}, path=f"/{reason}")


def _aspects(dataset: ImageDataset) -> Problem | None:
    if not dataset.crop or dataset.crop_aspect not in ("closest", "random") or dataset.crop_aspect_buckets:
        return None
    params = {"id": dataset.id, "value": dataset.crop_aspect}
    fixes = (Fix(key="crop_aspect_buckets", value=[0.75, 1.0, 1.33]),)
    return Problem(code="E-DATASET-ASPECTS", params=params, path="/crop_aspect", fixes=fixes)


def _face(dataset: ImageDataset) -> Problem | None:
    if dataset.crop_style != "face":
        return None
    fixes = (Fix(key="crop_style", value="center"),)
    return Problem(code="E-DATASET-FACE", params={"id": dataset.id}, path="/crop_style", fixes=fixes)


def _weights(dataset: ImageDataset) -> Problem | None:
    """Weights are shares of a whole: one that is missing, or a sum that is not 1, is a slip of the pen."""
    weights = [bucket.weight for bucket in dataset.crop_aspect_buckets]
    written = [weight for weight in weights if weight is not None]
    if not written or (len(written) == len(weights) and math.isclose(sum(written), 1, abs_tol=_WEIGHTS_TOLERANCE)):
        return None
    params = {"id": dataset.id, "sum": f"{sum(written):g}", "missing": len(weights) - len(written)}
    path = "/crop_aspect_buckets"
    if len(written) < len(weights):
        return Problem(code="E-DATASET-WEIGHTS-MISSING", params=params, path=path)
    shares = [
        {"aspect": bucket.aspect, "weight": round(weight / sum(written), 4)}
        for bucket, weight in zip(dataset.crop_aspect_buckets, written, strict=True)
    ]
    return Problem(
        code="E-DATASET-WEIGHTS", params=params, path=path, fixes=(Fix(key="crop_aspect_buckets", value=shares),)
    )


def _aspect_range(dataset: ImageDataset) -> Problem | None:
    low, high = dataset.minimum_aspect_ratio, dataset.maximum_aspect_ratio
    if low is None or high is None or low <= high:
        return None
    params = {"id": dataset.id, "low": f"{low:g}", "high": f"{high:g}"}
    return Problem(code="E-DATASET-ASPECT-RANGE", params=params, path="/minimum_aspect_ratio")
