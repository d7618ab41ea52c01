"""Optimizers by name, with what they can do and what they take. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from simpletuner.catalog.libraries import (
    BITSANDBYTES,
    OPTIMI,
    PRODIGY,
    PYTORCH_OPTIMIZER,
    SCHEDULEFREE,
    TORCHAO,
    Library,
)

ANY_DEVICE = ("cpu", "cuda", "mps")
_CPU_CUDA = ("cpu", "cuda")
_CUDA = ("cuda",)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates of a LoRA: a `usual` one, and those outside which training mostly stands still or falls apart."""

    usual: float
    low: float = 0.0
    high: float = 1e-2


@dataclass(frozen=True, kw_only=True)
class Argument:
    """A key of `optimizer_config`. Numbers lie in `low`..`high`; a text is one of `choices`.

    `default` is told to the library where ours differs from its own; None leaves the library's. `shapes_state`: a
    state saved with another value does not fit.
    """

    name: str
    kind: Literal["flag", "integer", "number", "text"]
    low: float = float("-inf")
    high: float = float("inf")
    choices: tuple[str, ...] = ()
    default: bool | int | float | str | None = None
    shapes_state: bool = False


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One that this version runs.

    `betas`: the defaults; empty if it has none. `state_bytes`: what it keeps between steps, per element of a float32
    matrix of 16 x 3840. `devices`: torch device types that it runs on. `epsilon`: reads
    adam_epsilon. `finds_rate`: the learning rate is a factor on one that it finds itself.
    `averages_weights`: what it trains on differs from what it has learnt, see `optim.averaging`; it wants no falling
    learning rate. `matrices_only`: cannot move vectors. `instead`: the nearest one that runs everywhere.
    """

    name: str
    state_bytes: float
    library: Library | None = None
    betas: tuple[float, ...] = (0.9, 0.999)
    devices: tuple[str, ...] = ANY_DEVICE
    rates: Rates = field(default_factory=lambda: Rates(usual=1e-4))
    epsilon: bool = True
    finds_rate: bool = False
    averages_weights: bool = False
    matrices_only: bool = False
    arguments: tuple[Argument, ...] = ()
    instead: str = "adamw_bf16"

    @property
    def needs_cuda(self) -> bool:
        return self.devices == _CUDA


@dataclass(frozen=True, kw_only=True)
class RefusedOptimizer:
    """One that configurations name and that is not to be had here. `why` ends the code E-OPTIMIZER-..."""

    name: str
    why: Literal["DEEPSPEED", "VARIANT", "UNPUBLISHED", "SDNQ", "SPARSE"]
    instead: str


# Lion moves every element by the rate.
_LION_RATES = Rates(usual=2e-5, high=1e-3)
_LION_BETAS = (0.9, 0.99)
_SGD_RATES = Rates(usual=1e-1, low=1e-3, high=1.0)
_MOMENTUM = Argument(name="momentum", kind="number", low=0, high=1, default=0.9, shapes_state=True)


def _own() -> Iterator[Optimizer]:
    rounding = Argument(name="rounding", kind="text", choices=("stochastic", "kahan"))
    yield Optimizer(name="adamw_bf16", state_bytes=4, arguments=(rounding,))
    yield Optimizer(name="adamw", state_bytes=8, arguments=(Argument(name="amsgrad", kind="flag", shapes_state=True),))
    yield Optimizer(name="lion", state_bytes=4, betas=_LION_BETAS, epsilon=False, rates=_LION_RATES)


def _adapting() -> Iterator[Optimizer]:
    """Those that find their own rate, want no schedule, or look at matrices as a whole."""
    yield Optimizer(
        name="prodigy",
        state_bytes=16,
        library=PRODIGY,
        rates=Rates(usual=1.0, low=0.05, high=10.0),
        finds_rate=True,
        arguments=(
            Argument(name="d_coef", kind="number", low=1e-3, high=1e3),
            Argument(name="d0", kind="number", low=1e-12, high=1.0),
            Argument(name="growth_rate", kind="number", low=1.0),
            Argument(name="slice_p", kind="integer", low=1, shapes_state=True),
            Argument(name="use_bias_correction", kind="flag", default=True),
            Argument(name="safeguard_warmup", kind="flag", default=True),
            Argument(name="decouple", kind="flag"),
        ),
    )
    yield Optimizer(
        name="adamw_schedulefree",
        state_bytes=8,
        library=SCHEDULEFREE,
        rates=Rates(usual=3e-4),
        averages_weights=True,
        arguments=(
            Argument(name="r", kind="number", low=0),
            Argument(name="weight_lr_power", kind="number", low=0),
        ),
    )
    # transformers' Adafactor without its own schedule; torch's measures the step by the size of the weights, which
    # holds the second matrix of a LoRA, zero at first, where it is.
    yield Optimizer(
        name="adafactor",
        state_bytes=0.26,
        betas=(),
        epsilon=False,
        arguments=(
            Argument(name="clip_threshold", kind="number", low=1e-3),
            Argument(name="decay_rate", kind="number", low=-1, high=0),
            Argument(name="scale_parameter", kind="flag", default=False),
        ),
    )
    yield Optimizer(
        name="soap",
        state_bytes=8.04,
        library=PYTORCH_OPTIMIZER,
        betas=(0.95, 0.95),
        devices=_CPU_CUDA,
        arguments=(
            Argument(name="precondition_frequency", kind="integer", low=1),
            # Of a LoRA's matrices the short side is turned; turning the long one would take its square in memory.
            Argument(name="max_precondition_dim", kind="integer", low=1, default=256, shapes_state=True),
            Argument(name="shampoo_beta", kind="number", low=0, high=1),
            Argument(name="normalize_gradient", kind="flag"),
        ),
    )
    yield Optimizer(
        name="muon",
        state_bytes=4,
        betas=(),
        epsilon=False,
        matrices_only=True,
        arguments=(
            Argument(name="momentum", kind="number", low=0, high=1),
            Argument(name="nesterov", kind="flag"),
            Argument(name="ns_steps", kind="integer", low=1, high=20),
            # Steps as long as AdamW's: its learning rates hold.
            Argument(
                name="adjust_lr_fn", kind="text", choices=("original", "match_rms_adamw"), default="match_rms_adamw"
            ),
        ),
    )


def _bitsandbytes() -> Iterator[Optimizer]:
    """The 8-bit states are bytes with one float32 scale per 256; paged ones can leave the GPU's memory."""
    ademamix = (
        Argument(name="alpha", kind="number", low=0),
        Argument(name="t_alpha", kind="integer", low=1),
        Argument(name="t_beta3", kind="integer", low=1),
    )
    least = Argument(name="min_8bit_size", kind="integer", low=1)
    kinds: tuple[tuple[str, int, tuple[float, ...], Rates, tuple[Argument, ...]], ...] = (
        ("adagrad", 1, (), Rates(usual=1e-3, high=1e-1), ()),
        ("adam", 2, (0.9, 0.999), Rates(usual=1e-4), ()),
        ("adamw", 2, (0.9, 0.999), Rates(usual=1e-4), ()),
        ("ademamix", 3, (0.9, 0.999, 0.9999), Rates(usual=1e-4), ademamix),
        ("lion", 1, _LION_BETAS, _LION_RATES, ()),
    )
    for kind, num_states, betas, rates, arguments in kinds:
        paged = ("", "-paged") if kind not in ("adagrad", "adam") else ("",)
        for suffix in (f"{bits}{page}" for bits in ("", "8bit") for page in paged):
            is_8bit, is_paged = "8bit" in suffix, "paged" in suffix
            near = "lion" if kind == "lion" else "adamw_bf16"
            yield Optimizer(
                name=f"bnb-{kind}{suffix}",
                state_bytes=num_states * (1 + 4 / 256 if is_8bit else 4),
                library=BITSANDBYTES,
                betas=betas,
                devices=_CUDA if is_paged else _CPU_CUDA,
                rates=rates,
                epsilon=kind != "lion",
                arguments=(*arguments, least) if is_8bit else arguments,
                instead=f"bnb-{kind}{suffix}".removesuffix("-paged") if is_paged else near,
            )


def _torchao() -> Iterator[Optimizer]:
    """Blocks of 256 elements (4-bit: 128) with one float32 scale; 8-bit ones and 4-bit ones look values up."""
    block = Argument(name="block_size", kind="integer", low=16, high=4096)
    for name, state_bytes in (
        ("ao-adamw8bit", 2.07),
        ("ao-adamw4bit", 1.07),
        ("ao-adamfp8", 2.03),
        ("ao-adamwfp8", 2.03),
    ):
        yield Optimizer(name=name, state_bytes=state_bytes, library=TORCHAO, devices=_CPU_CUDA, arguments=(block,))


def _optimi() -> Iterator[Optimizer]:
    kinds: tuple[tuple[str, float, tuple[float, ...], tuple[Argument, ...]], ...] = (
        ("stableadamw", 8, (0.9, 0.99), ()),
        ("adamw", 8, (0.9, 0.99), ()),
        ("lion", 4, _LION_BETAS, ()),
        ("radam", 8, (0.9, 0.99), ()),
        (
            "ranger",
            12,
            (0.9, 0.99),
            (Argument(name="k", kind="integer", low=1), Argument(name="alpha", kind="number", low=0, high=1)),
        ),
        ("adan", 16, (0.98, 0.92, 0.99), (Argument(name="adam_wd", kind="flag"),)),
        ("adam", 8, (0.9, 0.99), ()),
        ("sgd", 4, (), (_MOMENTUM, Argument(name="dampening", kind="flag"))),
    )
    rates = {"lion": _LION_RATES, "sgd": _SGD_RATES}
    for kind, state_bytes, betas, arguments in kinds:
        yield Optimizer(
            name=f"optimi-{kind}",
            state_bytes=state_bytes,
            library=OPTIMI,
            betas=betas,
            rates=rates.get(kind, Rates(usual=1e-4)),
            epsilon=kind not in ("lion", "sgd"),
            arguments=arguments,
            instead="lion" if kind == "lion" else "adamw_bf16",
        )


def _torch() -> Iterator[Optimizer]:
    plain = Rates(usual=1e-4)
    decoupled = Argument(name="decoupled_weight_decay", kind="flag")
    kinds: tuple[tuple[str, float, tuple[float, ...], Rates, tuple[Argument, ...]], ...] = (
        ("adam", 8, (0.9, 0.999), plain, (Argument(name="amsgrad", kind="flag", shapes_state=True), decoupled)),
        ("adamax", 8, (0.9, 0.999), plain, ()),
        ("nadam", 8, (0.9, 0.999), plain, (Argument(name="momentum_decay", kind="number", low=0), decoupled)),
        ("radam", 8, (0.9, 0.999), plain, (decoupled,)),
        (
            "rmsprop",
            4,
            (),
            plain,
            (
                Argument(name="alpha", kind="number", low=0, high=1),
                Argument(name="centered", kind="flag", shapes_state=True),
            ),
        ),
        ("sgd", 4, (), _SGD_RATES, (_MOMENTUM, Argument(name="nesterov", kind="flag"))),
        ("asgd", 4, (), _SGD_RATES, (Argument(name="lambd", kind="number", low=0),)),
        ("adagrad", 4, (), Rates(usual=1e-3, high=1e-1), (Argument(name="lr_decay", kind="number", low=0),)),
        (
            "adadelta",
            8,
            (),
            Rates(usual=1.0, low=1e-2, high=10.0),
            (Argument(name="rho", kind="number", low=0, high=1),),
        ),
        (
            "adafactor",
            0.26,
            (),
            Rates(usual=3e-2, low=1e-3, high=1.0),
            (Argument(name="beta2_decay", kind="number", low=-1, high=0), Argument(name="d", kind="number", low=1)),
        ),
    )
    for kind, state_bytes, betas, rates, arguments in kinds:
        yield Optimizer(
            name=f"torch-{kind}",
            state_bytes=state_bytes,
            betas=betas,
            rates=rates,
            epsilon=kind not in ("sgd", "asgd", "adafactor"),
            arguments=arguments,
        )


OPTIMIZERS: Mapping[str, Optimizer] = MappingProxyType(
    {
        optimizer.name: optimizer
        for family in (_own, _adapting, _bitsandbytes, _torchao, _optimi, _torch)
        for optimizer in family()
    }
)

REFUSED_OPTIMIZERS: Mapping[str, RefusedOptimizer] = MappingProxyType(
    {
        refused.name: refused
        for refused in (
            RefusedOptimizer(name="deepspeed-adamw", why="DEEPSPEED", instead="bnb-adamw8bit-paged"),
            RefusedOptimizer(name="dion", why="UNPUBLISHED", instead="muon"),
            RefusedOptimizer(name="adamw_schedulefree+aggressive", why="VARIANT", instead="adamw_schedulefree"),
            RefusedOptimizer(name="adamw_schedulefree+no_kahan", why="VARIANT", instead="adamw_schedulefree"),
            RefusedOptimizer(name="torch-sparseadam", why="SPARSE", instead="torch-adam"),
            RefusedOptimizer(name="sdnq-adamw", why="SDNQ", instead="bnb-adamw8bit"),
            RefusedOptimizer(name="sdnq-adamw+no_quant", why="SDNQ", instead="adamw"),
            RefusedOptimizer(name="sdnq-adafactor", why="SDNQ", instead="adafactor"),
            RefusedOptimizer(name="sdnq-came", why="SDNQ", instead="adafactor"),
            RefusedOptimizer(name="sdnq-lion", why="SDNQ", instead="bnb-lion8bit"),
            RefusedOptimizer(name="sdnq-muon", why="SDNQ", instead="muon"),
            RefusedOptimizer(name="sdnq-muon+quantized_matmul", why="SDNQ", instead="muon"),
        )
    }
)

# Names of the same update: ours of Lion rounds stochastically, ours of AdamW picks the fastest loop itself.
OPTIMIZER_SPELLINGS = (
    ("stochastic-lion", "lion"),
    ("torch-adamw", "adamw"),
    ("adamw_fused", "adamw"),
    ("adamw_torchao", "adamw"),
)

MOVE_ALONE = frozenset(
    name for name in OPTIMIZERS if name.startswith("torch-") or name in ("adamw", "adamw_bf16", "lion", "adafactor")
)
"""Those that move each parameter by its own gradient and state alone, and keep no count for all of them together."""

ROUNDS_WELL = frozenset(name for name in OPTIMIZERS if name.startswith("optimi-") or name in ("adamw_bf16", "lion"))
"""Those that lose no small change to the rounding of bfloat16 weights."""
