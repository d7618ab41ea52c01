"""The other side of bench/start.py: a LoRA of Z-Image trained by a plain script over diffusers and peft.

It follows diffusers' example scripts: load the pipeline, encode captions and images once and keep them in memory, drop
the encoders, add the adapter, loop. Nothing is written to disk. Prints a JSON line for each step.

    python bench/peer_diffusers.py MODEL IMAGES --steps 4
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ZImagePipeline
from peft import LoraConfig
from PIL import Image

RANK = 16
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    torch.manual_seed(0)

    pipe = ZImagePipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    paths = sorted(args.images.glob("*.png"))
    with torch.no_grad():
        prompts = [
            pipe.encode_prompt(path.with_suffix(".txt").read_text().strip(), do_classifier_free_guidance=False)[0][0]
            for path in paths
        ]
        latents = [_encode(pipe.vae, path) for path in paths]
    transformer = pipe.transformer
    del pipe
    gc.collect()

    transformer.requires_grad_(False)
    targets = [n for n, _ in transformer.named_modules() if n.startswith("layers.") and n.endswith(TARGETS)]
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    transformer.enable_gradient_checkpointing()
    transformer.train()
    params = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4)
    for step in range(args.steps):
        index = step % len(paths)
        sigma = torch.sigmoid(torch.randn(1))
        noise = torch.randn_like(latents[index])
        noisy = torch.lerp(latents[index], noise, sigma)
        predicted = transformer([noisy], 1 - sigma, [prompts[index]], return_dict=False)[0][0]
        loss = F.mse_loss(-predicted, noise - latents[index])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"event": "step.finished", "step": step + 1, "loss": loss.item()}), flush=True)


def _encode(vae: torch.nn.Module, path: Path) -> torch.Tensor:
    """Latents [16, 1, h, w] of an image."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.sample()
    return ((latents - vae.config.shift_factor) * vae.config.scaling_factor)[0][:, None]


if __name__ == "__main__":
    main()
