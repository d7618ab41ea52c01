"""What the benchmarks share: the models of both sides, batches, interleaved timing, result files."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.adapters.lora import LoraSettings, apply_lora, disabled, trainable_parameters
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.transformer import ZImageTransformer, velocity
from simpletuner.optim.build import build_optimizer
from simpletuner.optim.settings import OptimizerSettings
from simpletuner.train.context import ContextCache
from simpletuner.train.flow import FlowSettings
from simpletuner.train.step import MicroBatch, StepSettings, train_step

RESULTS = Path(__file__).parent / "results"
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "dim": 256,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": 4,
        "cap_feat_dim": 256,
        "axes_dims": (16, 24, 24),
    },
    "mid": {
        "dim": 1024,
        "n_layers": 12,
        "n_refiner_layers": 2,
        "n_heads": 8,
        "cap_feat_dim": 1024,
        "axes_dims": (32, 48, 48),
    },
}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")  # of the main blocks
LORA_RANK = 16
LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of a batch: latent sides (8 px each) and caption tokens."""

    height: int
    width: int
    caption_tokens: int


BATCHES: Mapping[str, Sequence[Sample]] = {
    "1 x 256 px": (Sample(height=32, width=32, caption_tokens=32),),
    "4 mixed": (
        Sample(height=32, width=32, caption_tokens=20),
        Sample(height=40, width=24, caption_tokens=150),
        Sample(height=24, width=24, caption_tokens=60),
        Sample(height=48, width=16, caption_tokens=300),
    ),
}


def random_weights_(model: nn.Module, seed: int = 0) -> None:
    """Weights of the size that a trained model has: no zeros or ones that arithmetic could profit from."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            offset = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + offset)


def make_batch(samples: Sequence[Sample], caption_width: int, seed: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Return latents [16, h, w] and prompt embeddings [S, caption_width]."""
    generator = torch.Generator().manual_seed(seed)
    latents = [torch.randn(16, s.height, s.width, generator=generator) for s in samples]
    prompts = [torch.randn(s.caption_tokens, caption_width, generator=generator) for s in samples]
    return latents, prompts


def apply_bench_lora(transformer: ZImageTransformer, rank: int = LORA_RANK) -> None:
    """The adapter that every benchmark trains: attention and MLP of the main blocks."""
    lora = LoraSettings(rank=rank, alpha=rank, targets=Z_IMAGE.lora_targets("attention+mlp"), seed=0)
    apply_lora(transformer, lora)


def training_step(
    transformer: ZImageTransformer,
    latents: Sequence[Tensor],
    prompts: Sequence[Tensor],
    *,
    optimizer: str = "adamw",
    autocast: torch.dtype | None = None,
) -> Callable[[], float]:
    """One update of a run: `train_step` over a model with its adapter, as a run calls it. Returns the loss."""
    device = latents[0].device
    params = trainable_parameters(transformer)
    moves = build_optimizer(optimizer, params, OptimizerSettings(learning_rate=LEARNING_RATE))
    by_name = {f"caption {i}": prompt for i, prompt in enumerate(prompts)}
    contexts = ContextCache(transformer.refine_context, by_name.__getitem__, device=device, keep=True)
    settings = StepSettings(
        seed=0,
        rank=0,
        flow=FlowSettings(shift=3.0),
        max_grad_norm=1.0,
        clip_by_value=False,
        latents_per_token=Z_IMAGE.latents_per_token,
        uses_dropout=False,
    )
    batch = MicroBatch(index=0, latents=latents, prompts=list(by_name), is_regularisation=False, names=list(by_name))

    def predict(noisy: Sequence[Tensor], sigma_B: Tensor, names: Sequence[str]) -> list[Tensor]:
        with torch.autocast(device.type, autocast) if autocast else nullcontext():
            return velocity(transformer, noisy, sigma_B, contexts.get(names))

    def step() -> float:
        return train_step(
            [batch],
            num_batches=1,
            predict=predict,
            parent=lambda: disabled(transformer),
            params=params,
            optimizer=moves,
            learning_rate=LEARNING_RATE,
            settings=settings,
        ).loss

    return step


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Medians over the repeats, seconds."""

    wall_s: float
    cpu_s: float
    fastest_wall_s: float

    def as_row(self) -> dict[str, float]:
        return {"wall_s": self.wall_s, "cpu_s": self.cpu_s, "fastest_wall_s": self.fastest_wall_s}


def interleaved(steps: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int = 2) -> dict[str, Timing]:
    """Time each step in turn, again and again, so that a disturbance of the machine meets all of them."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(warm_up + repeats):
        for name, step in steps.items():
            begun, begun_cpu = time.perf_counter(), time.process_time()
            step()
            if repeat >= warm_up:
                wall[name].append(time.perf_counter() - begun)
                cpu[name].append(time.process_time() - begun_cpu)
    return {
        name: Timing(
            wall_s=statistics.median(wall[name]),
            cpu_s=statistics.median(cpu[name]),
            fastest_wall_s=min(wall[name]),
        )
        for name in steps
    }


def machine() -> dict[str, object]:
    """The machine by what decides speed, and nothing that identifies it.

    A load average above the number of cores says that other work ran beside the benchmark: trust CPU seconds then, and
    ratios, rather than wall seconds.
    """
    features: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
        features = set(flags.split())
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "architecture": platform.machine(),
        "features": [name for name in CPU_FEATURES if name in features],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def save_result(name: str, result: Mapping[str, object]) -> Path:
    """Write bench/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {"commit": commit(), "machine": machine(), **result}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"
