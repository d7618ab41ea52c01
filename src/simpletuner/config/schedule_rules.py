"""What can be said of the datasets' schedules before their images are counted: where no dataset would take part."""

from __future__ import annotations

from collections.abc import Sequence

from simpletuner.config.datasets import ImageDataset
from simpletuner.problems import Fix, Problem

Span = tuple[int, int | None]
"""From the first to the last epoch or step that belongs to it; None: to the end of the run."""


def schedule_problem(dataset: ImageDataset) -> Problem | None:
    """A dataset that ends before it starts."""
    for unit in ("epoch", "step"):
        start, end = _span(dataset, unit)
        if end is not None and end < start:
            params = {"id": dataset.id, "start": f"start_{unit}", "from": start, "end": f"end_{unit}", "to": end}
            fixes = (Fix(key=f"end_{unit}", value=None),)
            return Problem(code="E-DATASET-SCHEDULE", params=params, path=f"/end_{unit}", fixes=fixes)
    return None


def uncovered(datasets: Sequence[ImageDataset], *, epochs: int, steps: int) -> Problem | None:
    """The first stretch of the run that is certain to have no dataset. Where epochs and steps both decide, or the
    run's length is not given in the unit that does, that can be told only once the images are counted.

    Args: epochs, steps: the run's length; 0: not given in this unit.
    """
    drawn = [dataset for dataset in datasets if dataset.probability > 0]
    if not drawn:
        return None
    if not any(_span(d, "epoch")[0] == 1 and _span(d, "step")[0] == 1 for d in drawn):
        params = {"ids": ", ".join(dataset.id for dataset in drawn)}
        return Problem(code="E-DATASETS-START", params=params, fixes=(Fix(key="start_epoch", value=1),))
    for unit, other, length in (("epoch", "step", epochs), ("step", "epoch", steps)):
        if length and all(_span(dataset, other) == (1, None) for dataset in drawn):
            first = _first_gap([_span(dataset, unit) for dataset in drawn], length)
            if first is not None:
                return Problem(code=f"E-DATASETS-GAP-{unit.upper()}", params={"first": first, "last": length})
    return None


def _span(dataset: ImageDataset, unit: str) -> Span:
    if unit == "epoch":
        return dataset.start_epoch, dataset.end_epoch
    return max(dataset.start_step, 1), dataset.end_step


def _first_gap(spans: Sequence[Span], length: int) -> int | None:
    """The first of 1 .. length in no span."""
    place = 1
    for start, end in sorted(spans, key=lambda span: span[0]):
        if start > place:
            break
        if end is None:
            return None
        place = max(place, end + 1)
    return place if place <= length else None
