"""Every event of a run. Rank 0 writes them; the journal, the console, `simpletuner runs` and the server read them.

An event is a frozen dataclass with a `name`. `to_json` and `from_json` are exact inverses. Paths are text; those inside
the output directory are relative to it, with forward slashes. Fields may be added, never renamed or removed: readers
ignore fields that they do not know, and an event that they do not know becomes an `UnknownEvent`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Literal, TypeAlias

from simpletuner.events.codec import DecodeError, JsonValue, decode, encode
from simpletuner.problems import Problem

Level: TypeAlias = Literal["debug", "info", "warning", "error"]
FinalState: TypeAlias = Literal["done", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something happened in a run. The fields `seq`, `time` and `event` belong to the journal."""

    name: ClassVar[str]


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """The process owns the run directory. The recorder writes it, before anything else of the session."""

    name: ClassVar[str] = "run.started"
    run_id: str
    session: int  # 1 for the first start in this directory, 2 after a resume, ...
    version: str
    pid: int
    host: str
    argv: tuple[str, ...]
    output_dir: str
    config_path: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunResumed(Event):
    """The session goes on from a checkpoint; sent before data and model are looked at."""

    name: ClassVar[str] = "run.resumed"
    step: int  # updates that the checkpoint holds
    path: str


@dataclass(frozen=True, kw_only=True)
class RunPlanned(Event):
    """What the run is going to do; the banner of the console. Sent once data, model and device are known."""

    name: ClassVar[str] = "run.planned"
    model: str  # "z_image turbo"
    adapter: str  # "LoRA rank 16"
    precision: str  # "bf16"
    device: str  # "cpu", "cuda:0"
    device_name: str  # "NVIDIA GeForce RTX 4090"
    total_steps: int
    start_step: int = 0  # updates already done before this session
    num_epochs: int
    num_datasets: int
    num_images: int
    num_buckets: int
    effective_batch_size: int
    steps_per_epoch: int | None = None  # of the first epoch, rounded up; later ones differ where datasets come and go
    validation_step_interval: int | None = None  # None: no images during training
    validation_num_inference_steps: int | None = None
    validation_guidance: float | None = None  # Z-Image's scale; other programs' is this plus 1
    validation_sampling_shift: float | None = None
    evaluation_step_interval: int | None = None  # None: no held-out images, or only before and after training
    checkpoint_step_interval: int | None = None
    gradient_checkpointing: bool = False
    memory_total_bytes: int | None = None  # of the device
    memory_free_bytes: int | None = None
    estimated_bytes: int | None = None  # peak of the device, or of main memory on a CPU
    estimated_seconds: float | None = None  # of the whole run
    estimate_source: Literal["computed", "corrected", "measured"] | None = None


@dataclass(frozen=True, kw_only=True)
class RunPhase(Event):
    """Progress of one phase. `key` names the text `phase.<key>`; at most two per second and phase."""

    name: ClassVar[str] = "run.phase"
    key: str
    done: int = 0
    total: int | None = None
    unit: str | None = None  # "images", "bytes", ...: the text `console.unit.<unit>`
    before: int = 0  # of `done`, what was there when the phase began
    elapsed_s: float = 0.0
    detail: str | None = None  # what it works on right now: a file name, a download
    finished: bool = False


@dataclass(frozen=True, kw_only=True)
class RunStopping(Event):
    """Somebody asked the run to stop. `level` 1: finish the step and save; 2: leave without saving; 3: at once."""

    name: ClassVar[str] = "run.stopping"
    level: int
    source: Literal["keyboard", "signal", "command"]


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """The last event of a session."""

    name: ClassVar[str] = "run.finished"
    state: FinalState
    exit_code: int
    reason: str | None = None  # a problem code, or a word such as "stop-requested"
    output: str | None = None  # the resulting weights
    step: int = 0
    seconds: float = 0.0  # of this session


@dataclass(frozen=True, kw_only=True)
class SettingOverridden(Event):
    """The run uses another value than the one asked for. Never silent."""

    name: ClassVar[str] = "setting.overridden"
    option: str
    requested: object  # JSON scalar
    used: object
    reason: str  # key of the message catalogs
    params: Mapping[str, object] = field(default_factory=dict)  # fill the braces of `reason`


@dataclass(frozen=True, kw_only=True)
class ProblemReported(Event):
    """A warning, or the error that ends the run."""

    name: ClassVar[str] = "problem"
    problem: Problem


@dataclass(frozen=True, kw_only=True)
class LogLine(Event):
    """Free text for the log: a library's warning, a traceback. Not translated."""

    name: ClassVar[str] = "log.line"
    level: Level = "info"
    source: str
    message: str


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BucketCount:
    """How many samples one aspect bucket holds."""

    width_px: int
    height_px: int
    num_samples: int


@dataclass(frozen=True, kw_only=True)
class DropCount:
    """How many images were left out for one reason. `reason` names the text `dropped.<reason>`."""

    reason: str
    num_images: int


@dataclass(frozen=True, kw_only=True)
class DatasetPlanned(Event):
    """One dataset is scanned and sorted into buckets."""

    name: ClassVar[str] = "dataset.planned"
    dataset: str
    num_images: int  # usable ones
    num_samples: int  # per epoch, with repeats
    buckets: tuple[BucketCount, ...] = ()
    dropped: tuple[DropCount, ...] = ()
    filled: tuple[BucketCount, ...] = ()  # too few for a batch, so they are shown more often than num_samples says
    pruned: tuple[BucketCount, ...] = ()  # too few for a batch, so they were left out; they are among `dropped`
    batch_mixing: str = "bucket"  # or "packed": its batches mix sizes
    start_epoch: int = 1  # epochs and steps are counted from 1; both ends belong to the schedule
    start_step: int = 1
    end_epoch: int | None = None
    end_step: int | None = None
    steps_of_epoch: int | None = None  # in every epoch it takes part in so many steps only


@dataclass(frozen=True, kw_only=True)
class CacheProgress(Event):
    """How far one cache of one dataset is. At most two per second and cache reach the journal; the last one always."""

    name: ClassVar[str] = "cache.progress"
    dataset: str
    cache: Literal["latents", "prompts"]
    done: int  # entries present, found or computed
    total: int
    num_computed: int = 0  # of `done`, those computed in this session


# --- model -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelLoaded(Event):
    """One component (transformer, vae, text_encoder) is in memory."""

    name: ClassVar[str] = "model.loaded"
    component: str
    num_params: int
    dtype: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AdapterCreated(Event):
    """The trainable adapter is attached."""

    name: ClassVar[str] = "adapter.created"
    num_params: int
    num_modules: int
    rank: int
    alpha: float
    targets: tuple[str, ...]
    kind: str = "LoRA"


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepFinished(Event):
    """One optimizer update is done. Rank 0 writes it, after the gradients were reduced."""

    name: ClassVar[str] = "step.finished"
    step: int  # updates so far, counted from 1
    total: int
    epoch: int  # counted from 1
    loss: float  # mean over the global batch
    grad_norm: float  # before clipping
    learning_rate: float
    step_seconds: float  # wall time from the end of the previous step's work, data included
    samples: int  # in the global batch of this update
    data_seconds: float | None = None  # of step_seconds, waiting for data
    sigma_mean: float | None = None
    rollout_forwards: float | None = None  # extra forward passes per sample, of scheduled sampling
    regularisation_loss: float | None = None  # mean over the samples of regularisation datasets; None without any
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint (or the final weights, `final`) is complete on disk."""

    name: ClassVar[str] = "checkpoint.saved"
    step: int
    path: str
    bytes: int
    seconds: float
    final: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckpointDeleted(Event):
    """An old checkpoint was removed to keep checkpoints_total_limit."""

    name: ClassVar[str] = "checkpoint.deleted"
    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class MemoryMeasured(Event):
    """What one phase of the session took at its height. Sent when training ends, once for each phase."""

    name: ClassVar[str] = "memory.measured"
    phase: str  # "prompts", "latents", "load", "training", "validation"
    host_bytes: int | None = None  # resident memory of the process
    device_bytes: int | None = None  # what the allocator held of the GPU
    allocated_bytes: int | None = None  # of these, what tensors took
    estimated_bytes: int | None = None  # of the device, of main memory on a CPU, as it was estimated


# --- evaluation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """The loss of one set of held-out images: its mean, and that of each noise level."""

    dataset: str  # "pool": of all datasets together
    loss: float
    num_images: int
    by_sigma: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EvaluationFinished(Event):
    """The loss of images that are not trained on. Step 0 is before the first update."""

    name: ClassVar[str] = "evaluation.finished"
    step: int
    loss: float  # mean over all images
    losses: tuple[HeldOutLoss, ...]
    sigmas: tuple[float, ...]  # of `by_sigma`
    seconds: float
    is_averaged: bool = False  # of the moving average of the weights


# --- validation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ValidationStarted(Event):
    """Validation images are about to be made. Step 0 shows the base model."""

    name: ClassVar[str] = "validation.started"
    step: int
    num_images: int


@dataclass(frozen=True, kw_only=True)
class ValidationImage(Event):
    """One validation image is on disk."""

    name: ClassVar[str] = "validation.image"
    prompt_id: str
    prompt: str
    step: int
    seed: int
    width_px: int
    height_px: int
    guidance: float
    path: str
    seconds: float
    is_averaged: bool = False  # of the moving average of the weights


@dataclass(frozen=True, kw_only=True)
class ValidationDrift(Event):
    """How far images of few sampling steps are from those of many: mean relative distance of the latents."""

    name: ClassVar[str] = "validation.drift"
    step: int
    drift: float  # of the model after `step` updates
    base_drift: float  # of the base model, measured in the same way
    num_images: int
    few_steps: int
    many_steps: int
    seconds: float  # that this took


@dataclass(frozen=True, kw_only=True)
class ValidationFinished(Event):
    """All images of one validation are on disk."""

    name: ClassVar[str] = "validation.finished"
    step: int
    num_images: int
    seconds: float
    contact_sheet: str | None = None


# --- reading and writing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class UnknownEvent(Event):
    """An event of another version, kept as it is."""

    name: ClassVar[str] = "unknown"
    event: str
    fields: Mapping[str, object]


EVENTS: Mapping[str, type[Event]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            RunStarted,
            RunResumed,
            RunPlanned,
            RunPhase,
            RunStopping,
            RunFinished,
            SettingOverridden,
            ProblemReported,
            LogLine,
            DatasetPlanned,
            CacheProgress,
            ModelLoaded,
            AdapterCreated,
            StepFinished,
            CheckpointSaved,
            CheckpointDeleted,
            MemoryMeasured,
            EvaluationFinished,
            ValidationStarted,
            ValidationImage,
            ValidationDrift,
            ValidationFinished,
        )
    }
)


def to_json(event: Event) -> dict[str, JsonValue]:
    """The event as one flat JSON object; its name is under "event"."""
    if isinstance(event, UnknownEvent):
        return {"event": event.event, **{key: encode(value) for key, value in event.fields.items()}}
    fields = encode(event)
    assert isinstance(fields, dict)
    return {"event": event.name, **fields}


def from_json(value: Mapping[str, JsonValue]) -> Event:
    """The event of a JSON object; an UnknownEvent for a name or a shape that this version does not know."""
    name = value.get("event")
    fields = {key: item for key, item in value.items() if key != "event"}
    kind = EVENTS.get(name) if isinstance(name, str) else None
    if kind is not None:
        try:
            return decode(kind, fields)
        except DecodeError:
            pass
    return UnknownEvent(event=str(name), fields=fields)
