"""The optimizers of other packages, each imported when it is asked for and not before.

A function here takes a name of the catalog and returns what makes the optimizer from parameters and keywords.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import torch

Make = Callable[..., torch.optim.Optimizer]

_TORCH = {
    "torch-adam": "Adam",
    "torch-adamax": "Adamax",
    "torch-nadam": "NAdam",
    "torch-radam": "RAdam",
    "torch-rmsprop": "RMSprop",
    "torch-sgd": "SGD",
    "torch-asgd": "ASGD",
    "torch-adagrad": "Adagrad",
    "torch-adadelta": "Adadelta",
    "torch-adafactor": "Adafactor",
    "muon": "Muon",
}
_BITSANDBYTES = {"adagrad": "Adagrad", "adam": "Adam", "adamw": "AdamW", "ademamix": "AdEMAMix", "lion": "Lion"}
_TORCHAO = {
    "ao-adamw8bit": "AdamW8bit",
    "ao-adamw4bit": "AdamW4bit",
    "ao-adamfp8": "AdamFp8",
    "ao-adamwfp8": "AdamWFp8",
}
_OPTIMI = {
    "optimi-stableadamw": "StableAdamW",
    "optimi-adamw": "AdamW",
    "optimi-lion": "Lion",
    "optimi-radam": "RAdam",
    "optimi-ranger": "Ranger",
    "optimi-adan": "Adan",
    "optimi-adam": "Adam",
    "optimi-sgd": "SGD",
}


def of_torch(name: str) -> Make:
    """`torch.optim`; Muon is Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon)."""
    make: Make = getattr(torch.optim, _TORCH[name])
    return make


def of_transformers(name: str) -> Make:
    """Adafactor (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235) at the rate it is given."""
    adafactor = _quiet_import("transformers.optimization").Adafactor
    return lambda params, **options: adafactor(params, relative_step=False, warmup_init=False, **options)


def of_bitsandbytes(name: str) -> Make:
    """Dettmers et al. 2022, https://arxiv.org/abs/2110.02861; AdEMAMix is Pagliardini et al. 2024,
    https://arxiv.org/abs/2409.03137."""
    kind, *_ = name.removeprefix("bnb-").removesuffix("-paged").partition("8bit")
    words = ("Paged" if name.endswith("-paged") else "", _BITSANDBYTES[kind], "8bit" if "8bit" in name else "")
    make: Make = getattr(_quiet_import("bitsandbytes.optim"), "".join(words))
    return make


def of_torchao(name: str) -> Make:
    """Adam with 8-bit, 4-bit (Li et al. 2023, https://arxiv.org/abs/2309.01507) or float8 states.

    The library compiles its step. Where there is nothing to compile for, that takes longer than it saves, or a
    compiler that is not there: then the step runs as it is written.
    """
    base: Any = getattr(_quiet_import("torchao.optim"), _TORCHAO[name])

    class Uncompiled(base):
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            with torch.compiler.set_stance("force_eager"):
                loss: float | None = super().step(closure)
            return loss

    def make(params: list[torch.nn.Parameter], **options: object) -> torch.optim.Optimizer:
        can_compile = all(p.is_cuda for p in params) and importlib.util.find_spec("triton") is not None
        optimizer: torch.optim.Optimizer = (base if can_compile else Uncompiled)(params, **options)
        return optimizer

    return make


def of_optimi(name: str) -> Make:
    """Optimizers that keep bfloat16 parameters exact by Kahan summation (https://optimi.benjaminwarner.dev)."""
    make: Make = getattr(_quiet_import("optimi"), _OPTIMI[name])
    return make


def of_prodigy(name: str) -> Make:
    """Mishchenko & Defazio 2023, https://arxiv.org/abs/2306.06101."""
    prodigy = _quiet_import("prodigyopt").Prodigy

    def make(params: list[torch.nn.Parameter], **options: object) -> torch.optim.Optimizer:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that weight decay is decoupled
            optimizer: torch.optim.Optimizer = prodigy(params, **options)
        return optimizer

    return make


def of_schedulefree(name: str) -> Make:
    """Defazio et al. 2024, https://arxiv.org/abs/2405.15682. The optimizer is made ready to train."""
    schedulefree = _quiet_import("schedulefree").AdamWScheduleFree

    def make(params: list[torch.nn.Parameter], **options: object) -> torch.optim.Optimizer:
        optimizer = schedulefree(params, **options)
        optimizer.train()
        made: torch.optim.Optimizer = optimizer
        return made

    return make


def of_pytorch_optimizer(name: str) -> Make:
    """SOAP (Vyas et al. 2024, https://arxiv.org/abs/2409.11321). Its first update only looks at the gradient."""
    make: Make = _quiet_import("pytorch_optimizer").SOAP
    return make


MAKERS: Mapping[str, Callable[[str], Make]] = MappingProxyType(
    {
        **dict.fromkeys(_TORCH, of_torch),
        **dict.fromkeys(_TORCHAO, of_torchao),
        **dict.fromkeys(_OPTIMI, of_optimi),
        **{f"bnb-{kind}{bits}": of_bitsandbytes for kind in _BITSANDBYTES for bits in ("", "8bit")},
        **{
            f"bnb-{kind}{bits}-paged": of_bitsandbytes
            for kind in ("adamw", "ademamix", "lion")
            for bits in ("", "8bit")
        },
        "adafactor": of_transformers,
        "prodigy": of_prodigy,
        "adamw_schedulefree": of_schedulefree,
        "soap": of_pytorch_optimizer,
    }
)


def _quiet_import(module: str) -> ModuleType:
    """Import it without what it has to say about kernels that it did not find."""
    with _silence():
        return importlib.import_module(module)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
