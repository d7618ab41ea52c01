"""Load the 6.15 B-parameter transformer in few bits and train two LoRA steps on a CPU: peak memory and seconds.

A checkpoint of the released sizes is written to a temporary folder first (12.3 GB in bf16, three shards): every tensor
is a piece of one block of normal numbers, scaled as `common.random_weights_` does, so that it takes no longer than
the disk does. Each precision then runs in a process of its own, through the loader and the step of a run: rank-16
LoRA on attention and MLP of the main blocks, `adamw_bf16`, one image of 256 px, a caption of 32 tokens, every block
recomputed. The system's high-water mark of resident memory is set back between loading and training.

    python bench/full_size.py [--precisions int8-torchao nf4-bnb] [--folder /tmp] [--layers 30] [--write-nothing]

Writes bench/results/full_size.json; `python bench/report.py` puts it into docs/performance.md. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from common import Sample, apply_bench_lora, make_batch, save_result, training_step
from torch import Tensor, nn

from simpletuner.memory.checkpointing import apply_checkpointing
from simpletuner.models.files import WeightFiles
from simpletuner.models.tensors import write_tensors
from simpletuner.models.z_image.load import load_transformer
from simpletuner.models.z_image.transformer import ZImageTransformer, ZImageTransformerConfig
from simpletuner.quant.build import quantiser
from simpletuner.train.device import choose_compute

PRECISIONS = ("int8-torchao", "nf4-bnb")
AIMS_GIB = {"int8-torchao": 11.0, "nf4-bnb": 8.0}  # of the whole, loading and training
LOAD_MARGIN_GIB = 1.0  # that loading may take beside the quantised model
SAMPLE = Sample(height=32, width=32, caption_tokens=32)
NUM_SHARDS = 3
NUM_STEPS = 2
_GIB = 2**30
_MARGIN = 1 << 20  # numbers by which two tensors' pieces of the random block may be shifted


def main() -> None:
    args = _arguments()
    if args.child:
        print(json.dumps(measure(args.child, Path(args.folder))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        begun = time.monotonic()
        num_params = write_checkpoint(Path(folder), ZImageTransformerConfig(n_layers=args.layers))
        written_s = time.monotonic() - begun
        rows = []
        for precision in args.precisions:
            command = [sys.executable, __file__, "--child", precision, "--folder", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps(rows[-1], indent=2))
    result = {"num_params": num_params, "written_s": written_s, "rows": rows}
    if not args.write_nothing:
        print(save_result("full_size", result))


def write_checkpoint(folder: Path, config: ZImageTransformerConfig) -> int:
    """A transformer in diffusers' layout, random in bf16. Returns how many numbers it holds."""
    with torch.device("meta"):
        model = ZImageTransformer(config)
    (folder / "config.json").write_text(json.dumps({**asdict(config), "n_kv_heads": config.n_heads}))
    tensors = dict(_random_tensors(model))
    names = list(tensors)
    per_shard = -(-len(names) // NUM_SHARDS)
    for index in range(NUM_SHARDS):
        shard = {name: tensors[name] for name in names[index * per_shard : (index + 1) * per_shard]}
        write_tensors(folder / f"model-{index + 1:05}-of-{NUM_SHARDS:05}.safetensors", shard, {"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def _random_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, a piece of the random block of its scale) for each parameter; the blocks lie in memory once."""
    generator = torch.Generator().manual_seed(0)
    largest = max(parameter.numel() for parameter in model.parameters())
    noise = torch.randn(largest + _MARGIN, generator=generator).bfloat16()
    blocks: dict[tuple[float, float], Tensor] = {}
    for name, parameter in model.named_parameters():
        scale, offset = (parameter.shape[-1] ** -0.5, 0.0) if parameter.ndim > 1 else (0.1, 1.0)
        block = blocks.get((scale, offset))
        if block is None:
            block = blocks[scale, offset] = noise * scale + offset
        start = int(torch.randint(_MARGIN, (1,), generator=generator))
        yield name, block[start : start + parameter.numel()].view(parameter.shape)


def measure(precision: str, folder: Path) -> dict[str, object]:
    """Load and train in this process, which has done nothing else before."""
    compute, _ = choose_compute(torch.device("cpu"), mixed_precision="bf16", base_model_default_dtype="bf16")
    files = WeightFiles(
        part="transformer", config_path=folder / "config.json", shards=tuple(sorted(folder.glob("*.safetensors")))
    )
    before = _resident("VmRSS")
    begun = time.monotonic()
    _forget_peak()
    transformer = load_transformer(files, dtype=compute.weights, quantise=quantiser(precision, compute.weights))
    load_s, load_peak = time.monotonic() - begun, _resident("VmHWM")
    model_bytes = sum(tensor.nbytes for tensor in transformer.state_dict().values())
    apply_bench_lora(transformer)
    apply_checkpointing(transformer.layers, every=1)
    latents, embeddings = make_batch((SAMPLE,), transformer.config.cap_feat_dim)
    prompts = [embedding.to(compute.weights) for embedding in embeddings]
    step = training_step(transformer.train(), latents, prompts, optimizer="adamw_bf16")
    _forget_peak()
    steps_s, losses = [], []
    for _ in range(NUM_STEPS):
        begun = time.monotonic()
        losses.append(step())
        steps_s.append(time.monotonic() - begun)
    return {
        "precision": precision,
        "compute": compute.name,
        "threads": torch.get_num_threads(),
        "before_bytes": before,
        "model_bytes": model_bytes,
        "load_s": load_s,
        "load_peak_bytes": load_peak,
        "load_aim_bytes": model_bytes + int(LOAD_MARGIN_GIB * _GIB),
        "steps_s": steps_s,
        "step_peak_bytes": _resident("VmHWM"),
        "aim_bytes": int(AIMS_GIB[precision] * _GIB) if precision in AIMS_GIB else None,
        "losses": losses,
    }


def _resident(field: str) -> int:
    """VmRSS, the resident memory now, or VmHWM, its peak; bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where 12.3 GB are free for a while")
    parser.add_argument("--layers", type=int, default=30, help="fewer for a quick look; the aims are for 30")
    parser.add_argument("--write-nothing", action="store_true", help="print the figures only")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
