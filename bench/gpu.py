"""Steps of the 6.15 B-parameter transformer on an accelerator: time, memory, and how much of the card's rate is used.

Random weights, one image, rank-16 and rank-64 LoRA on attention and MLP of the main blocks, captions of 77 tokens. Each
case runs in a process of its own. With offload, frozen weights wait in pinned main memory. Cards of 8 to 24 GB are
emulated by a cap on what the process may allocate. Without an accelerator the same program runs the demo base on
the CPU for a few steps and writes nothing.

    python bench/gpu.py [--only TEXT ...] [--steps 30] [--budget-s SECONDS]

Writes bench/results/<device>-<date>.json; `python bench/report.py` puts it into docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import RESULTS, apply_bench_lora, commit, training_step
from torch import nn

import simpletuner
from simpletuner.config.sections.memory import MemorySection
from simpletuner.memory.checkpointing import apply_checkpointing
from simpletuner.memory.groups import choose_groups
from simpletuner.memory.store import RamStore
from simpletuner.memory.streaming import StreamBuilder
from simpletuner.models.streaming import place_module_
from simpletuner.models.weights import resolve_pipeline
from simpletuner.models.z_image.load import load_transformer, quantisable_layers
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.transformer import (
    KEPT_PRODUCTS,
    TOKEN_MULTIPLE,
    ZImageTransformer,
    ZImageTransformerConfig,
)
from simpletuner.quant.build import PLAIN, quantiser
from simpletuner.quant.linear import FrozenLinear
from simpletuner.train.offload import transformer_offload

CAPTION_TOKENS = 77
PRECISIONS = ("no_change", "int8-torchao", "fp8wo-torchao", "fp8-torchao", "int4-torchao", "nf4-bnb")
OFFLOADS: Mapping[str, Mapping[str, object]] = {
    "no offload": {},
    "10 blocks swapped": {"musubi_blocks_to_swap": 10},
    "20 blocks swapped": {"musubi_blocks_to_swap": 20},
    "blocks, one at a time": {"enable_group_offload": True},
    "blocks, fetched ahead": {"enable_group_offload": True, "group_offload_use_stream": True},
    "layers, fetched ahead": {
        "enable_group_offload": True,
        "group_offload_type": "leaf_level",
        "group_offload_use_stream": True,
    },
}
"""What travels, as options."""
_MATRIX = 8192  # side of the square product that measures the card's rate
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one process measures. `offload`: of OFFLOADS. `keeps_product`: recomputed blocks keep their last product.
    `cap_gib`: memory of the card that it pretends to have."""

    precision: str
    checkpointing: bool
    resolution_px: int = 512
    rank: int = 16
    offload: str = "no offload"
    keeps_product: bool = False
    cap_gib: int | None = None

    @property
    def name(self) -> str:
        parts = [self.precision, f"{self.resolution_px} px", f"rank {self.rank}"]
        parts.append("recomputed" if self.checkpointing else "kept")
        if self.keeps_product:
            parts[-1] += " but a product"
        if self.offload != "no offload":
            parts.append(self.offload)
        if self.cap_gib:
            parts.append(f"{self.cap_gib} GB card")
        return ", ".join(parts)


def cases() -> Iterator[Case]:
    """Every combination worth a row, the most telling first: a short budget still shows what matters."""
    for rank in (64, 16):
        for resolution in (512, 1024):
            for precision in PRECISIONS:
                for checkpointing in (True, False):
                    yield Case(precision=precision, checkpointing=checkpointing, resolution_px=resolution, rank=rank)
    for resolution in (512, 1024):
        for precision in ("no_change", "int8-torchao"):
            yield Case(precision=precision, checkpointing=True, resolution_px=resolution, keeps_product=True)
    for resolution in (512, 1024):
        for precision in ("no_change", "int8-torchao", "nf4-bnb"):
            for offload in list(OFFLOADS)[1:]:
                yield Case(precision=precision, checkpointing=True, resolution_px=resolution, offload=offload)
    yield Case(precision="int8-torchao", checkpointing=False, offload="blocks, fetched ahead")
    for cap, precision, resolution, offload in (
        (24, "no_change", 1024, "no offload"),
        (16, "no_change", 512, "no offload"),
        (16, "no_change", 1024, "10 blocks swapped"),
        (12, "int8-torchao", 1024, "no offload"),
        (10, "int8-torchao", 1024, "no offload"),
        (10, "no_change", 1024, "blocks, fetched ahead"),
        (8, "nf4-bnb", 1024, "no offload"),
        (8, "int8-torchao", 1024, "blocks, fetched ahead"),
    ):
        yield Case(precision=precision, checkpointing=True, resolution_px=resolution, offload=offload, cap_gib=cap)


def measure(case: Case, steps: int, warm_up: int) -> dict[str, object]:
    """Seconds, memory and rate of one case; or why it could not be done."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if case.cap_gib and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.cap_gib * _GIB / total))
    row: dict[str, object] = {"name": case.name, **asdict(case)}
    try:
        transformer = random_transformer(case, device) if device.type == "cuda" else demo_transformer(case)
        apply_bench_lora(transformer, case.rank)
        if case.checkpointing:
            products = KEPT_PRODUCTS if case.keeps_product else ()
            apply_checkpointing(transformer.layers, every=1, products=products)
        side = case.resolution_px // Z_IMAGE.vae_factor
        generator = torch.Generator().manual_seed(0)
        latents = [torch.randn(Z_IMAGE.latent_channels, side, side, generator=generator).to(device)]
        width = transformer.config.cap_feat_dim
        dtype = transformer.x_embedder.weight.dtype
        prompts = [torch.randn(CAPTION_TOKENS, width, generator=generator).to(device, dtype)]
        step = training_step(transformer, latents, prompts, optimizer="adamw_bf16")
        return row | timed(step, device, steps, warm_up) | flops(case, transformer.config)
    except (torch.OutOfMemoryError, RuntimeError, ImportError) as error:
        return row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def timed(step: object, device: torch.device, steps: int, warm_up: int) -> dict[str, object]:
    assert callable(step)
    seconds = []
    for index in range(warm_up + steps):
        begun = time.perf_counter()
        step()  # its loss is read back, so the device is done when it returns
        if index >= warm_up:
            seconds.append(time.perf_counter() - begun)
    measured: dict[str, object] = {"step_s": statistics.median(seconds), "fastest_s": min(seconds), "steps": steps}
    if device.type == "cuda":
        measured["allocated_gib"] = torch.cuda.max_memory_allocated() / _GIB
        measured["reserved_gib"] = torch.cuda.max_memory_reserved() / _GIB
    return measured


def random_transformer(case: Case, device: torch.device) -> ZImageTransformer:
    """The released sizes with random weights, made on the device layer by layer as a run would read them."""
    with torch.device("meta"):
        transformer = ZImageTransformer(ZImageTransformerConfig())
    generator = torch.Generator(device).manual_seed(0)
    placed = _Placed(transformer, case, device, torch.bfloat16)
    for name, module in list(transformer.named_modules()):
        if name in placed.layers:
            assert isinstance(module, nn.Linear)
            placed.put(name, _random(module.weight, generator))
            continue
        for key, parameter in module.named_parameters(recurse=False):
            setattr(module, key, nn.Parameter(_random(parameter, generator), requires_grad=False))
    placed.finish()
    return transformer.train()


class _Placed:
    """Puts the large weights of a model where and how the case wants them. `layers`: names of those it must be given;
    others stay as they are."""

    def __init__(self, transformer: ZImageTransformer, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self._model = transformer
        self._quantise = quantiser(case.precision, dtype)
        layers = quantisable_layers(transformer)
        ordered = [name for name, _ in transformer.named_modules() if name in layers]
        options = MemorySection.model_validate(OFFLOADS[case.offload])
        offload = transformer_offload(options, device)
        self._builder: StreamBuilder | None = None
        if offload is not None:
            groups = choose_groups(ordered, offload.groups)
            store = RamStore(len(groups), pinned=device.type == "cuda")
            self._builder = StreamBuilder(groups, store, device=device, ahead=offload.ahead)
        streamed = frozenset[str]() if self._builder is None else self._builder.names
        self.layers = streamed if self._quantise is None else layers

    def put(self, name: str, weight: torch.Tensor) -> None:
        """The weight [O, I] of a layer, quantised if it is to be."""
        plain = self._quantise is None
        layer = FrozenLinear.from_weight(weight, None, form=PLAIN) if plain else self._quantise(weight)
        place_module_(self._model, name, layer)
        if self._builder is not None and name in self._builder.names:
            assert isinstance(layer, FrozenLinear)
            self._builder.take(name, layer)

    def finish(self) -> None:
        """All layers were put."""
        if self._builder is not None:
            self._builder.attach(self._model)


def _random(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """As large as a trained model's: scaled by the fan-in, norms around one."""
    scale, offset = (like.shape[-1] ** -0.5, 0.0) if like.ndim > 1 else (0.1, 1.0)
    drawn = torch.randn(like.shape, generator=generator, device=generator.device, dtype=torch.bfloat16)
    return drawn.mul_(scale).add_(offset)


def demo_transformer(case: Case) -> ZImageTransformer:
    base = Path(simpletuner.__file__).parent / "assets" / "demo_base"
    files = resolve_pipeline(str(base), spec=Z_IMAGE).transformer
    transformer = load_transformer(files, dtype=torch.float32)
    placed = _Placed(transformer, case, torch.device("cpu"), torch.float32)
    for name in placed.layers:
        placed.put(name, transformer.get_submodule(name).weight.detach())
    placed.finish()
    return transformer.train()


def flops(case: Case, config: ZImageTransformerConfig) -> dict[str, object]:
    """TFLOP of a step's matrix products in the main blocks: forward and gradient of the input, twice forward if
    recomputed. The adapter's own are below 1 % of them and not counted."""
    image = (case.resolution_px // (Z_IMAGE.vae_factor * Z_IMAGE.patch)) ** 2
    tokens = sum(-(-count // TOKEN_MULTIPLE) * TOKEN_MULTIPLE for count in (image, CAPTION_TOKENS))
    weights = config.n_layers * (4 * config.dim**2 + 3 * config.dim * config.ffn_dim)
    forward = 2 * weights * tokens + config.n_layers * 4 * tokens**2 * config.dim
    # Attention's backward multiplies two and a half times as much as its forward, a frozen layer's just as much.
    backward = 2 * weights * tokens + config.n_layers * 10 * tokens**2 * config.dim
    again = forward if case.checkpointing else 0
    if case.keeps_product:
        again -= 2 * config.n_layers * config.dim * config.ffn_dim * tokens
    return {"tflop": (forward + again + backward) / 1e12, "tokens": tokens}


def matrix_rate(device: torch.device) -> float:
    """TFLOP/s of a large bf16 product: what the card gives, not what its sheet says."""
    a, b = (torch.randn(_MATRIX, _MATRIX, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(20):
        begun = time.perf_counter()
        a @ b
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * _MATRIX**3 / statistics.median(seconds[5:]) / 1e12


def describe(row: dict[str, object]) -> str:
    if "failed" in row:
        return f"{row['name']:55} {row['failed']}"
    memory = f"{row['allocated_gib']:6.2f} GiB" if "allocated_gib" in row else ""
    return f"{row['name']:55} {row['step_s']:8.3f} s {memory}"


def main(argv: Sequence[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="cases whose name has all of these words")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no case after so many seconds")
    args = parser.parse_args(argv)
    chosen = [case for case in cases() if all(word in case.name for word in args.only)]
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        print("No accelerator: the demo base on the CPU, to see that the program runs.")
        chosen = [Case(precision=precision, checkpointing=True, resolution_px=128) for precision in PRECISIONS]
        chosen += [
            Case(precision="int8-torchao", checkpointing=True, keeps_product=True, resolution_px=128, offload=offload)
            for offload in list(OFFLOADS)[1:]
        ]
        args.steps, args.warm_up = min(args.steps, 2), min(args.warm_up, 1)
    begun, rows = time.perf_counter(), []
    context = multiprocessing.get_context("spawn")
    for case in chosen:
        if time.perf_counter() - begun > args.budget_s:
            print(f"out of time: {len(chosen) - len(rows)} cases left")
            break
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (case, args.steps, args.warm_up)))
        print(describe(rows[-1]), flush=True)
    if has_gpu:
        save(rows, matrix_rate(torch.device("cuda")))
    return rows


def save(rows: Sequence[dict[str, object]], rate: float) -> None:
    device = torch.cuda.get_device_name()
    today = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    document = {
        "commit": commit(),
        "device": device,
        "date": today,
        "torch": torch.__version__,
        "matrix_tflops": rate,
        "rows": list(rows),
    }
    path = RESULTS / f"{name}-{today}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
