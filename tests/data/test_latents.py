"""The cache of latents: encoded once, never stale, the same cold and warm."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.data import latents
from simpletuner.data.latents import LatentSource, LatentStore, PlanAgainError, cache_latents, learn_latent_keys
from simpletuner.data.plan import unreadable_warnings
from simpletuner.data.records import Plan
from simpletuner.data.spec import CaptionSpec, DatasetSpec, ResizeSpec
from simpletuner.data.storage import LocalStorage
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import DatasetError, SimpletunerError

MakePlan = Callable[..., Plan]
SaveImage = Callable[..., Path]
Told = Callable[[SimpletunerError], list[str]]
NUM_IMAGES = 7
SMALL = ResizeSpec(resolution=64, aspect_bucket_alignment=16)


@pytest.fixture
def folder(tmp_path: Path, save_image: SaveImage) -> Path:
    for number in range(NUM_IMAGES):
        save_image(tmp_path / "images" / f"{number}.png", size=(96, 64) if number < 5 else (64, 96), seed=number)
    return tmp_path / "images"


def spec_of(folder: Path, **options: Any) -> DatasetSpec:
    return DatasetSpec(**{"id": "cats", "storage": LocalStorage(folder=folder), "resize": SMALL, **options})


def cache(plan: Plan, vae: Any, directory: Path, **options: Any) -> LatentStore:
    source = LatentSource(id=vae.id, open=vae.open)
    index_dir = directory.parent / "cache"
    keys = learn_latent_keys(plan, vae.id, cache_dir=index_dir, on_progress=lambda done, total: None)
    settings = {
        "directory_of": lambda _: directory,
        "cache_dir": index_dir,
        "batch_size": 2,
        "on_progress": lambda done, total: None,
        **options,
    }
    return cache_latents(plan, source, keys, **settings)


def values(plan: Plan, store: LatentStore) -> dict[str, torch.Tensor]:
    return {sample.record.key: store.get(sample) for sample in plan.samples()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_latents_are_those_of_the_resized_and_cropped_picture(
    folder: Path, make_plan: MakePlan, vae: Any, tmp_path: Path
) -> None:
    plan = make_plan(spec_of(folder))
    store = cache(plan, vae, tmp_path / "latents")
    for sample in plan.samples():
        geometry = sample.geometry
        image = Image.open(folder / sample.record.key).resize(geometry.intermediary, Image.Resampling.LANCZOS)
        (left, top), (width, height) = geometry.crop, geometry.target
        pixels_HWC = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height))))
        picture = pixels_HWC.permute(2, 0, 1)[None].float() / 127.5 - 1
        latent = store.get(sample)
        assert latent.dtype == torch.float32
        assert latent.shape == (6, height // 8, width // 8)
        torch.testing.assert_close(latent, vae.encode(picture)[0])


def test_a_warm_run_loads_no_encoder_and_has_the_same_bits(
    folder: Path, make_plan: MakePlan, vae: Any, tmp_path: Path
) -> None:
    plan = make_plan(spec_of(folder))
    cold_progress: list[tuple[int, int]] = []
    warm_progress: list[tuple[int, int]] = []
    cold = cache(plan, vae, tmp_path / "latents", on_progress=lambda done, total: cold_progress.append((done, total)))
    warm = cache(plan, vae, tmp_path / "latents", on_progress=lambda done, total: warm_progress.append((done, total)))
    assert same(values(plan, cold), values(plan, warm))
    assert vae.opened == 1
    assert cold_progress[0] == (0, NUM_IMAGES)
    assert cold_progress[-1] == (NUM_IMAGES, NUM_IMAGES)
    assert cold_progress == sorted(cold_progress)
    assert warm_progress == [(NUM_IMAGES, NUM_IMAGES)]


def test_caching_leaves_the_global_random_state_alone(
    folder: Path, make_plan: MakePlan, vae: Any, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    cache(make_plan(spec_of(folder)), vae, tmp_path / "latents")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "change",
    ["resolution", "crop", "crop_style", "encoder", "content"],
)
def test_a_change_is_never_served_stale(
    folder: Path, make_plan: MakePlan, save_image: SaveImage, vae: Any, tmp_path: Path, change: str
) -> None:
    resize = replace(SMALL, crop=change == "crop_style", crop_style="corner")
    spec = spec_of(folder, resize=resize)
    cache(make_plan(spec), vae, tmp_path / "latents")
    num_changed = NUM_IMAGES
    if change == "resolution":
        spec = replace(spec, resize=replace(resize, resolution=128))
    elif change == "crop":
        spec = replace(spec, resize=replace(resize, crop=True))
    elif change == "crop_style":
        spec = replace(spec, resize=replace(resize, crop_style="center"))
    elif change == "encoder":
        vae = replace(vae, id="pooling 2", scale=2.0, opened=0, batches=[])
    else:
        save_image(folder / "0.png", seed=99)
        num_changed = 1
    plan = make_plan(spec)
    first_progress: list[int] = []
    changed = cache(plan, vae, tmp_path / "latents", on_progress=lambda done, total: first_progress.append(done))
    assert first_progress[0] == NUM_IMAGES - num_changed
    assert same(values(plan, changed), values(plan, cache(plan, vae, tmp_path / "fresh")))


CENTER = replace(SMALL, crop_style="center")
"""Crops that are the same for every name."""


def test_neither_a_new_name_nor_a_new_place_nor_a_new_caption_is_a_change(
    folder: Path, make_plan: MakePlan, vae: Any, tmp_path: Path
) -> None:
    cache(make_plan(spec_of(folder, resize=CENTER)), vae, tmp_path / "latents")
    (folder / "0.png").rename(folder / "renamed.png")
    folder = folder.rename(tmp_path / "moved")
    captions = CaptionSpec(caption_strategy="instanceprompt", instance_prompts=("a cat",))
    cache(
        make_plan(spec_of(folder, id="other", resize=CENTER, captions=captions, repeats=3)), vae, tmp_path / "latents"
    )
    assert vae.opened == 1


def test_copies_of_an_image_are_encoded_once(folder: Path, make_plan: MakePlan, vae: Any, tmp_path: Path) -> None:
    for number in range(10):
        shutil.copy(folder / "0.png", folder / f"copy{number}.png")
    plan = make_plan(spec_of(folder, resize=CENTER), spec_of(folder, id="again", resize=CENTER))
    cache(plan, vae, tmp_path / "latents")
    assert sum(vae.batches) == NUM_IMAGES


def test_each_dataset_has_its_own_directory(folder: Path, make_plan: MakePlan, vae: Any, tmp_path: Path) -> None:
    plan = make_plan(
        spec_of(folder), spec_of(folder, id="small", resize=ResizeSpec(resolution=48, aspect_bucket_alignment=16))
    )
    store = cache(plan, vae, tmp_path, directory_of=lambda name: tmp_path / name)
    assert (tmp_path / "cats").is_dir()
    assert (tmp_path / "small").is_dir()
    assert len({store.get(sample).shape for sample in plan.samples()}) == 4
    assert vae.opened == 1


def test_who_shares_a_call_of_the_encoder_does_not_depend_on_what_is_missing(
    folder: Path, make_plan: MakePlan, vae: Any, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    plan = make_plan(spec_of(folder))
    cache(plan, vae, tmp_path / "straight")
    assert sorted(vae.batches) == [1, 2, 2, 2]  # 5 landscapes and 2 portraits
    straight = list(vae.calls)
    vae.calls.clear()
    with pytest.raises(KeyboardInterrupt):
        cache(plan, vae, tmp_path / "interrupted", batch_size=1, on_progress=interrupt)
    (first,) = vae.calls
    vae.calls.clear()
    progress: list[int] = []
    cache(plan, vae, tmp_path / "interrupted", on_progress=lambda done, total: progress.append(done))
    assert progress[0] == 1
    assert vae.calls == straight or vae.calls == [call for call in straight if call != first]


def test_damaged_entries_are_computed_anew(folder: Path, make_plan: MakePlan, vae: Any, tmp_path: Path) -> None:
    plan = make_plan(spec_of(folder))
    first = values(plan, cache(plan, vae, tmp_path / "latents"))
    (shard,) = (tmp_path / "latents").iterdir()
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    assert same(values(plan, cache(plan, vae, tmp_path / "latents")), first)
    assert vae.opened == 2
    cache(plan, vae, tmp_path / "latents")
    assert vae.opened == 2


def test_bad_pixels_are_found_out_once_and_left_out_from_then_on(
    folder: Path, make_plan: MakePlan, save_image: SaveImage, vae: Any, tmp_path: Path, told: Told
) -> None:
    """A PNG with damaged pixels has a good header and a good end: it is found only when it is decoded."""
    for name in ("bad1.png", "bad2.png"):
        path = save_image(folder / name, seed=hash(name) % 97)
        data = path.read_bytes()
        path.write_bytes(data[:-200] + bytes(100) + data[-100:])
    with pytest.raises(PlanAgainError):
        cache(make_plan(spec_of(folder)), vae, tmp_path / "latents", batch_size=1)
    plan = make_plan(spec_of(folder))
    assert [item.key for item in plan.datasets[0].unreadable] == ["bad1.png", "bad2.png"]
    assert plan.datasets[0].num_images == NUM_IMAGES
    (warning,) = unreadable_warnings(plan)
    for language in LANGUAGES:
        title, hint = render_problem(warning, language)
        assert "bad1.png (" in title
        assert "bad2.png (" in title
        assert str(folder) in title
        assert "unreadable_images" in hint
    progress: list[int] = []
    cache(plan, vae, tmp_path / "latents", on_progress=lambda done, total: progress.append(done))
    assert progress == [NUM_IMAGES]
    with pytest.raises(DatasetError) as caught:
        make_plan(spec_of(folder, skips_unreadable=False))
    assert told(caught.value) == ["E-IMAGE-UNREADABLE"]


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_pictures_decoded_elsewhere_are_the_same(
    folder: Path, make_plan: MakePlan, vae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    plan = make_plan(spec_of(folder))
    here = cache(plan, vae, tmp_path / "here", max_workers=1)
    monkeypatch.setattr(latents, "_PROCESSES_FROM_PICTURES", 1 if kind == "processes" else 1000)
    assert same(values(plan, cache(plan, vae, tmp_path / "elsewhere", max_workers=2)), values(plan, here))


def test_a_file_that_changes_or_goes_after_the_scan_is_told(
    folder: Path, make_plan: MakePlan, save_image: SaveImage, vae: Any, tmp_path: Path, told: Told
) -> None:
    plan = make_plan(spec_of(folder))
    save_image(folder / "0.png", seed=99)
    (folder / "1.png").unlink()
    with pytest.raises(DatasetError) as caught:
        cache(plan, vae, tmp_path / "latents")
    assert sorted(told(caught.value)) == ["E-IMAGE-CHANGED", "E-IMAGE-UNREADABLE"]
    titles = " ".join(render_problem(problem, "es")[0] for problem in caught.value.problems)
    assert str(folder / "0.png") in titles
    assert "1.png (" in titles


def test_a_thousand_files_that_are_gone_do_not_fill_the_console(make_plan: MakePlan, vae: Any, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    for number in range(150):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(tmp_path / "many" / f"{number:03}.png")
    plan = make_plan(spec_of(tmp_path / "many"))
    shutil.rmtree(tmp_path / "many")
    with pytest.raises(DatasetError) as caught:
        cache(plan, vae, tmp_path / "latents")
    (problem,) = caught.value.problems
    files = str(problem.params["files"])
    assert problem.params["count"] == 150
    assert (files.index("000.png"), "099.png" in files, "100.png" in files) == (0, True, False)
    assert files.endswith("(+50)")


def test_a_latent_that_is_not_finite_is_told(
    folder: Path, make_plan: MakePlan, vae: Any, tmp_path: Path, told: Told
) -> None:
    with pytest.raises(DatasetError) as caught:
        cache(make_plan(spec_of(folder)), replace(vae, scale=float("inf")), tmp_path / "latents")
    assert told(caught.value) == ["E-LATENT-NOT-FINITE"]
    assert str(folder) in render_problem(caught.value.problems[0], "en")[0]


def test_nothing_is_written_in_the_image_folder(folder: Path, make_plan: MakePlan, vae: Any, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}
    cache(make_plan(spec_of(folder)), vae, tmp_path / "latents")
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]} == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills with POSIX signals")
def test_a_run_killed_at_any_moment_while_caching_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_while_caching.py")
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    killed, finished = (int(word) for word in result.stdout.split())
    assert killed >= 20
    assert finished >= 1


def test_a_directory_may_have_files_of_its_own_size(
    folder: Path, make_plan: MakePlan, vae: Any, tmp_path: Path
) -> None:
    plan = make_plan(spec_of(folder))
    cache(plan, vae, tmp_path / "usual", write_batch_size=2)
    cache(plan, vae, tmp_path / "own", write_batch_size=2, write_batch_sizes={tmp_path / "own": NUM_IMAGES})
    assert len(list((tmp_path / "own").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "usual").glob("*.safetensors"))) > 1
