"""Measure a demo base, and optionally a LoRA trained on it, as its model card reports it.

`python -m scripts.demo_base.measure BASE --out DIR [--lora FILE]` writes `measured.json` and sheets of the pictures.
The photographs are scikit-image's own (astronaut, chelsea, coffee, rocket); nothing was ever trained on them.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ZImagePipeline
from PIL import Image

from scripts.demo_base import classifier as shape_classifier
from scripts.demo_base import judge, scenes, subject

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
NUM_PROMPTS = 100
STEPS = 20
GUIDANCE = 2.0
_BATCH = 20


@dataclass(frozen=True, kw_only=True)
class PromptScore:
    """How many pictures of held-out prompts show what was asked for."""

    num_prompts: int
    background_right: int
    object_right: int
    both_colours_right: int
    shape_right: int
    all_right: int
    wrong: list[str]


def generate(
    pipeline: ZImagePipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    size: scenes.Size = (scenes.IMAGE_PX, scenes.IMAGE_PX),
) -> list[Image.Image]:
    """One picture for each prompt; prompt i starts from the noise of seed + i."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), _BATCH):
        batch = list(prompts[start : start + _BATCH])
        pictures += pipeline(
            prompt=batch,
            width=size[0],
            height=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))],
        ).images
    return pictures


def score_prompts(pictures: Sequence[Image.Image], combinations: Sequence[scenes.Combination]) -> PromptScore:
    """Compare each picture's colours and shape with what its prompt named."""
    shapes = shape_classifier.named_shapes(shape_classifier.load(), pictures)
    rows, wrong = [], []
    for picture, shape, wanted in zip(pictures, shapes, combinations, strict=True):
        background, colour = judge.background_colour(picture), judge.object_colour(picture)
        rows.append((background == wanted.background, colour == wanted.colour, shape == wanted.shape))
        if not all(rows[-1]):
            wrong.append(f"{scenes.prompt_of(wanted)}: {colour} {shape} on {background}")
    right = np.array(rows)
    return PromptScore(
        num_prompts=len(rows),
        background_right=int(right[:, 0].sum()),
        object_right=int(right[:, 1].sum()),
        both_colours_right=int(right[:, :2].all(1).sum()),
        shape_right=int(right[:, 2].sum()),
        all_right=int(right.all(1).sum()),
        wrong=wrong,
    )


def photograph(name: str) -> Image.Image:
    """The middle square of one of scikit-image's photographs, at 128 px."""
    import skimage.data

    whole = Image.fromarray(getattr(skimage.data, name)())
    side = min(whole.size)
    left, top = (whole.width - side) // 2, (whole.height - side) // 2
    square = whole.crop((left, top, left + side, top + side))
    return square.resize((scenes.IMAGE_PX, scenes.IMAGE_PX), Image.Resampling.LANCZOS)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, picture: Image.Image) -> Image.Image:
    """Encode (the mode) and decode a picture."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].to(vae.dtype) / 127.5 - 1
    restored = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0].float().clamp(-1, 1)
    return Image.fromarray(((restored + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def reconstruction_psnr(vae: AutoencoderKL) -> dict[str, float]:
    """PSNR in dB of each photograph, and their mean."""
    values = {}
    for name in PHOTOGRAPHS:
        original = photograph(name)
        restored = np.asarray(reconstruct(vae, original), dtype=np.float32)
        values[name] = judge.psnr(restored, np.asarray(original, dtype=np.float32))
    return {**values, "mean": float(np.mean(list(values.values())))}


def subject_share(pictures: Sequence[Image.Image]) -> float:
    """Share of the pictures that the classifier names the subject."""
    names = shape_classifier.named_shapes(shape_classifier.load(), pictures)
    return names.count(shape_classifier.CLASSES[-1]) / len(names)


def mean_likeness(pictures: Sequence[Image.Image], backgrounds: Sequence[str]) -> float:
    """How alike each picture is to the best of a few newly drawn subjects on the same background; 1 is the same."""
    values = []
    for picture, background in zip(pictures, backgrounds, strict=True):
        rng = random.Random(background)
        drawn = [subject.draw_subject(rng, background) for _ in range(12)]
        values.append(judge.likeness(picture, drawn))
    return float(np.mean(values))


def sheet(pictures: Sequence[Image.Image], *, columns: int = 10) -> Image.Image:
    """All pictures in rows, for the eye."""
    width, height = (max(p.size[axis] for p in pictures) + 4 for axis in (0, 1))
    canvas = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for index, picture in enumerate(pictures):
        canvas.paste(picture, (index % columns * width, index // columns * height))
    return canvas


def measure_base(pipeline: ZImagePipeline, out: Path, *, steps: int, guidance: float) -> dict[str, object]:
    """The gate: reconstruction, and held-out prompts from fixed seeds."""
    wanted = scenes.held_out_combinations()[:NUM_PROMPTS]
    started = time.monotonic()
    pictures = generate(pipeline, [scenes.prompt_of(c) for c in wanted], steps=steps, guidance=guidance)
    seconds = time.monotonic() - started
    sheet(pictures).save(out / "held_out.png")
    photos = [
        picture for name in PHOTOGRAPHS for picture in (photograph(name), reconstruct(pipeline.vae, photograph(name)))
    ]
    sheet(photos, columns=8).save(out / "photographs.png")
    return {
        "steps": steps,
        "guidance": guidance,
        "classifier_accuracy": shape_classifier.accuracy(shape_classifier.load()),
        "photograph_psnr_db": reconstruction_psnr(pipeline.vae),
        "held_out_prompts": asdict(score_prompts(pictures, wanted)),
        "generation_s": round(seconds, 1),
    }


def measure_lora(pipeline: ZImagePipeline, lora: Path, out: Path, *, steps: int, guidance: float) -> dict[str, object]:
    """The subject's prompts and prompts without it, from the same noise, before and after."""
    backgrounds = (*subject.BACKGROUNDS, "yellow", "purple") * 2  # the last two are not in the dataset
    about_it = [subject.subject_prompt(background) for background in backgrounds]
    others = scenes.held_out_combinations()[-20:]
    result: dict[str, object] = {}
    for moment in ("before", "after"):
        if moment == "after":
            pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
        of_subject = generate(pipeline, about_it, seed=500, steps=steps, guidance=guidance)
        of_others = generate(pipeline, [scenes.prompt_of(c) for c in others], seed=900, steps=steps, guidance=guidance)
        sheet(of_subject + of_others).save(out / f"lora_{moment}.png")
        result[moment] = {
            "subject_share": subject_share(of_subject),
            "subject_likeness": mean_likeness(of_subject, backgrounds),
            "other_prompts_likeness_to_subject": mean_likeness(of_others, [c.background for c in others]),
            "other_prompts": asdict(score_prompts(of_others, others)),
        }
    return result


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for measured.json and the sheets")
    parser.add_argument("--lora", type=Path, help="a LoRA file of the demo's subject")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="Z-Image's scale: 0 is off")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pipeline = ZImagePipeline.from_pretrained(options.base, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"steps": options.steps, "guidance": options.guidance}
    measured = measure_base(pipeline, options.out, **settings)
    if options.lora:
        measured["lora"] = measure_lora(pipeline, options.lora, options.out, **settings)
    (options.out / "measured.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
