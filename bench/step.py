"""Time of a training step: ours against a plain loop over diffusers' module, on the same weights and the same batch.

Both sides train the same rank-16 LoRA on attention and MLP of the main blocks, with every block checkpointed, AdamW
and clipping by norm. Ours is `train.step.train_step` with what a run builds around it (contexts of captions are kept,
as in a run); the other side is the loop of diffusers' example scripts.

    python bench/step.py [--sizes tiny mid] [--precisions fp32 bf16] [--repeats 15] [--threads N] [--profile]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from common import (
    BATCHES,
    LEARNING_RATE,
    LORA_RANK,
    LORA_TARGETS,
    SIZES,
    apply_bench_lora,
    interleaved,
    make_batch,
    random_weights_,
    save_result,
    training_step,
)
from torch import Tensor, nn

from simpletuner.memory.checkpointing import apply_checkpointing
from simpletuner.models.z_image.transformer import KEPT_PRODUCTS, ZImageTransformer, ZImageTransformerConfig

AIMS = {"1 x 256 px": 0.9, "4 mixed": 0.7}
PRECISIONS = ("fp32", "bf16", "bf16 autocast")


def our_step(
    size: str, weights: dict[str, Tensor], latents: Sequence[Tensor], prompts: Sequence[Tensor], precision: str
) -> Callable[[], float]:
    """One update of a run: `train_step` on a micro-batch."""
    transformer = ZImageTransformer(ZImageTransformerConfig(**SIZES[size]))
    transformer.load_state_dict(weights)
    transformer.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    apply_bench_lora(transformer)
    apply_checkpointing(transformer.layers, every=1, products=KEPT_PRODUCTS)
    autocast = torch.bfloat16 if precision == "bf16 autocast" else None
    return training_step(transformer, latents, prompts, autocast=autocast)


def diffusers_step(
    size: str, weights: dict[str, Tensor], latents: Sequence[Tensor], prompts: Sequence[Tensor], precision: str
) -> Callable[[], float]:
    """The same update with diffusers' module, peft's layers and torch's checkpointing."""
    from peft import LoraConfig

    transformer = diffusers_transformer(size)
    transformer.load_state_dict(weights)
    transformer.to(torch.bfloat16 if precision == "bf16" else torch.float32).requires_grad_(False)
    targets = [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("layers.") and name.endswith(LORA_TARGETS)
    ]
    transformer.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))
    params = [p for p in transformer.parameters() if p.requires_grad]
    for param in params:
        param.data = param.data.float()
    transformer.enable_gradient_checkpointing()
    transformer.train()
    optimizer = torch.optim.AdamW(params, lr=LEARNING_RATE)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        sigma_B = torch.sigmoid(torch.randn(len(latents), generator=generator))
        noise = [torch.randn(x.shape, generator=generator) for x in latents]
        noisy = [torch.lerp(x, n, s).to(dtype)[:, None] for x, n, s in zip(latents, noise, sigma_B, strict=True)]
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16 autocast" else nullcontext():
            inputs = [prompt.to(dtype) for prompt in prompts]
            predicted = transformer(noisy, (1 - sigma_B).to(dtype), inputs, return_dict=False)[0]
        losses = [F.mse_loss(-out[:, 0].float(), n - x) for out, n, x in zip(predicted, noise, latents, strict=True)]
        loss = torch.stack(losses).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def diffusers_transformer(size: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import ZImageTransformer2DModel

        options = SIZES[size]
        return ZImageTransformer2DModel(**options, n_kv_heads=options["n_heads"])


def compare(size: str, batch: str, precision: str, repeats: int, profile: bool) -> dict[str, object]:
    """Time both sides in turn; return a row of the result."""
    model = diffusers_transformer(size)
    random_weights_(model)
    weights = model.state_dict()
    num_params = sum(p.numel() for p in model.parameters())
    latents, prompts = make_batch(BATCHES[batch], SIZES[size]["cap_feat_dim"])
    steps = {
        "ours": our_step(size, weights, latents, prompts, precision),
        "diffusers": diffusers_step(size, weights, latents, prompts, precision),
    }
    if profile:
        _profile(steps)
    timing = interleaved(steps, repeats=repeats)
    ratio = timing["ours"].cpu_s / timing["diffusers"].cpu_s
    wall_ratio = timing["ours"].wall_s / timing["diffusers"].wall_s
    ours_s, theirs_s = timing["ours"].cpu_s, timing["diffusers"].cpu_s
    print(
        f"{size:5} {batch:10} {precision:13} ours {ours_s:7.3f}  diffusers {theirs_s:7.3f}"
        f"  ratio {ratio:.3f} (wall {wall_ratio:.3f}; aim {AIMS[batch]})",
        flush=True,
    )
    return {
        "size": size,
        "num_params": num_params,
        "batch": batch,
        "precision": precision,
        "repeats": repeats,
        **{name: row.as_row() for name, row in timing.items()},
        "ratio_cpu": ratio,
        "ratio_wall": wall_ratio,
        "aim": AIMS[batch],
    }


def _profile(steps: dict[str, Callable[[], float]]) -> None:
    for name, step in steps.items():
        step()
        with torch.profiler.profile() as profiler:
            step()
        print(name)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batches", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["fp32", "bf16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [
        compare(size, batch, precision, args.repeats, args.profile)
        for size in args.sizes
        for batch in args.batches
        for precision in args.precisions
    ]
    if not args.no_save:
        print(save_result("step", {"rows": rows}))


if __name__ == "__main__":
    main()
