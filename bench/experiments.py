"""What adapters, regularisation and laws of the noise level do on the demo base, with seeds and curves.

Every run is a `simpletuner train` of the demo's subject, shorter than the demo, in a process of its own on one thread.
Afterwards it is measured by what it never saw:

- pictures of the subject on eight backgrounds and of held-out scenes, judged by the project's classifier of shapes and
  by colour: how often the subject is shown, how often a scene is what was asked for, how alike a scene is to the
  base's picture of it (PSNR);
- the loss on newly drawn pictures of the subject and of scenes, with the same noise for all runs, in five bands of
  sigma.

    python bench/experiments.py [--only WORD ...] [--seeds 0 1] [--steps 300] [--jobs 2]

Adds to bench/results/experiments.json, run by run; `python bench/experiments_report.py` writes docs/experiments.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # scripts/ is not installed
RESULT = HERE / "results" / "experiments.json"
BANDS = ((0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0))
NUM_HELD_OUT = 24
BACKGROUNDS = ("blue", "green", "white", "pink", "cyan", "red", "black", "orange")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train. `options` differ from the demo's."""

    name: str
    question: str
    options: Mapping[str, Any] = field(default_factory=dict)
    regularised: bool = True


LOKR = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 4,
    "full_matrix": True,
    "apply_preset": {"target_module": ["Attention", "FeedForward"]},
}
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "LoKr": {"lora_type": "lycoris", "lycoris_config": LOKR, "learning_rate": 5e-3},
    "full": {"model_type": "full", "learning_rate": 5e-4},
}
LAWS: Mapping[str, Mapping[str, Any]] = {
    "uniform, shift 1": {"flow_use_uniform_schedule": True, "flow_schedule_shift": 1.0},
    "uniform, shift 3": {"flow_use_uniform_schedule": True, "flow_schedule_shift": 3.0},
    "sigmoid, shift 1": {"flow_use_uniform_schedule": False, "flow_schedule_shift": 1.0},
    "sigmoid, shift 3": {"flow_use_uniform_schedule": False, "flow_schedule_shift": 3.0},
    "beta(2, 2), shift 1": {
        "flow_use_uniform_schedule": False,
        "flow_use_beta_schedule": True,
        "flow_schedule_shift": 1.0,
    },
}
VARIANTS = (
    *(
        Variant(
            name=f"{name}{'' if kept else ', no regularisation'}",
            question="adapters",
            options=options,
            regularised=kept,
        )
        for name, options in ADAPTERS.items()
        for kept in ((False,) if name == "full" else (True, False))
    ),
    *(Variant(name=name, question="laws", options=options) for name, options in LAWS.items()),
)


def train(variant: Variant, seed: int, steps: int, folder: Path) -> Path:
    """Run the trainer; return the run directory."""
    (folder / "prompts.json").write_text(json.dumps(prompts()), encoding="utf-8")
    datasets = json.loads((package() / "examples" / "demo" / "multidatabackend.json").read_text(encoding="utf-8"))
    if not variant.regularised:
        datasets = [entry for entry in datasets if entry["id"] != "demo-regularisation"]
    (folder / "multidatabackend.json").write_text(json.dumps(datasets), encoding="utf-8")
    config = json.loads((package() / "examples" / "demo" / "config.json").read_text(encoding="utf-8"))
    options = dict(variant.options)
    if isinstance(options.get("lycoris_config"), dict):
        (folder / "lycoris.json").write_text(json.dumps(options["lycoris_config"]), encoding="utf-8")
        options["lycoris_config"] = str(folder / "lycoris.json")
    config |= {
        "data_backend_config": str(folder / "multidatabackend.json"),
        "output_dir": str(folder / "run"),
        "max_train_steps": steps,
        "checkpoint_step_interval": 0,
        "validation_step_interval": 0,
        "validation_prompt": None,
        "user_prompt_library": str(folder / "prompts.json"),
        "seed": seed,
        **options,
    }
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "simpletuner.cli.main", "train", str(folder / "config.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SIMPLETUNER_STATE_DIR": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{variant.name}: {done.stderr[-2000:]}")
    return folder / "run"


def prompts() -> dict[str, str]:
    """The subject on each background, and held-out scenes."""
    from scripts.demo_base import scenes, subject

    scenes_asked = scenes.held_out_combinations()[:16]
    return {
        **{f"subject_{background}": subject.subject_prompt(background) for background in BACKGROUNDS},
        **{f"scene_{index:02}": scenes.prompt_of(wanted) for index, wanted in enumerate(scenes_asked)},
    }


def judge_pictures(run: Path) -> dict[str, float]:
    """Shares in [0, 1] and dB."""
    import numpy as np
    from PIL import Image

    from scripts.demo_base import classifier, judge, scenes

    lines = (run / "validation_images" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    last = max(entry["step"] for entry in entries)
    shown: dict[tuple[str, int], Image.Image] = {}
    for entry in entries:
        with Image.open(run / "validation_images" / entry["file"]) as picture:
            shown[entry["prompt_id"], entry["step"]] = picture.convert("RGB")
    known = classifier.load()
    asked = {f"scene_{index:02}": wanted for index, wanted in enumerate(scenes.held_out_combinations()[:16])}
    ids = list(prompts())
    names = dict(zip(ids, classifier.named_shapes(known, [shown[key, last] for key in ids]), strict=True))
    subjects = [key for key in ids if key.startswith("subject_")]
    right = [
        names[key] == wanted.shape
        and judge.background_colour(shown[key, last]) == wanted.background
        and judge.object_colour(shown[key, last]) == wanted.colour
        for key, wanted in asked.items()
    ]
    likeness = [
        judge.psnr(np.asarray(shown[key, last], dtype=np.float32), np.asarray(shown[key, 0], dtype=np.float32))
        for key in asked
    ]
    return {
        "subject_shown": statistics.mean(names[key] == "octopus" for key in subjects),
        "subject_on_its_background": statistics.mean(
            judge.background_colour(shown[key, last]) == key.removeprefix("subject_") for key in subjects
        ),
        "scenes_right": statistics.mean(right),
        "scenes_taken_for_the_subject": statistics.mean(names[key] == "octopus" for key in asked),
        "scenes_psnr_to_base": statistics.mean(min(value, 60.0) for value in likeness),
    }


def held_out_losses(folder: Path) -> dict[str, list[float]]:
    """{"subject", "scenes"} -> mean squared error of the velocity in each band of sigma, in this process."""
    import torch

    from scripts.demo_base import scenes, subject

    torch.set_num_threads(1)
    rng = random.Random(99)
    pairs = [
        (subject.draw_subject(rng, background), subject.subject_prompt(background))
        for background in (BACKGROUNDS[index % len(BACKGROUNDS)] for index in range(NUM_HELD_OUT))
    ]
    pairs += [
        (scenes.draw_scene(rng, scene), scene.caption)
        for scene in (scenes.plain_scene(rng, wanted) for wanted in scenes.held_out_combinations()[:NUM_HELD_OUT])
    ]
    captions = [caption for _, caption in pairs]
    found: dict[str, list[float]] = {"subject": [], "scenes": []}
    velocity, encode = open_trained(folder, captions)
    with torch.no_grad():
        latents = encode([picture for picture, _ in pairs])
        generator = torch.Generator().manual_seed(7)
        noise = [torch.randn(x.shape, generator=generator) for x in latents]
        spread = torch.rand(len(pairs), generator=generator)
        for low, high in BANDS:
            sigma_B = low + (high - low) * spread
            noisy = [torch.lerp(x, e, s) for x, e, s in zip(latents, noise, sigma_B, strict=True)]
            predicted = velocity(noisy, sigma_B, captions)
            errors = [float((p - (e - x)).square().mean()) for p, e, x in zip(predicted, noise, latents, strict=True)]
            found["subject"].append(statistics.mean(errors[:NUM_HELD_OUT]))
            found["scenes"].append(statistics.mean(errors[NUM_HELD_OUT:]))
    return found


def open_trained(folder: Path, captions: Sequence[str]) -> tuple[Any, Any]:
    """(velocity of noisy latents, sigma and captions; latents of pictures) of the model that a run has trained."""
    import numpy as np
    import torch

    from simpletuner.config.load import load_run_config
    from simpletuner.events.progress import SinkReporter
    from simpletuner.models.weights import resolve_pipeline
    from simpletuner.models.z_image.spec import Z_IMAGE
    from simpletuner.train.build import build_training, trained_weights
    from simpletuner.train.device import choose_compute
    from simpletuner.train.prepare import Vae, fill_prompt_cache, prompt_group
    from simpletuner.train.resume import find_checkpoints

    loaded = load_run_config([str(folder / "config.json")], environ=os.environ, cwd=folder)
    config, device = loaded.config, torch.device("cpu")
    compute, _ = choose_compute(device, mixed_precision="no", base_model_default_dtype="fp32")
    files = resolve_pipeline(config.model.pretrained_model_name_or_path, spec=Z_IMAGE)
    run = SinkReporter([])
    groups = [prompt_group(captions, loaded.datasets.text_embeds)]
    prompts = fill_prompt_cache(groups, config=config, files=files, compute=compute, run=run)
    trained = trained_weights(config, config_hash="")
    training = build_training(
        config, files=files, assistant=None, prompts=prompts, trained=trained, compute=compute, run=run
    )
    newest = max(find_checkpoints(folder / "run"), key=lambda checkpoint: checkpoint.step)
    trained.load(newest.path, training.transformer)
    training.transformer.eval()
    codec = Vae(config, files=files, compute=compute, run=run).open()

    def encode(pictures: Sequence[Any]) -> list[torch.Tensor]:
        arrays = [np.asarray(picture, dtype=np.float32) / 127.5 - 1 for picture in pictures]
        return [codec.encode(torch.from_numpy(array).permute(2, 0, 1)[None])[0] for array in arrays]

    return training.predict, encode


def package() -> Path:
    import simpletuner

    return Path(simpletuner.__file__).parent


def measure(variant: Variant, seed: int, steps: int) -> dict[str, Any]:
    """One run and all that is measured of it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = train(variant, seed, steps, folder)
        # The measurement is a process of its own, so that several runs can be measured at a time.
        command = [sys.executable, __file__, "--measure", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{variant.name}: {done.stderr[-2000:]}")
        row = json.loads(done.stdout.splitlines()[-1])
        events = _events(run)
        steps_done = [event for event in events if event["event"] == "step.finished"]
        created = next((event for event in events if event["event"] == "adapter.created"), {})
        return {
            "name": variant.name,
            "question": variant.question,
            "seed": seed,
            "steps": steps,
            "num_params": created.get("num_params"),
            "step_s": statistics.median(event["step_seconds"] for event in steps_done),
            "losses": [round(event["loss"], 5) for event in steps_done],
            **row,
        }


def _events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def save(rows: Sequence[Mapping[str, Any]]) -> None:
    """Put the rows beside those that are there; one of the same name and seed is replaced."""
    known = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else []
    fresh = {(row["name"], row["seed"]) for row in rows}
    kept = [row for row in known if (row["name"], row["seed"]) not in fresh]
    RESULT.write_text(json.dumps({"rows": [*kept, *rows]}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="variants whose name or question has one of these words")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps({**judge_pictures(args.measure / "run"), "held_out": held_out_losses(args.measure)}))
        return
    wanted = [v for v in VARIANTS if not args.only or any(w in f"{v.question} {v.name}" for w in args.only)]
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {pool.submit(measure, v, seed, args.steps): v.name for seed in args.seeds for v in wanted}
        for job in as_completed(jobs):
            try:
                row = job.result()
            except RuntimeError as error:
                print(f"{jobs[job]}: {error}", file=sys.stderr, flush=True)
                continue
            save([row])
            told = {key: value for key, value in row.items() if key != "losses"}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
