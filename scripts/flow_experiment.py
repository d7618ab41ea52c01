"""Compare laws of noise levels, losses, rollouts and the average of weights on the demo base.

`python -m scripts.flow_experiment --out FILE [--only NAME ...] [--steps N] [--seeds 1 2]` trains the demo's LoRA on 20
of its 24 pictures each way and measures, on the other 4 and on scenes without the subject:

held-out: the mean squared error at five noise levels, on noised pictures (the usual loss).
rolled: the same on states that the trained model's own sampling, two steps of eight, leads to, against the velocity to
    the clean picture.
kept: the error on scenes of the base, less that of the base itself; above 0 is forgotten.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simpletuner.adapters.lora import LoraSettings, apply_lora, disabled, trainable_parameters
from simpletuner.experimental.reflexflow import ReflexFlow
from simpletuner.experimental.rollout import Ramp, Rollout, RolloutSettings
from simpletuner.models.weights import PipelineFiles, resolve_pipeline
from simpletuner.models.z_image.load import load_transformer
from simpletuner.models.z_image.sampler import sigmas
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.text import load_prompt_encoder
from simpletuner.models.z_image.transformer import ZImageTransformer, velocity
from simpletuner.models.z_image.vae import load_latent_codec
from simpletuner.optim.build import build_optimizer
from simpletuner.optim.ema import EmaSettings, WeightAverage
from simpletuner.optim.schedules import ScheduleSettings, learning_rate_at
from simpletuner.optim.settings import OptimizerSettings
from simpletuner.train.context import ContextCache
from simpletuner.train.flow import FlowSettings, LossSettings
from simpletuner.train.seeds import generator
from simpletuner.train.sigma_law import Beta, LogitNormal, Uniform
from simpletuner.train.step import MicroBatch, StepSettings, train_step

ASSETS = Path(__file__).parents[1] / "src" / "simpletuner" / "assets"
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
BATCH, NUM_HELD_OUT, NOISES, RATE = 4, 4, 4, 0.002
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train."""

    flow: FlowSettings
    loss: LossSettings = field(default_factory=LossSettings)
    rollout: RolloutSettings | None = None


DEMO = FlowSettings(law=Uniform(), shift=1.7)
ROLLOUT = RolloutSettings(
    levels=tuple(sigmas(8, 3.0)[:-1].double().tolist()), max_offset=2, ramp=Ramp(start=0.5, end=0.5)
)
WAYS = {
    "uniform, shift 1.7 (the demo)": Way(flow=DEMO),
    "uniform, shift 1.7, drawn one by one": Way(flow=replace(DEMO, stratified=False)),
    "uniform, shift 1": Way(flow=FlowSettings(law=Uniform())),
    "sigmoid, shift 1": Way(flow=FlowSettings(law=LogitNormal())),
    "sigmoid, shift 3": Way(flow=FlowSettings(law=LogitNormal(), shift=3.0)),
    "beta 4 2, shift 1": Way(flow=FlowSettings(law=Beta(alpha=4, beta=2))),
    "the demo, huber": Way(flow=DEMO, loss=LossSettings(kind="huber")),
    "the demo, rollouts": Way(flow=DEMO, rollout=ROLLOUT),
    "the demo, rollouts, reflexflow": Way(flow=DEMO, rollout=replace(ROLLOUT, reflexflow=ReflexFlow())),
}


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Latents with their captions."""

    latents: list[Tensor]
    prompts: list[str]


class Model:
    """The demo base with a fresh LoRA."""

    def __init__(self, files: PipelineFiles, embeddings: dict[str, Tensor], seed: int) -> None:
        self.transformer: ZImageTransformer = load_transformer(files.transformer, dtype=torch.float32)
        lora = LoraSettings(rank=16, alpha=16, targets=Z_IMAGE.lora_targets("attention+mlp"), seed=seed)
        apply_lora(self.transformer, lora)
        self._contexts = ContextCache(self.transformer.refine_context, embeddings.__getitem__, device=CPU, keep=True)

    def predict(self, latents: Sequence[Tensor], sigma_B: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        return velocity(self.transformer, latents, sigma_B, self._contexts.get(prompts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(WAYS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2])
    arguments = parser.parse_args()
    files = resolve_pipeline(str(ASSETS / "demo_base"), spec=Z_IMAGE)
    subject, scenes, embeddings = read_pictures(files)
    rows = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    for name in arguments.only:
        for seed in arguments.seeds:
            begun = time.process_time()
            found = run(WAYS[name], files, subject, scenes, embeddings, steps=arguments.steps, seed=seed)
            cpu_s = round(time.process_time() - begun, 1)
            facts = {"seed": seed, "steps": arguments.steps, "cpu_s": cpu_s}
            rows += [{"way": name + suffix, **facts, **row} for suffix, row in found.items()]
            arguments.out.write_text(json.dumps(rows, indent=1))
            print(json.dumps(rows[-len(found) :]), flush=True)


def run(
    way: Way,
    files: PipelineFiles,
    subject: Pictures,
    scenes: Pictures,
    embeddings: dict[str, Tensor],
    *,
    steps: int,
    seed: int,
) -> dict[str, dict[str, object]]:
    """Train, then measure the weights and their average."""
    model = Model(files, embeddings, seed)
    before = errors(model, scenes)
    params = trainable_parameters(model.transformer)
    optimizer = build_optimizer("adamw_bf16", params, OptimizerSettings(learning_rate=RATE, seed=seed))
    schedule = ScheduleSettings(kind="cosine", learning_rate=RATE, warmup_steps=20)
    average = WeightAverage(params, EmaSettings(), device=CPU)
    settings = StepSettings(
        seed=seed,
        rank=0,
        flow=way.flow,
        loss=way.loss,
        max_grad_norm=1.0,
        clip_by_value=False,
        latents_per_token=Z_IMAGE.latents_per_token,
        uses_dropout=False,
    )

    def still(latents: Sequence[Tensor], sigma_B: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        with torch.no_grad():
            return model.predict(latents, sigma_B, prompts)

    for step in range(steps):
        train_step(
            [batch_of(subject, step, seed)],
            num_batches=1,
            predict=model.predict,
            parent=lambda: disabled(model.transformer),
            params=params,
            optimizer=optimizer,
            learning_rate=learning_rate_at(step, settings=schedule, total_steps=steps),
            settings=settings,
            rollout=Rollout(settings=way.rollout, predict=still) if way.rollout else None,
        )
        average.update_()
    held_out = Pictures(latents=subject.latents[-NUM_HELD_OUT:], prompts=subject.prompts[-NUM_HELD_OUT:])
    found = {"": measure(model, held_out, scenes, before)}
    with average.within():
        found[", average"] = measure(model, held_out, scenes, before)
    return found


def measure(model: Model, held_out: Pictures, scenes: Pictures, before: list[float]) -> dict[str, object]:
    """Held-out, rolled and kept, by level where that says more."""
    return {
        "held_out": errors(model, held_out),
        "rolled": errors(model, held_out, rolled=True),
        "kept": float(np.mean(errors(model, scenes)) - np.mean(before)),
    }


@torch.no_grad()
def errors(model: Model, pictures: Pictures, *, rolled: bool = False) -> list[float]:
    """Mean squared error at each of LEVELS, with noise that is the same for every model."""
    found = []
    clean = [x for x in pictures.latents for _ in range(NOISES)]
    prompts = [prompt for prompt in pictures.prompts for _ in range(NOISES)]
    for level in LEVELS:
        draws = generator(0, "measure", round(level * 10))
        noise = [torch.randn(x.shape, generator=draws) for x in clean]
        sigma_B = torch.full((len(clean),), level)
        noisy = [torch.lerp(x, e, level) for x, e in zip(clean, noise, strict=True)]
        targets = [e - x for x, e in zip(clean, noise, strict=True)]
        if rolled:
            always = replace(ROLLOUT, ramp=Ramp(start=1.0, end=1.0))
            hook = Rollout(settings=always, predict=model.predict)
            states = hook.roll_out(clean, noise, noisy, sigma_B=sigma_B, prompts=prompts, step=0, draws=draws)
            if states is not None:
                noisy, targets = states.noisy, states.targets
        predicted = model.predict(noisy, sigma_B, prompts)
        found.append(float(np.mean([(p - t).square().mean() for p, t in zip(predicted, targets, strict=True)])))
    return found


def batch_of(subject: Pictures, step: int, seed: int) -> MicroBatch:
    """Four of the pictures that are not held out."""
    picks = torch.randperm(len(subject.latents) - NUM_HELD_OUT, generator=generator(seed, "pictures", step))[:BATCH]
    chosen = picks.tolist()
    return MicroBatch(
        index=step,
        latents=[subject.latents[i] for i in chosen],
        prompts=[subject.prompts[i] for i in chosen],
        is_regularisation=False,
        names=[str(i) for i in chosen],
    )


@torch.no_grad()
def read_pictures(files: PipelineFiles) -> tuple[Pictures, Pictures, dict[str, Tensor]]:
    """(subject, a few scenes, the embedding of every caption)."""
    codec = load_latent_codec(files.vae, dtype=torch.float32, device=CPU)
    encoder = load_prompt_encoder(files.text_encoder, files.tokenizer_dir, dtype=torch.float32, device=CPU)
    groups = []
    for folder, count in (("demo_dataset", 24), ("demo_regularisation", 4)):
        paths = sorted((ASSETS / folder).glob("*.png"))[:count]
        arrays = [np.asarray(Image.open(path).convert("RGB").resize((128, 128))) for path in paths]
        pixels_BCHW = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = list(codec.encode(pixels_BCHW).float())
        groups.append(Pictures(latents=latents, prompts=[p.with_suffix(".txt").read_text().strip() for p in paths]))
    prompts = sorted({prompt for group in groups for prompt in group.prompts})
    return groups[0], groups[1], dict(zip(prompts, encoder.encode(prompts), strict=True))


if __name__ == "__main__":
    main()
