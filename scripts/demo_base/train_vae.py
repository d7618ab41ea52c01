"""Train the demo autoencoder (8 x 8 pixels to 16 channels) on invented textures and drawn scenes.

No photograph is used: the photographs that measure.py reconstructs were never seen. Run through train.py, or alone:
`python -m scripts.demo_base.train_vae --work DIR --budget-minutes 30 [--device cuda]`; a second run goes on where the
first one stopped.
"""

import argparse
import math
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from scripts.demo_base import scenes
from scripts.demo_base.optim import (
    Average,
    MuonAdamW,
    average_over_processes,
    join_processes,
    wait_for_processes,
    warmup_cosine,
)
from scripts.demo_base.textures import texture

NUM_TEXTURES = 6000
NUM_SCENES = 2000
NUM_CHECKED = 64  # pictures kept out of training, to follow its progress

# Legend: B batch, C channels, H height, W width, N pictures.


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder; its residual branches start at zero, so that it starts as an almost linear network."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        sample_size=scenes.IMAGE_PX,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    for name, parameter in vae.named_parameters():
        if name.endswith("conv2.weight"):
            nn.init.zeros_(parameter)
    return vae


def draw_pictures(seed: int, *, num_textures: int, num_scenes: int) -> Tensor:
    """Training pictures as bytes, [N, H, W, 3]."""
    numpy_rng, python_rng = np.random.default_rng(seed), random.Random(seed)
    held_out = frozenset(scenes.held_out_combinations())
    pictures = [np.asarray(texture(numpy_rng)) for _ in range(num_textures)]
    drawn = (scenes.training_scene(python_rng, held_out) for _ in range(num_scenes))
    pictures += [np.asarray(scenes.draw_scene(python_rng, scene)) for scene in drawn]
    return torch.from_numpy(np.stack(pictures))


def load_or_draw(work: Path) -> Tensor:
    """All the training pictures, drawn by every core the first time. [N, H, W, 3] bytes."""
    path = work / "vae_pictures.pt"
    if not path.exists():
        parts = 32
        jobs = [(seed, NUM_TEXTURES // parts, NUM_SCENES // parts) for seed in range(parts)]
        with multiprocessing.get_context("spawn").Pool() as pool:
            torch.save(torch.cat(pool.starmap(_draw_part, jobs)), path)
    pictures: Tensor = torch.load(path, mmap=True)
    return pictures


def train(work: Path, *, device: str, budget_s: float, batch_size: int, rank: int = 0) -> AutoencoderKL:
    """Train for `budget_s` in all, over however many runs, and return the averaged autoencoder."""
    if rank == 0:
        load_or_draw(work)
    wait_for_processes()
    pictures = load_or_draw(work)[NUM_CHECKED:].to(device)
    vae = build_vae().to(device=device, memory_format=torch.channels_last)
    optimizer = _optimizer(vae)
    average = Average(vae, decay=0.998)
    state_path = work / "vae_state.pt"
    step, spent_s = 0, 0.0
    if state_path.exists():
        step, spent_s = _load_state(state_path, vae, optimizer, average)
    torch.manual_seed(1000 * rank + step)
    parameters = list(vae.parameters())
    started, saved, shown = time.monotonic() - spent_s, time.monotonic(), 0.0
    while spent_s < budget_s:
        factor = warmup_cosine(spent_s / budget_s)
        batch_BCHW = _random_batch(pictures, batch_size, full=step % 8 == 7)
        loss, error = reconstruction_loss(vae, batch_BCHW, device=device)
        torch.autograd.backward(loss)
        spent_s = average_over_processes(parameters, time.monotonic() - started)
        optimizer.step(muon_lr=2.5e-3 * factor, adamw_lr=2e-3 * factor)
        average.update(vae)
        step += 1
        shown = error if shown == 0.0 else 0.99 * shown + 0.01 * error
        if step % 100 == 0 and rank == 0:
            print(f"vae step {step} {spent_s:.0f} s, training PSNR {decibel(shown):.2f} dB", flush=True)
        if time.monotonic() - saved > 60 and rank == 0:
            saved = time.monotonic()
            _save_state(state_path, vae, optimizer, average, step, spent_s)
    if rank == 0:
        _save_state(state_path, vae, optimizer, average, step, spent_s)
    average.swap(vae)
    return vae


def reconstruction_loss(vae: AutoencoderKL, batch_BCHW: Tensor, *, device: str) -> tuple[Tensor, float]:
    """L1 + squared error + a light pull of the latents to a unit normal; and the plain squared error in [-1, 1]."""
    with torch.autocast(device, dtype=torch.bfloat16):
        posterior = vae.encode(batch_BCHW).latent_dist
        restored_BCHW = vae.decode(posterior.sample()).sample.float()
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    squared = F.mse_loss(restored_BCHW, batch_BCHW)
    loss = F.l1_loss(restored_BCHW, batch_BCHW) + 4 * squared + 2e-4 * divergence
    return loss, float(squared.detach())


def decibel(squared_error: float) -> float:
    """PSNR of pictures in [-1, 1] from their mean squared error."""
    return 10 * math.log10(4 / squared_error)


@torch.no_grad()
def export(vae: AutoencoderKL, pictures_BCHW: Tensor, folder: Path) -> None:
    """Give the latents of `pictures_BCHW` mean 0 and deviation 1 through the config's shift and scaling; save in bf16.

    Channels are drawn half-way towards equal spread: the scale goes into the last encoder and the first decoder layer.
    """
    latents = vae.encode(pictures_BCHW).latent_dist.mode()
    spread_C = latents.std(dim=(0, 2, 3)).clamp_min(1e-3)
    _rescale_latents(vae, (spread_C / spread_C.square().mean().sqrt()).rsqrt())
    latents = vae.encode(pictures_BCHW).latent_dist.mode()
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 4), scaling_factor=round(1 / float(latents.std()), 4)
    )
    vae.to(device="cpu", dtype=torch.bfloat16, memory_format=torch.contiguous_format).save_pretrained(folder)


def checked_pictures(work: Path) -> Tensor:
    """The pictures that training never sees, in [-1, 1]. [N, 3, H, W]"""
    return _to_model(load_or_draw(work)[:NUM_CHECKED])


def _rescale_latents(vae: AutoencoderKL, gain_C: Tensor) -> None:
    """Multiply latent channel c by gain_C[c] without changing what is decoded."""
    last, first = vae.encoder.conv_out, vae.decoder.conv_in
    both = torch.cat([gain_C, torch.ones_like(gain_C)])
    last.weight.mul_(both.view(-1, 1, 1, 1))
    last.bias.mul_(both)
    last.bias[len(gain_C) :] += 2 * gain_C.log()
    first.weight.div_(gain_C.view(1, -1, 1, 1))


def _draw_part(seed: int, num_textures: int, num_scenes: int) -> Tensor:
    torch.set_num_threads(1)
    pictures = draw_pictures(seed, num_textures=num_textures, num_scenes=num_scenes)
    return pictures[torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))]


def _to_model(pictures_NHWC: Tensor) -> Tensor:
    return (pictures_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _random_batch(pictures: Tensor, batch_size: int, *, full: bool) -> Tensor:
    """Mirrored, turned and re-coloured crops of 64 px, or a quarter as many whole pictures."""
    size, count = (pictures.shape[1], batch_size // 4) if full else (64, batch_size)
    room = pictures.shape[1] - size
    crops = []
    for index in torch.randint(len(pictures), (count,)).tolist():
        y, x = torch.randint(room + 1, (2,)).tolist()
        crop = pictures[index, y : y + size, x : x + size]
        crop = crop.flip(1) if float(torch.rand(())) < 0.5 else crop
        crops.append(crop.transpose(0, 1) if float(torch.rand(())) < 0.3 else crop)
    batch = _to_model(torch.stack(crops))
    gain = 1 + 0.15 * torch.randn(count, 1, 1, 1, device=batch.device)
    offset = 0.1 * torch.randn(count, 3, 1, 1, device=batch.device)
    changed = torch.rand(count, 1, 1, 1, device=batch.device) < 0.5
    return torch.where(changed, (batch * gain + offset).clamp(-1, 1), batch)


def _optimizer(vae: AutoencoderKL) -> MuonAdamW:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in vae.named_parameters():
        ends = name in ("encoder.conv_in.weight", "decoder.conv_out.weight")
        (matrices if parameter.ndim == 4 and not ends else others).append(parameter)
    return MuonAdamW(matrices, others)


def _save_state(
    path: Path, vae: AutoencoderKL, optimizer: MuonAdamW, average: Average, step: int, spent_s: float
) -> None:
    state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "average": average.values}
    torch.save({**state, "step": step, "spent_s": spent_s}, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _load_state(path: Path, vae: AutoencoderKL, optimizer: MuonAdamW, average: Average) -> tuple[int, float]:
    state = torch.load(path, map_location=vae.device)
    vae.load_state_dict(state["vae"])
    optimizer.load_state_dict(state["optimizer"])
    average.values, average.num_updates = state["average"], state["step"]
    return state["step"], state["spent_s"]


def main() -> None:
    """Train and export the autoencoder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and training state")
    parser.add_argument("--export", type=Path, help="folder to save the autoencoder to")
    parser.add_argument("--budget-minutes", type=float, default=30)
    parser.add_argument("--batch-size", type=int, default=16, help="of each process")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rank = join_processes()
    vae = train(
        options.work,
        device=options.device,
        budget_s=60 * options.budget_minutes,
        batch_size=options.batch_size,
        rank=rank,
    )
    if options.export and rank == 0:
        vae.float()
        export(vae, checked_pictures(options.work).to(options.device), options.export)


if __name__ == "__main__":
    main()
