"""Latents that are encoded while training: the same as cached ones, learned once, honest about what is broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.data import on_demand
from simpletuner.data.latents import LatentSource, LatentStore, cache_latents, learn_latent_keys
from simpletuner.data.on_demand import OnDemandLatents
from simpletuner.data.records import Plan
from simpletuner.data.spec import DatasetSpec, ResizeSpec
from simpletuner.data.storage import LocalStorage
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import DatasetError, SimpletunerError

MakePlan = Callable[..., Plan]
SaveImage = Callable[..., Path]
Told = Callable[[SimpletunerError], list[str]]


@pytest.fixture
def plan(tmp_path: Path, save_image: SaveImage, make_plan: MakePlan) -> Plan:
    for number in range(5):
        save_image(tmp_path / "images" / f"{number}.png", size=(96, 64) if number < 3 else (64, 96), seed=number)
    return make_plan(spec_of(tmp_path / "images"))


def spec_of(folder: Path) -> DatasetSpec:
    resize = ResizeSpec(resolution=64, aspect_bucket_alignment=16)
    return DatasetSpec(id="cats", storage=LocalStorage(folder=folder), resize=resize)


def on_demand_of(plan: Plan, vae: Any, tmp_path: Path, *, on_disk: bool = True) -> OnDemandLatents:
    return OnDemandLatents(
        plan.datasets,
        LatentSource(id=vae.id, open=vae.open),
        directories={"cats": tmp_path / "latents"} if on_disk else {},
        cache_dir=tmp_path / "cache",
    )


def cached(plan: Plan, vae: Any, tmp_path: Path) -> LatentStore:
    nothing = lambda done, total: None  # noqa: E731
    keys = learn_latent_keys(plan, vae.id, cache_dir=tmp_path / "cache", on_progress=nothing)
    return cache_latents(
        plan,
        LatentSource(id=vae.id, open=vae.open),
        keys,
        directory_of=lambda _: tmp_path / "latents",
        cache_dir=tmp_path / "cache",
        batch_size=2,
        on_progress=nothing,
    )


def test_they_are_those_of_the_cache_and_are_found_in_it(plan: Plan, vae: Any, tmp_path: Path) -> None:
    with on_demand_of(plan, vae, tmp_path) as latents:
        first = [latents.get(sample) for sample in plan.samples()]
        assert all(
            torch.equal(latents.get(sample), latent) for sample, latent in zip(plan.samples(), first, strict=True)
        )
    assert vae.batches == [1] * 5
    store = cached(plan, vae, tmp_path)
    assert all(torch.equal(store.get(sample), latent) for sample, latent in zip(plan.samples(), first, strict=True))
    with on_demand_of(plan, vae, tmp_path) as latents:
        assert all(
            torch.equal(latents.get(sample), latent) for sample, latent in zip(plan.samples(), first, strict=True)
        )
    assert vae.batches == [1] * 5


def test_what_a_cache_holds_needs_neither_image_nor_encoder(plan: Plan, vae: Any, tmp_path: Path) -> None:
    store = cached(plan, vae, tmp_path)
    vae.opened = 0
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    with on_demand_of(plan, vae, tmp_path) as latents:
        assert all(torch.equal(latents.get(sample), store.get(sample)) for sample in plan.samples())
    assert vae.opened == 0


@pytest.mark.parametrize("fits", [True, False])
def test_without_a_cache_they_stay_in_memory_as_far_as_it_goes(
    plan: Plan, vae: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    monkeypatch.setattr(on_demand, "HOLD_UP_TO_BYTES", 1 << 30 if fits else 0)
    with on_demand_of(plan, vae, tmp_path, on_disk=False) as latents:
        for _ in range(3):
            for sample in plan.samples():
                latents.get(sample)
    assert len(vae.batches) == (5 if fits else 15)
    assert not (tmp_path / "latents").exists()


def test_a_broken_image_is_told_and_known_from_then_on(
    plan: Plan, vae: Any, tmp_path: Path, make_plan: MakePlan, save_image: SaveImage, told: Told
) -> None:
    path = save_image(tmp_path / "images" / "broken.png", seed=50)
    data = path.read_bytes()
    path.write_bytes(data[:-200] + bytes(100) + data[-100:])
    longer = make_plan(spec_of(tmp_path / "images"))
    assert longer.datasets[0].num_images == 6
    sample = next(sample for sample in longer.samples() if sample.record.key == "broken.png")
    with on_demand_of(longer, vae, tmp_path) as latents, pytest.raises(DatasetError) as caught:
        latents.get(sample)
    assert told(caught.value) == ["E-IMAGE-BROKEN"]
    for language in LANGUAGES:
        assert str(path) in render_problem(caught.value.problems[0], language)[0]
    again = make_plan(spec_of(tmp_path / "images"))
    assert [item.key for item in again.datasets[0].unreadable] == ["broken.png"]
    assert again.samples() == plan.samples()


def test_an_image_that_is_gone_is_told(plan: Plan, vae: Any, tmp_path: Path, told: Told) -> None:
    (tmp_path / "images" / "0.png").unlink()
    sample = next(sample for sample in plan.samples() if sample.record.key == "0.png")
    with on_demand_of(plan, vae, tmp_path) as latents, pytest.raises(DatasetError) as caught:
        latents.get(sample)
    assert told(caught.value) == ["E-IMAGE-GONE"]
    for language in LANGUAGES:
        assert str(tmp_path / "images" / "0.png") in render_problem(caught.value.problems[0], language)[0]
