"""From what is asked for to images on disk: load the model once, then sample setup by setup."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from simpletuner.config.datasets import DatasetsConfig
from simpletuner.config.root import Config
from simpletuner.data.prompts import PromptStore
from simpletuner.events.oserrors import os_errors_as_problems
from simpletuner.events.progress import Reporter
from simpletuner.generate.adapters import AdapterStack, FoundAdapter
from simpletuner.generate.request import LAST, Setup, Shot, in_working_order
from simpletuner.models.places import public_name
from simpletuner.models.weights import PipelineFiles
from simpletuner.models.z_image.sampler import usual_scale
from simpletuner.models.z_image.spec import Z_IMAGE
from simpletuner.models.z_image.transformer import ZImageTransformer, velocity
from simpletuner.train.context import ContextCache
from simpletuner.train.device import Compute
from simpletuner.train.load import load_trained_model
from simpletuner.train.offload import announce_offload
from simpletuner.train.prepare import Vae, fill_prompt_cache, free_memory, prompt_group
from simpletuner.validation.generate import ImageEngine, SamplingSettings, grouped, make_images

_NUMBERED = re.compile(r"(\d{4,})_")
_BEFORE_BLOCKS = ("context_refiner.", "cap_embedder.")


@dataclass(frozen=True, kw_only=True)
class Made:
    """An image that is on disk."""

    shot: Shot
    path: Path
    about: dict[str, object]


def generate(
    shots: Sequence[Shot],
    *,
    config: Config,
    datasets: DatasetsConfig,
    files: PipelineFiles,
    adapters: Sequence[FoundAdapter],
    folder: Path,
    compute: Compute,
    run: Reporter,
    on_image: Callable[[Made], None] = lambda _: None,
) -> list[Made]:
    """Make every shot and write it into `folder`; what was written before stays. In the order of `shots`.

    Args:
        on_image: told of each as soon as it is there.
    Raises:
        SimpletunerError: the model or an adapter cannot be used, or the folder cannot be written to.
    """
    announce_offload(config.memory, files.transformer, compute, run)
    groups = [prompt_group(_texts(shots), datasets.text_embeds)]
    prompts = fill_prompt_cache(groups, config=config, files=files, compute=compute, run=run)
    transformer = load_trained_model(config, files=files.transformer, compute=compute, run=run)
    stack = AdapterStack(transformer, adapters, dtype=compute.weights)
    transformer.eval()
    free_memory(compute.device)
    vae = Vae(config, files=files, compute=compute, run=run)
    first = free_number(folder)
    number_of = {shot: first + index for index, shot in enumerate(shots)}
    made: dict[Shot, Made] = {}
    model = _model_name(config)
    with run.phase("images", total=sum(shot.setup.steps for shot in shots), unit="steps") as progress:
        for setup, group, images in _sampled(
            shots, transformer, stack, prompts, vae=vae, compute=compute, on_progress=progress.advance
        ):
            for shot, image in zip(group, images, strict=True):
                about = _about(shot, setup, model, adapters)
                path = folder / f"{number_of[shot]:04d}_{shot.request.prompt.id}.png"
                _write_png(path, image, about)
                made[shot] = Made(shot=shot, path=path, about=about)
                on_image(made[shot])
    return [made[shot] for shot in shots]


def free_number(folder: Path) -> int:
    """One more than the highest number that a file there begins with."""
    found = (_NUMBERED.match(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return max((int(match[1]) for match in found if match), default=0) + 1


def _sampled(
    shots: Sequence[Shot],
    transformer: ZImageTransformer,
    stack: AdapterStack,
    prompts: PromptStore,
    *,
    vae: Vae,
    compute: Compute,
    on_progress: Callable[[int], None],
) -> Iterator[tuple[Setup, list[Shot], list[Image.Image]]]:
    refines = any(module.startswith(_BEFORE_BLOCKS) for module in stack.modules)

    def predict(latents: Sequence[Tensor], sigma_B: Tensor, context: Sequence[Tensor]) -> list[Tensor]:
        with compute.autocasting():
            return velocity(transformer, latents, sigma_B, context)

    for setup, of_setup in in_working_order(shots):

        @contextmanager
        def strength(factor: float, checkpoint: str = setup.checkpoint) -> Iterator[None]:
            stack.use(checkpoint, factor)
            yield

        engine = ImageEngine(
            velocity=predict,
            # As a validation has it: kept unless an adapter changes what comes before the blocks.
            context_of=ContextCache(
                transformer.refine_context, prompts.get, device=compute.device, keep=not refines
            ).get,
            decode=vae.decode,
            strength=strength,
            latent_channels=Z_IMAGE.latent_channels,
            px_per_latent=Z_IMAGE.vae_factor,
            px_per_token=Z_IMAGE.alignment_px,
            device=compute.device,
        )
        settings = SamplingSettings(
            num_steps=setup.steps, guidance=setup.guidance, shift=setup.shift, negative_prompt=setup.negative_prompt
        )
        by_request = {id(shot.request): shot for shot in of_setup}
        for group in grouped([shot.request for shot in of_setup], engine.px_per_token):
            with engine.strength(setup.strength):
                images = make_images(group, engine=engine, settings=settings, on_progress=on_progress)
            yield setup, [by_request[id(request)] for request in group], images


def _texts(shots: Sequence[Shot]) -> list[str]:
    texts = {shot.request.prompt.text for shot in shots}
    return sorted(texts | {shot.setup.negative_prompt for shot in shots if shot.setup.guidance > 0})


def _about(shot: Shot, setup: Setup, model: str, adapters: Sequence[FoundAdapter]) -> dict[str, object]:
    """What an image tells of how it was made; names of files, not where they lie."""
    width_px, height_px = shot.request.size
    return {
        "prompt": shot.request.prompt.text,
        "negative_prompt": setup.negative_prompt,
        "seed": shot.request.seed,
        "steps": setup.steps,
        "guidance": setup.guidance,
        "guidance_usual": usual_scale(setup.guidance),
        "sampling_shift": setup.shift,
        "width_px": width_px,
        "height_px": height_px,
        "model": model,
        "adapters": [
            {
                "name": adapter.label,
                "strength": adapter.strength * setup.strength,
                **({"checkpoint": setup.checkpoint} if adapter.checkpoints and setup.checkpoint != LAST else {}),
            }
            for adapter in adapters
        ],
    }


def _model_name(config: Config) -> str:
    own = config.model.pretrained_transformer_model_name_or_path or config.model.pretrained_model_name_or_path
    return public_name(own)


def _write_png(path: Path, image: Image.Image, about: dict[str, object]) -> None:
    """Whole or not at all. `parameters` is the text that viewers of generated images show."""
    info = PngInfo()
    info.add_itxt("parameters", _parameters(about))
    info.add_itxt("simpletuner", json.dumps(about, ensure_ascii=False))
    with os_errors_as_problems(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.with_name(f".{path.name}")
        image.save(building, format="PNG", pnginfo=info)
        building.replace(path)


def _parameters(about: dict[str, object]) -> str:
    lines = [str(about["prompt"])]
    if about["negative_prompt"]:
        lines.append(f"Negative prompt: {about['negative_prompt']}")
    facts = {
        "Steps": about["steps"],
        "Sampler": "Euler",
        "CFG scale": about["guidance_usual"],
        "Seed": about["seed"],
        "Size": f"{about['width_px']}x{about['height_px']}",
        "Shift": about["sampling_shift"],
        "Model": about["model"],
    }
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items())])
