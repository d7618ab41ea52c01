"""Images on disk, encoders that are quick and exact, and the text of problems."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from simpletuner.data.plan import build_plan
from simpletuner.data.records import Plan
from simpletuner.data.spec import DatasetSpec, Sampling
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import SimpletunerError

SaveImage = Callable[..., Path]
MakePlan = Callable[..., Plan]


@pytest.fixture
def save_image() -> SaveImage:
    """save_image(path, size=(w, h), seed=0, **PIL options): smooth random colours, a minute old."""

    def save(path: Path, size: tuple[int, int] = (96, 64), seed: int = 0, **options: object) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        colours = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(path, **options)
        age(path)
        return path

    return save


def age(path: Path, seconds: float = 60) -> None:
    """Move a file's time of change into the past, beyond the grain of any file system's clock."""
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.fixture
def make_plan(tmp_path: Path) -> MakePlan:
    """make_plan(*specs, batch_size=1, seed=42, progress=None) with the cache directory tmp_path/cache."""

    def make(
        *specs: DatasetSpec,
        batch_size: int = 1,
        seed: int = 42,
        progress: list[tuple[int, int]] | None = None,
        sampling: Sampling = "auto-weighting",
    ) -> Plan:
        seen = progress if progress is not None else []
        return build_plan(
            specs,
            batch_size=batch_size,
            seed=seed,
            cache_dir=tmp_path / "cache",
            on_progress=lambda done, total: seen.append((done, total)),
            sampling=sampling,
        )

    return make


@dataclass
class PoolingEncoder:
    """A VAE in miniature: means of 8 x 8 px and their square, 6 channels. Counts what it was asked."""

    id: str = "pooling"
    scale: float = 1.0
    batches: list[int] = field(default_factory=list)
    calls: list[tuple[float, ...]] = field(default_factory=list)
    opened: int = 0

    def open(self) -> PoolingEncoder:
        self.opened += 1
        return self

    def encode(self, images_BCHW: Tensor) -> Tensor:
        assert images_BCHW.dtype == torch.float32
        assert float(images_BCHW.abs().max()) <= 1
        self.batches.append(len(images_BCHW))
        self.calls.append(tuple(float(image.sum()) for image in images_BCHW))
        means = torch.nn.functional.avg_pool2d(images_BCHW, 8)
        return torch.cat([means, means.square()], dim=1) * self.scale


@dataclass
class LetterEncoder:
    """A text encoder in miniature: one token per character, "" included with one token. Counts what it was asked."""

    id: str = "letters"
    dtype: torch.dtype = torch.bfloat16
    batches: list[tuple[str, ...]] = field(default_factory=list)
    opened: int = 0

    def open(self) -> LetterEncoder:
        self.opened += 1
        return self

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        self.batches.append(tuple(prompts))
        tokens = [torch.tensor([1, *(ord(letter) % 97 for letter in prompt)]) for prompt in prompts]
        return [(t[:, None] * torch.linspace(0.1, 1, 8)).to(self.dtype) for t in tokens]


@pytest.fixture
def vae() -> PoolingEncoder:
    return PoolingEncoder()


@pytest.fixture
def text_encoder() -> LetterEncoder:
    return LetterEncoder()


@pytest.fixture
def told() -> Callable[[SimpletunerError], list[str]]:
    """The codes of an error, after making sure that each has a title and a hint in every language."""

    def codes(error: SimpletunerError) -> list[str]:
        for problem in error.problems:
            for language in LANGUAGES:
                title, hint = render_problem(problem, language)
                assert problem.code not in title
                assert hint
                assert "{" not in title + hint
        return [problem.code for problem in error.problems]

    return codes
