"""Caches latents in child processes that are killed at random moments until one gets through; compares with a run that
was left alone. Goes on until 20 were killed; prints how many were, and how many got through. POSIX only: it forks.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simpletuner.data.latents import LatentSource, LatentStore, cache_latents, learn_latent_keys
from simpletuner.data.plan import build_plan
from simpletuner.data.records import Plan
from simpletuner.data.spec import DatasetSpec, ResizeSpec
from simpletuner.data.storage import LocalStorage

NUM_IMAGES = 60
MIN_KILLED = 20


class SlowEncoder:
    """Each call takes 5 ms, and rounds differently in another company, as a real VAE may."""

    id = "slow"

    def encode(self, images_BCHW: Tensor) -> Tensor:
        time.sleep(0.005)
        return torch.nn.functional.avg_pool2d(images_BCHW, 8) + images_BCHW.mean() * 1e-3


def main(directory: Path) -> None:
    torch.set_num_threads(1)  # a fork has only the thread that made it
    images = directory / "images"
    images.mkdir()
    for number in range(NUM_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64 + 32 * (number % 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    began_s = time.monotonic()
    untouched = cache(plan_of(images, directory / "alone"), directory / "alone")
    alone_s = time.monotonic() - began_s
    chance, killed, finished = random.Random(1), 0, 0
    while killed < MIN_KILLED:
        cache_dir = directory / f"killed {finished}"
        while (child := start_child(images, cache_dir)) and not outlives(child, chance.uniform(0.0, 2 * alone_s)):
            killed += 1
        finished += 1
        plan = plan_of(images, cache_dir)
        resumed = cache(plan, cache_dir, may_encode=False)
        for sample in plan.samples():
            assert torch.equal(resumed.get(sample), untouched.get(sample)), sample.record.key
    print(killed, finished)


def start_child(images: Path, cache_dir: Path) -> int:
    """Cache everything in a child process; return its id."""
    child = os.fork()
    if child == 0:
        cache(plan_of(images, cache_dir), cache_dir)
        os._exit(0)
    return child


def outlives(child: int, seconds: float) -> bool:
    """Kill a child after `seconds`; return whether it was done by then."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFEXITED(status)


def plan_of(images: Path, cache_dir: Path) -> Plan:
    spec = DatasetSpec(id="all", storage=LocalStorage(folder=images), resize=ResizeSpec(resolution=64))
    return build_plan([spec], batch_size=1, seed=1, cache_dir=cache_dir, on_progress=lambda done, total: None)


def cache(plan: Plan, cache_dir: Path, *, may_encode: bool = True) -> LatentStore:
    def open_encoder() -> SlowEncoder:
        assert may_encode, "everything should be there"
        return SlowEncoder()

    keys = learn_latent_keys(plan, "slow", cache_dir=cache_dir, on_progress=lambda done, total: None)
    return cache_latents(
        plan,
        LatentSource(id="slow", open=open_encoder),
        keys,
        cache_dir=cache_dir,
        directory_of=lambda _: cache_dir / "vae",
        batch_size=4,
        write_batch_size=6,
        on_progress=lambda done, total: None,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
