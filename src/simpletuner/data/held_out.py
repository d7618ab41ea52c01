"""Which held-out images the loss is measured on. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from simpletuner.data.hashing import stable_hash
from simpletuner.data.plan_problems import shown_names
from simpletuner.data.records import Bucket, DatasetPlan, Plan, Sample
from simpletuner.problems import Problem, Severity

POOL = "pool"
"""Name of the set of all datasets together."""


@dataclass(frozen=True, kw_only=True)
class HeldOutSet:
    """Images whose loss is told as one number. Each sample has one caption."""

    name: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """`plan` has the samples of all sets and no others. Without sets there is nothing to measure."""

    plan: Plan = field(default_factory=lambda: Plan(datasets=(), fingerprint=""))
    sets: tuple[HeldOutSet, ...] = ()


def choose_held_out(plan: Plan, *, num_images: int, is_pooled: bool) -> HeldOut:
    """Choose up to `num_images` of each dataset, or of all together. Who is chosen is settled by names alone: neither
    a seed nor a new image changes whether of two images the one comes before the other."""
    pools = {POOL: plan.datasets} if is_pooled else {dataset.id: (dataset,) for dataset in plan.datasets}
    sets = tuple(HeldOutSet(name=name, samples=_choose(datasets, num_images)) for name, datasets in pools.items())
    chosen = {(sample.dataset_id, sample.record.key) for one in sets for sample in one.samples}
    datasets = [_reduced(dataset, chosen) for dataset in plan.datasets]
    return HeldOut(plan=replace(plan, datasets=tuple(d for d in datasets if d.buckets)), sets=sets)


def trained_warnings(held_out: HeldOut, plan: Plan) -> list[Problem]:
    """One warning for each dataset of which images are trained on, too: their loss tells nothing of new images."""
    trained = {(d.storage.id, s.record.key) for d in plan.datasets for bucket in d.buckets for s in bucket.samples}
    problems: list[Problem] = []
    for dataset in held_out.plan.datasets:
        keys = sorted(s.record.key for bucket in dataset.buckets for s in bucket.samples)
        both = [key for key in keys if (dataset.storage.id, key) in trained]
        if both:
            params = {"id": dataset.id, "count": len(both), "files": shown_names(both)}
            problems.append(Problem(code="W-EVAL-TRAINED", severity=Severity.WARNING, params=params))
    return problems


def _choose(datasets: Sequence[DatasetPlan], count: int) -> tuple[Sample, ...]:
    samples = [_with_one_caption(s) for dataset in datasets for bucket in dataset.buckets for s in bucket.samples]
    samples.sort(key=lambda sample: stable_hash("held out", sample.dataset_id, sample.record.key))
    return tuple(samples[:count])


def _with_one_caption(sample: Sample) -> Sample:
    return replace(sample, captions=sample.captions[:1])


def _reduced(dataset: DatasetPlan, chosen: set[tuple[str, str]]) -> DatasetPlan:
    buckets = []
    for bucket in dataset.buckets:
        kept = [_with_one_caption(s) for s in bucket.samples if (s.dataset_id, s.record.key) in chosen]
        if kept:
            buckets.append(Bucket(size=bucket.size, samples=tuple(kept)))
    return replace(dataset, buckets=tuple(buckets))
