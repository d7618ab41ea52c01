"""Reports of datasets for programs. The keys are part of the public interface: docs/DATASETS.md lists them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from simpletuner.data.caption_survey import CaptionSurvey, Frequent
from simpletuner.data.captions import BadCaption
from simpletuner.data.records import DropReason, Size
from simpletuner.data.survey import BucketSurvey, DatasetSurvey
from simpletuner.train.survey import CaptionReport, RunOutlook, Survey

if TYPE_CHECKING:
    from simpletuner.train.caching import CacheSummary  # loads torch


def survey_as_data(survey: Survey) -> dict[str, object]:
    """What `simpletuner dataset scan --json` prints, without the problems."""
    return {
        "datasets": [_dataset(dataset, _purpose(survey, dataset)) for dataset in survey.datasets],
        "duplicates": [list(group.files) for group in survey.duplicates],
        "run": None if survey.run is None else _run(survey.run),
    }


def buckets_as_data(survey: Survey) -> dict[str, object]:
    """What `simpletuner dataset buckets --json` prints, without the problems."""
    return {
        "datasets": [
            {
                "id": dataset.id,
                "repeats": dataset.repeats,
                "batch_size": dataset.batch_size,
                "batch_mixing": dataset.batch_mixing,
                "batches": dataset.num_batches,
                "buckets": [_bucket(bucket) for bucket in dataset.buckets],
                "dropped": _dropped(dataset),
            }
            for dataset in survey.datasets
        ],
        "run": None if survey.run is None else _run(survey.run),
    }


def captions_as_data(report: CaptionReport) -> dict[str, object]:
    """What `simpletuner dataset captions --json` prints, without the problems."""
    return {"max_tokens": report.max_tokens, "datasets": [_captions(dataset) for dataset in report.datasets]}


def cached_as_data(summary: CacheSummary) -> dict[str, object]:
    """What `simpletuner dataset cache --json` prints."""
    return {
        "latents": {
            "total": summary.latents.total,
            "made": summary.latents.made,
            "folders": [str(folder) for folder in summary.latent_folders],
        },
        "prompts": {
            "total": summary.prompts.total,
            "made": summary.prompts.made,
            "folders": [str(folder) for folder in summary.prompt_folders],
        },
        "unreadable": summary.num_unreadable,
        "left_to_training": list(summary.left_to_training),
    }


def _purpose(survey: Survey, dataset: DatasetSurvey) -> str:
    return "eval" if dataset.id in survey.held_out else "train"


def _dataset(dataset: DatasetSurvey, purpose: str) -> dict[str, object]:
    return {
        "id": dataset.id,
        "purpose": purpose,
        "place": dataset.place,
        "files": dataset.num_files,
        "readable": dataset.num_readable,
        "used": dataset.num_used,
        "bytes": dataset.num_bytes,
        "smallest": _size(dataset.smallest),
        "largest": _size(dataset.largest),
        "megapixels": [{"least": c.least, "below": c.below, "images": c.num_images} for c in dataset.sizes],
        "traits": dict(dataset.traits),
        "other_files": {other.extension: other.count for other in dataset.others},
        "unreadable": [{"file": item.key, "reason": item.reason} for item in dataset.unreadable],
        "dropped": _dropped(dataset),
        "bad_captions": _bad_captions(dataset.bad_captions),
        "repeats": dataset.repeats,
        "batch_size": dataset.batch_size,
        "batch_mixing": dataset.batch_mixing,
        "batches": dataset.num_batches,
        "buckets": [_bucket(bucket) for bucket in dataset.buckets],
    }


def _bucket(bucket: BucketSurvey) -> dict[str, object]:
    return {
        "size": _size(bucket.size),
        "images": bucket.num_images,
        "samples": bucket.num_samples,
        "state": bucket.state.value,
        "minimum_repeats": bucket.minimum_repeats,
    }


def _dropped(dataset: DatasetSurvey) -> dict[str, object]:
    counts = Counter(item.reason for item in dataset.dropped)
    return {
        reason.value: [item.key for item in dataset.dropped if item.reason is reason]
        for reason in DropReason
        if counts[reason]
    }


def _run(run: RunOutlook) -> dict[str, object]:
    return {
        "samples_per_epoch": run.samples_per_epoch,
        "batches_per_epoch": run.batches_per_epoch,
        "steps_per_epoch": run.steps_per_epoch,
        "effective_batch_size": run.effective_batch_size,
        "total_steps": run.total_steps,
        "epochs": run.num_epochs,
    }


def _captions(dataset: CaptionSurvey) -> dict[str, object]:
    lengths = dataset.lengths
    return {
        "id": dataset.id,
        "caption_strategy": dataset.caption_strategy,
        "images": dataset.num_images,
        "captions": dataset.num_captions,
        "distinct": dataset.num_distinct,
        "tokens": None
        if lengths is None
        else {
            "least": lengths.least,
            "median": lengths.median,
            "most": lengths.most,
            "histogram": [{"from": first, "to": last, "captions": n} for first, last, n in lengths.histogram],
        },
        "too_long": list(dataset.too_long),
        "bad": _bad_captions(dataset.bad),
        "repeated": _frequent(dataset.repeated, "images"),
        "frequent": {"kind": "tags" if dataset.are_tags else "words", "items": _frequent(dataset.frequent, "captions")},
        "examples": list(dataset.examples),
    }


def _bad_captions(bad: Iterable[BadCaption]) -> list[dict[str, object]]:
    return [{"file": item.key, "fault": item.fault.value} for item in bad]


def _frequent(items: Iterable[Frequent], counted: str) -> list[dict[str, object]]:
    return [{"text": item.text, counted: item.num_captions} for item in items]


def _size(size: Size | None) -> list[int] | None:
    return None if size is None else list(size)
