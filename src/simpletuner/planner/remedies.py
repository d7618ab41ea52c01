"""What would lower a run's peak of memory, and by how much: every change by itself, the largest saving first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.config.root import options
from simpletuner.hardware.probe import is_installed
from simpletuner.planner.estimate import device_peak
from simpletuner.planner.inputs import Offload, Picture, PlanInput
from simpletuner.problems import Fix

_EDGES_PX = (1536, 1024, 768, 512, 384, 256)
_LEAST_SHARE = 0.01  # of the peak: below it a change is not worth its mention
_SMALLER_FORMATS = ("int8-torchao", "nf4-bnb")
_STREAMING = "enable_group_offload"


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One change, the peak that it would leave, and the bytes that it saves."""

    fix: Fix
    plan: PlanInput
    peak_bytes: int
    saving_bytes: int


def remedies(plan: PlanInput) -> tuple[Remedy, ...]:
    """The changes that save something, the largest saving first; of equal ones the one with less cost."""
    before = device_peak(plan)
    found = []
    for fix, changed in _changes(plan):
        after = device_peak(changed)
        if before - after >= _LEAST_SHARE * before:
            found.append(Remedy(fix=fix, plan=changed, peak_bytes=after, saving_bytes=before - after))
    return tuple(sorted(found, key=lambda remedy: -remedy.saving_bytes))


def _changes(plan: PlanInput) -> Iterator[tuple[Fix, PlanInput]]:
    if not plan.checkpointing:
        yield Fix(key="gradient_checkpointing", value=True), replace(plan, checkpointing=True)
    elif plan.interval > 1:
        yield Fix(key="gradient_checkpointing_interval", value=1), replace(plan, interval=1)
    if plan.checkpointing and plan.keeps_product:
        yield Fix(key="gradient_checkpointing_keep", value="input"), replace(plan, keeps_product=False)
    if plan.checkpointing and plan.device == "cuda" and not plan.inputs_on_host:
        yield Fix(key="gradient_checkpointing_offload", value=True), replace(plan, inputs_on_host=True)
    for name in () if plan.adapter.whole else smaller_formats(plan.precision.bits):
        yield Fix(key="base_model_precision", value=name), replace(plan, precision=PRECISIONS[name])
    for name in smaller_formats(plan.text_precision.bits):
        yield Fix(key="text_encoder_precision", value=name), replace(plan, text_precision=PRECISIONS[name])
    can_stream = _STREAMING in options() and not plan.adapter.whole
    if can_stream and not plan.offload.blocks and plan.device != "cpu" and plan.precision.offloadable:
        blocks = plan.sizes.transformer.n_layers + 2 * plan.sizes.transformer.n_refiner_layers
        yield Fix(key=_STREAMING, value=True), replace(plan, offload=Offload(blocks=blocks, overlap=True))
    if plan.train.count > 1:
        yield Fix(key="train_batch_size", value=1), replace(plan, train=replace(plan.train, count=1), is_mixed=False)
    edge_px = _smaller_edge(plan.train)
    if edge_px is not None:
        picture = replace(plan.train, width_px=edge_px, height_px=edge_px)
        yield Fix(key="resolution", value=edge_px), replace(plan, train=picture)
    if plan.validation is not None:
        edge_px = _smaller_edge(plan.validation)
        if edge_px is not None:
            image = replace(plan.validation, width_px=edge_px, height_px=edge_px, count=1)
            yield Fix(key="validation_resolution", value=f"{edge_px}x{edge_px}"), replace(plan, validation=image)
    if plan.adapter.rank > 8 and plan.adapter.lycoris is None and not plan.adapter.whole:
        rank = max(plan.adapter.rank // 2, 8)
        yield Fix(key="lora_rank", value=rank), replace(plan, adapter=replace(plan.adapter, rank=rank))


def smaller_formats(bits: float | None) -> tuple[str, ...]:
    """Number formats of this version that take less than `bits` for a weight (None: not quantised) and that can be
    used here, from the finest on."""
    rows = [PRECISIONS[name] for name in _SMALLER_FORMATS]
    usable = [row for row in rows if row.library is None or is_installed(row.library.module)]
    return tuple(row.name for row in usable if row.bits is not None and (bits is None or row.bits < bits))


def _smaller_edge(picture: Picture) -> int | None:
    area = picture.width_px * picture.height_px
    return next((edge for edge in _EDGES_PX if edge * edge < 0.9 * area), None)
