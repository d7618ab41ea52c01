"""The shipped demo base meets a reduced form of its gate (the whole of it: scripts/demo_base/measure.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import simpletuner
from scripts.demo_base import classifier, judge, measure, scenes

ASSETS = Path(simpletuner.__file__).parent / "assets"
BASE = ASSETS / "demo_base"
MAX_BYTES = 24 * 10**6

pytestmark = pytest.mark.slow


def test_the_base_is_small():
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) <= MAX_BYTES


def test_the_dataset_is_complete():
    for folder in ("demo_dataset", "demo_regularisation"):
        pictures = sorted((ASSETS / folder).glob("*.png"))
        assert len(pictures) >= 20
        assert all(path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in pictures)


def test_the_classifier_knows_drawn_shapes():
    assert classifier.accuracy(classifier.load()) >= 0.98


def test_photographs_that_were_never_seen_survive_the_autoencoder():
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(BASE / "vae", dtype=torch.float32)
    for name in measure.PHOTOGRAPHS:
        original, restored = measure.photograph(name), measure.reconstruct(vae, measure.photograph(name))
        assert judge.psnr(judge._pixels(restored), judge._pixels(original)) > 23
    assert measure.reconstruction_psnr(vae)["mean"] >= 26


def test_held_out_prompts_give_what_they_name():
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(BASE, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    wanted = scenes.held_out_combinations()[:16]
    pictures = measure.generate(pipeline, [scenes.prompt_of(c) for c in wanted])
    score = measure.score_prompts(pictures, wanted)
    assert score.both_colours_right >= 15, score.wrong
    assert score.shape_right >= 12, score.wrong
