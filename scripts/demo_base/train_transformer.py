"""Train the demo transformer, by flow matching, on the latents of drawn scenes.

It is the project's own Z-Image transformer at a miniature size, saved in the diffusers layout. Run through train.py, or
alone once `vae`, `text_encoder` and `tokenizer` lie in the base folder:
`python -m scripts.demo_base.train_transformer --work DIR --base DIR --budget-minutes 75 [--device cuda]`.
"""

import argparse
import json
import multiprocessing
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Model

from scripts.demo_base import scenes, text_encoder
from scripts.demo_base.optim import (
    Average,
    MuonAdamW,
    average_over_processes,
    join_processes,
    wait_for_processes,
    warmup_cosine,
)
from simpletuner.models.z_image.transformer import ZImageTransformer, ZImageTransformerConfig

TRANSFORMER_CONFIG = {
    "in_channels": 16,
    "dim": 192,
    "n_layers": 6,
    "n_refiner_layers": 1,
    "n_heads": 6,
    "n_kv_heads": 6,
    "cap_feat_dim": text_encoder.HIDDEN,
    "axes_dims": [8, 12, 12],
    "axes_lens": [1024, 512, 512],
}
SCHEDULER_SHIFT = 3.0
# How many scenes of each picture size, and how often a training step takes that size.
SCENES_OF_SIZE = {(128, 128): 24_000, (144, 112): 2_000, (112, 144): 2_000, (160, 96): 2_000, (96, 160): 2_000}
SQUARE_STEPS = 0.8
NUM_CHECKED = 512  # square scenes kept out of training, to follow its progress
CAPTION_DROPOUT = 0.1
SIGMA_SHIFT = 1.7  # training draws more of the high noise levels, where the picture is decided

# Legend: B batch, C channels, h w latent sides, N scenes, S tokens, D features.


@dataclass(frozen=True, kw_only=True)
class LatentScenes:
    """Encoded scenes of one size: normalised latents [N, C, h, w] and, for each, the index of its caption."""

    latents_NChw: Tensor  # noqa: N815
    caption_of_N: Tensor  # noqa: N815


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The squares, the scenes of other sizes, and the features of each different caption, the empty one first."""

    squares: LatentScenes
    others: list[LatentScenes]
    prompts_SD: list[Tensor]  # noqa: N815


def build_transformer(seed: int = 0) -> ZImageTransformer:
    """An untrained miniature: the last layer starts at zero and the gates of the residual branches a little open."""
    torch.manual_seed(seed)
    transformer = ZImageTransformer(ZImageTransformerConfig.from_dict(TRANSFORMER_CONFIG))
    for name, parameter in transformer.named_parameters():
        if name.startswith("all_final_layer") and "linear" in name:
            nn.init.zeros_(parameter)
        elif "adaLN_modulation.0" in name:
            nn.init.normal_(parameter, std=0.02) if parameter.ndim == 2 else _open_gates(parameter)
        elif name.endswith("pad_token"):
            nn.init.normal_(parameter, std=0.02)
    return transformer


def load_or_encode(work: Path, base: Path) -> TrainingData:
    """Draw and encode the training scenes with every core the first time; later read them back."""
    path = work / "scene_latents.pt"
    if not path.exists():
        jobs = [
            (base, seed, num_scenes // 8, size)
            for size, num_scenes in SCENES_OF_SIZE.items()
            for seed in range(1000, 1008)
        ]
        with multiprocessing.get_context("spawn").Pool() as pool:
            parts = pool.starmap(_encode_part, jobs, chunksize=1)
        torch.save([_joined(parts[start : start + 8]) for start in range(0, len(parts), 8)], path)
    encoded: list[tuple[Tensor, list[str]]] = torch.load(path)
    different = ["", *sorted({caption for _, captions in encoded for caption in captions})]
    index = {caption: i for i, caption in enumerate(different)}
    groups = [
        LatentScenes(latents_NChw=latents, caption_of_N=torch.tensor([index[caption] for caption in captions]))
        for latents, captions in encoded
    ]
    return TrainingData(squares=groups[0], others=groups[1:], prompts_SD=_features(base, different))


def train(work: Path, base: Path, *, device: str, budget_s: float, batch_size: int, rank: int = 0) -> ZImageTransformer:
    """Train for `budget_s` in all, over however many runs, and return the averaged transformer."""
    if rank == 0:
        load_or_encode(work, base)
    wait_for_processes()
    data = _to_device(load_or_encode(work, base), device)
    transformer = build_transformer().to(device)
    optimizer, average = _optimizer(transformer), Average(transformer, decay=0.998)
    state_path = work / "transformer_state.pt"
    step, spent_s = 0, 0.0
    if state_path.exists():
        step, spent_s = _load_state(state_path, transformer, optimizer, average, device)
    torch.manual_seed(1000 * rank + step + 1)
    parameters = list(transformer.parameters())
    started, saved, recent = time.monotonic() - spent_s, time.monotonic(), 1.0
    while spent_s < budget_s:
        group, index_B = _random_batch(data, batch_size)
        sigma_B = _spread_sigmas(batch_size)
        loss = flow_loss(transformer, data.prompts_SD, group, index_B, sigma_B, device=device)
        torch.autograd.backward(loss)
        spent_s = average_over_processes(parameters, time.monotonic() - started)
        factor = warmup_cosine(spent_s / budget_s, warmup=0.01, flat_until=0.4)
        optimizer.step(muon_lr=6e-3 * factor, adamw_lr=3e-3 * factor, weight_decay=0.01)
        average.update(transformer)
        step += 1
        recent += 0.01 * (float(loss.detach()) - recent)
        if step % 200 == 0 and rank == 0:
            print(f"transformer step {step} {spent_s:.0f} s, loss {recent:.4f}", flush=True)
        if rank == 0 and time.monotonic() - saved > 120:
            saved = time.monotonic()
            _save_state(state_path, transformer, optimizer, average, step, spent_s)
    if rank == 0:
        _save_state(state_path, transformer, optimizer, average, step, spent_s)
        print(f"transformer: {step} steps, held-back loss {checked_loss(transformer, data, device):.4f}")
    average.swap(transformer)
    return transformer


def flow_loss(
    transformer: ZImageTransformer,
    prompts_SD: list[Tensor],
    group: LatentScenes,
    index_B: Tensor,
    sigma_B: Tensor,
    *,
    device: str,
) -> Tensor:
    """Mean squared error of the predicted clean - noise, with every tenth caption left out."""
    clean_BChw = group.latents_NChw[index_B.to(device)].float()
    noise_BChw = torch.randn_like(clean_BChw)
    caption_of_B = torch.where(torch.rand(len(index_B)) < CAPTION_DROPOUT, 0, group.caption_of_N[index_B])
    noisy_BChw = torch.lerp(clean_BChw, noise_BChw, sigma_B.to(device).view(-1, 1, 1, 1))
    with torch.autocast(device, dtype=torch.bfloat16):
        context_SD = transformer.refine_context([prompts_SD[i] for i in caption_of_B.tolist()])
        out = torch.stack(transformer(list(noisy_BChw), 1 - sigma_B.to(device), context_SD))
    return (out.float() - (clean_BChw - noise_BChw)).square().mean()


@torch.no_grad()
def checked_loss(transformer: ZImageTransformer, data: TrainingData, device: str) -> float:
    """Loss on the scenes kept out of training, at evenly spread noise levels, always with the same noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        evenly_B = (torch.arange(64) + 0.5) / 64
        losses = [
            flow_loss(transformer, data.prompts_SD, data.squares, index_B, evenly_B, device=device)
            for index_B in torch.split(torch.arange(NUM_CHECKED), 64)
        ]
    return float(torch.stack(losses).mean())


def export(transformer: ZImageTransformer, base: Path) -> None:
    """Save the transformer, the scheduler and the pipeline's index; every weight becomes bf16."""
    model = ZImageTransformer2DModel(**TRANSFORMER_CONFIG)
    model.load_state_dict(transformer.state_dict())
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SCHEDULER_SHIFT),
        vae=AutoencoderKL.from_pretrained(base / "vae", dtype=torch.bfloat16),
        text_encoder=Qwen3Model.from_pretrained(base / "text_encoder", dtype=torch.bfloat16),
        tokenizer=Qwen2Tokenizer.from_pretrained(base / "tokenizer"),
        transformer=model.to(torch.bfloat16),
    ).save_pretrained(base)
    for path in base.rglob("*.safetensors"):
        path.chmod(0o644)  # readable by whoever installs the package
    for path in base.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # a folder of the machine that trained it
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _encode_part(base: Path, seed: int, num_scenes: int, size: scenes.Size) -> tuple[Tensor, list[str]]:
    """Draw scenes and encode them with the base's autoencoder: bf16 latents [N, C, h, w] and captions."""
    torch.set_num_threads(1)
    rng, held_out = random.Random(f"{size} {seed}"), frozenset(scenes.held_out_combinations())
    vae = AutoencoderKL.from_pretrained(base / "vae", dtype=torch.float32).to(memory_format=torch.channels_last)
    latents, captions = [], []
    for start in range(0, num_scenes, 16):
        batch = [scenes.training_scene(rng, held_out, size=size) for _ in range(min(16, num_scenes - start))]
        pictures = np.stack([np.asarray(scenes.draw_scene(rng, scene)) for scene in batch])
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            mode = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mode().float()
        latents.append(((mode - vae.config.shift_factor) * vae.config.scaling_factor).bfloat16().contiguous())
        captions += [scene.caption for scene in batch]
    return torch.cat(latents), captions


def _joined(parts: list[tuple[Tensor, list[str]]]) -> tuple[Tensor, list[str]]:
    return torch.cat([latents for latents, _ in parts]), [caption for _, captions in parts for caption in captions]


def _features(base: Path, captions: list[str]) -> list[Tensor]:
    tokenizer = Qwen2Tokenizer.from_pretrained(base / "tokenizer")
    encoder = Qwen3Model.from_pretrained(base / "text_encoder", dtype=torch.float32)
    features = []
    for start in range(0, len(captions), 256):
        features += text_encoder.encode_prompts(tokenizer, encoder, captions[start : start + 256])
    return features


def _to_device(data: TrainingData, device: str) -> TrainingData:
    squares, *others = (
        LatentScenes(latents_NChw=group.latents_NChw.to(device), caption_of_N=group.caption_of_N)
        for group in (data.squares, *data.others)
    )
    prompts_SD = [prompt.to(device) for prompt in data.prompts_SD]
    return TrainingData(squares=squares, others=others, prompts_SD=prompts_SD)


def _random_batch(data: TrainingData, batch_size: int) -> tuple[LatentScenes, Tensor]:
    """Pictures of one size: mostly squares, never the ones kept out of training."""
    if float(torch.rand(())) < SQUARE_STEPS:
        return data.squares, torch.randint(NUM_CHECKED, len(data.squares.latents_NChw), (batch_size,))
    group = data.others[int(torch.randint(len(data.others), ()))]
    return group, torch.randint(len(group.latents_NChw), (batch_size,))


def _spread_sigmas(count: int) -> Tensor:
    """Noise levels, one from each of `count` equal parts, shifted towards 1. [B]"""
    even = (torch.arange(count) + torch.rand(count)) / count
    return SIGMA_SHIFT * even / (1 + (SIGMA_SHIFT - 1) * even)


def _open_gates(bias: Tensor) -> None:
    """The bias holds scale, gate, scale, gate."""
    scale_attn, gate_attn, scale_ffn, gate_ffn = bias.data.chunk(4)
    for part, value in ((scale_attn, 0.0), (gate_attn, 0.3), (scale_ffn, 0.0), (gate_ffn, 0.3)):
        part.fill_(value)


def _optimizer(transformer: ZImageTransformer) -> MuonAdamW:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in transformer.named_parameters():
        inner = ("attention.to_", "feed_forward.w")
        (matrices if any(part in name for part in inner) else others).append(parameter)
    return MuonAdamW(matrices, others)


def _save_state(
    path: Path, transformer: ZImageTransformer, optimizer: MuonAdamW, average: Average, step: int, spent_s: float
) -> None:
    state = {"transformer": transformer.state_dict(), "optimizer": optimizer.state_dict(), "average": average.values}
    torch.save({**state, "step": step, "spent_s": spent_s}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _load_state(
    path: Path, transformer: ZImageTransformer, optimizer: MuonAdamW, average: Average, device: str
) -> tuple[int, float]:
    state = torch.load(path, map_location=device)
    transformer.load_state_dict(state["transformer"])
    optimizer.load_state_dict(state["optimizer"])
    average.values, average.num_updates = state["average"], state["step"]
    return state["step"], state["spent_s"]


def main() -> None:
    """Train and export the transformer, with the rest of the pipeline that lies beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for latents and training state")
    parser.add_argument("--base", type=Path, required=True, help="pipeline folder with vae, text_encoder, tokenizer")
    parser.add_argument("--budget-minutes", type=float, default=75)
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    rank = join_processes()
    transformer = train(
        options.work,
        options.base,
        device=options.device,
        budget_s=60 * options.budget_minutes,
        batch_size=options.batch_size,
        rank=rank,
    )
    if rank == 0:
        export(transformer.cpu(), options.base)


if __name__ == "__main__":
    main()
