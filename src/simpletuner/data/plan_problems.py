"""What keeps datasets from being planned, as problems. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from simpletuner.data.batching import TooFew
from simpletuner.data.captions import BadCaption, CaptionFault
from simpletuner.data.discovery import Scan
from simpletuner.data.records import (
    Bucket,
    Dropped,
    DropReason,
)
from simpletuner.data.spec import DatasetSpec
from simpletuner.data.storage import EXTENSIONS, Listing, Storage, Unreadable
from simpletuner.problems import Fix, Problem, Severity

_NAMES_IN_A_MESSAGE = 100
_FAULT_CODES = {
    CaptionFault.MISSING: "E-CAPTION-MISSING",
    CaptionFault.EMPTY: "E-CAPTION-EMPTY",
    CaptionFault.ENCODING: "E-CAPTION-ENCODING",
    CaptionFault.FILTERED: "E-CAPTION-FILTERED",
    CaptionFault.NO_ROW: "E-CAPTION-ROW",
}


def shown_names(names: Sequence[str]) -> str:
    """The names as a message tells them, not too many."""
    more = len(names) - _NAMES_IN_A_MESSAGE
    return ", ".join(names[:_NAMES_IN_A_MESSAGE]) + (f" (+{more})" if more > 0 else "")


def unreadable_problems(specs: Sequence[DatasetSpec], scans: Mapping[str, Scan]) -> list[Problem]:
    """Errors for images that cannot be read: where a dataset does not skip them, or where they are all there is."""
    return [
        unreadable_problem(found.storage, found.unreadable, code="E-IMAGE-UNREADABLE", severity=Severity.ERROR)
        for found in scans.values()
        if found.unreadable and not _skips(specs, found)
    ]


def skipped_warnings(specs: Sequence[DatasetSpec], scans: Mapping[str, Scan]) -> list[Problem]:
    """What to say beside errors of those that would have been left out."""
    return [
        unreadable_problem(found.storage, found.unreadable, code="W-IMAGE-UNREADABLE", severity=Severity.WARNING)
        for found in scans.values()
        if found.unreadable and _skips(specs, found)
    ]


def _skips(specs: Sequence[DatasetSpec], found: Scan) -> bool:
    """Whether all datasets of a storage leave out what cannot be read, and something is left."""
    users = (spec for spec in specs if spec.storage.id == found.storage.id)
    return bool(found.records) and all(spec.skips_unreadable for spec in users)


def unreadable_problem(storage: Storage, unreadable: Sequence[Unreadable], *, code: str, severity: Severity) -> Problem:
    names = [f"{item.key} ({item.reason})" for item in unreadable]
    params = {"count": len(names), "folder": storage.id, "files": shown_names(names)}
    return Problem(code=code, severity=severity, params=params)


def empty_problem(spec: DatasetSpec, listing: Listing) -> Problem:
    others = ", ".join(f"{other.count} {other.extension or '?'}" for other in listing.others)
    return Problem(
        code="E-DATASET-EMPTY",
        params={
            "id": spec.id,
            "folder": spec.storage.id,
            "extensions": " ".join(EXTENSIONS),
            "count": sum(other.count for other in listing.others),
            "others": others or "-",
        },
    )


def all_dropped_problem(spec: DatasetSpec, found: Scan, dropped: Sequence[Dropped]) -> Problem:
    counts = Counter(item.reason for item in dropped)
    largest = max((record.size for record in found.records), key=lambda size: size[0] * size[1])
    return Problem(
        code="E-DATASET-ALL-DROPPED",
        params={
            "id": spec.id,
            "folder": found.storage.id,
            "count": len(dropped),
            "largest": f"{largest[0]}x{largest[1]}",
            "minimum_image_size": spec.resize.minimum_image_size or "-",
            "resolution_type": spec.resize.resolution_type,
            **{reason.value: counts[reason] for reason in DropReason},
        },
    )


def caption_problems(spec: DatasetSpec, bad: Sequence[BadCaption]) -> list[Problem]:
    problems: list[Problem] = []
    for fault, code in _FAULT_CODES.items():
        paths = [spec.storage.shown(item.key) for item in bad if item.fault is fault]
        if paths:
            table = spec.table.shown if spec.table is not None else "-"
            params = {"id": spec.id, "count": len(paths), "files": shown_names(paths), "table": table}
            problems.append(Problem(code=code, params=params))
    return problems


def no_batch_problem(spec: DatasetSpec, buckets: Sequence[Bucket], few: TooFew, batch_size: int) -> Problem:
    params: dict[str, object] = {
        "id": spec.id,
        "samples": sum(len(bucket.samples) for bucket in buckets),
        "buckets": len(buckets),
        "short": shown_names([f"{b.size[0]}x{b.size[1]}: {b.num_images}" for b in few.short]),
        "repeats": spec.repeats,
        "batch_size": batch_size,
        "minimum_repeats": few.minimum_repeats,
    }
    fixes = (Fix(key="repeats", value=few.minimum_repeats),)
    if spec.batch_mixing == "packed":
        return Problem(code="E-DATASET-NO-BATCH-PACKED", params=params, fixes=fixes)
    return Problem(code="E-DATASET-NO-BATCH", params=params, fixes=(*fixes, Fix(key="batch_mixing", value="packed")))
