"""What the run refuses or explains by itself, in both languages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simpletuner.adapters.files import save_lora
from simpletuner.config.datasets import ImageDataset
from simpletuner.config.root import Config
from simpletuner.config.sections.optimizer import OptimizerSection
from simpletuner.config.sections.run import RunSection
from simpletuner.data.records import Bucket, DatasetPlan, Geometry, ImageRecord, Plan, Sample
from simpletuner.data.sampler import Sampler
from simpletuner.data.spec import Schedule
from simpletuner.data.storage import FileInfo, LocalStorage
from simpletuner.i18n import LANGUAGES, catalog, render_problem
from simpletuner.problems import ConfigError, Problem
from simpletuner.train.build import lora_info, lora_settings, trigger_words
from simpletuner.train.device import choose_compute, choose_device
from simpletuner.train.run import config_hash
from simpletuner.train.start import idle_warnings, total_updates


def config(*, epochs=0, steps=0, accumulation=1) -> Config:
    return Config(
        run=RunSection(num_train_epochs=epochs, max_train_steps=steps),
        optimizer=OptimizerSection(gradient_accumulation_steps=accumulation),
    )


def sampler_of(batches: int, *, accumulation: int = 1, **schedule: int) -> Sampler:
    """Over one dataset of that many images, one per batch."""
    size = (64, 64)
    record = ImageRecord(file=FileInfo(key="a", size_bytes=1, version="1"), size=size)
    geometry = Geometry(target=size, intermediary=size, crop=(0, 0))
    sample = Sample(dataset_id="cats", record=record, geometry=geometry, captions=("a",))
    dataset = DatasetPlan(
        id="cats",
        buckets=(Bucket(size=size, samples=(sample,) * batches),),
        repeats=0,
        probability=1.0,
        is_regularisation=False,
        caption_dropout_probability=0.0,
        dropped=(),
        storage=LocalStorage(folder=Path("images")),
        schedule=Schedule(**schedule),
    )
    plan = Plan(datasets=(dataset,), fingerprint="")
    return Sampler(plan, seed=1, batch_size=1, accumulation_steps=accumulation)


def test_the_length_of_a_run():
    assert total_updates(config(steps=7), sampler_of(100)) == 7
    assert total_updates(config(epochs=3), sampler_of(10)) == 30
    assert total_updates(config(epochs=3, accumulation=4), sampler_of(10, accumulation=4)) == 7


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("options", "length"),
    [
        (config(epochs=3, accumulation=2), "num_train_epochs 3"),
        (config(steps=13, accumulation=2), "max_train_steps 13"),
    ],
)
def test_a_run_that_outlasts_its_datasets_is_refused(language, options, length):
    sampler = sampler_of(10, accumulation=2, end_step=12)
    with pytest.raises(ConfigError) as caught:
        total_updates(options, sampler)
    assert [problem.code for problem in caught.value.problems] == ["E-DATASETS-END"]
    title, hint = render_problem(caught.value.problems[0], language)
    assert "13" in title
    assert length in title
    assert "end_step" in hint
    assert total_updates(config(steps=12, accumulation=2), sampler) == 12
    assert total_updates(config(epochs=2, accumulation=2), sampler) == 10


def test_a_result_says_nothing_of_where_things_lie(tmp_path, monkeypatch):
    def told(folder: Path, location: str) -> str:
        (folder / "base").mkdir(parents=True, exist_ok=True)
        monkeypatch.chdir(folder)
        options = config(steps=3)
        options = options.model_copy(
            update={
                "run": options.run.model_copy(update={"output_dir": str(folder / "output" / "cat")}),
                "model": options.model.model_copy(update={"pretrained_model_name_or_path": location}),
            }
        )
        info = lora_info(options, lora_settings(options), step=3, config_hash=config_hash(options))
        save_lora(
            folder / "lora", {"to_q.lora_A.weight": torch.ones(16, 2), "to_q.lora_B.weight": torch.ones(2, 16)}, info
        )
        return (folder / "lora").read_bytes()

    here = told(tmp_path / "here", str(tmp_path / "here" / "base"))
    assert str(tmp_path).encode() not in here
    assert b'"ss_base_model_version":"base"' in here
    assert here == told(tmp_path / "there", str(tmp_path / "there" / "base")) == told(tmp_path / "there", "./base")
    assert b'"ss_base_model_version":"Tongyi-MAI/Z-Image"' in told(tmp_path / "here", "Tongyi-MAI/Z-Image")


def test_trigger_words_are_the_instance_prompts_that_were_captions():
    def dataset(name: str, *prompts: str, **options: object) -> ImageDataset:
        return ImageDataset(id=name, instance_data_dir=name, instance_prompt=prompts, **options)

    datasets = [
        dataset("a", "sks octopus", caption_strategy="instanceprompt"),
        dataset("b", "not used", caption_strategy="textfile"),
        dataset("c", "sks octopus", "an octopus", caption_strategy="textfile", prepend_instance_prompt=True),
        dataset("d", "an animal", caption_strategy="instanceprompt", is_regularisation_data=True),
        dataset("e", "the thing", only_instance_prompt=True),
    ]
    assert trigger_words(datasets) == ("sks octopus", "an octopus", "the thing")


def test_a_dataset_that_never_comes_is_told():
    first = sampler_of(10).plan.datasets[0]
    late = replace(first, id="late", schedule=Schedule(start_step=8))
    sampler = Sampler(Plan(datasets=(first, late), fingerprint=""), seed=1, batch_size=1)
    (problem,) = idle_warnings(config(steps=7), sampler, 7)
    assert problem.code == "W-DATASET-IDLE"
    for language in LANGUAGES:
        title, hint = render_problem(problem, language)
        assert "late" in title
        assert "7" in title
        assert "disabled" in hint
    assert idle_warnings(config(steps=8), sampler, 8) == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_less_than_one_update_is_nothing_to_train(language):
    with pytest.raises(ConfigError) as caught:
        total_updates(config(epochs=1, accumulation=4), sampler_of(3, accumulation=4))
    title, hint = render_problem(caught.value.problems[0], language)
    assert "1" in title
    assert "repeats" in hint


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("requested", ["cuda:99", "tpu", "cuda" if not torch.cuda.is_available() else "cuda:98"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(language, requested):
    with pytest.raises(ConfigError) as caught:
        choose_device(requested)
    title, hint = render_problem(caught.value.problems[0], language)
    assert requested in title
    assert "cpu" in title
    assert "auto" in hint


def test_half_precision_is_used_only_where_it_is_fast():
    device = torch.device("cpu")
    fast = bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    compute, override = choose_compute(device, mixed_precision="bf16", base_model_default_dtype="bf16")
    assert (compute.name, override is None) == (("bf16", True) if fast else ("fp32", False))
    compute, override = choose_compute(device, mixed_precision="fp16", base_model_default_dtype="bf16")
    assert compute.name == "fp32"
    assert (override.option, override.requested, override.used) == ("mixed_precision", "fp16", "no")
    assert all(override.reason in catalog(language) for language in LANGUAGES)
    compute, override = choose_compute(device, mixed_precision="no", base_model_default_dtype="bf16")
    assert (compute.weights, compute.autocast, override) == (torch.float32, None, None)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_loss_that_is_not_finite_names_where_it_happened(language):
    problem = Problem(
        code="E-NAN-LOSS", params={"step": 4, "dataset": "a", "batch": 3, "files": "cat.png", "sigmas": "0.500"}
    )
    title, hint = render_problem(problem, language)
    assert "cat.png" in title
    assert "0.500" in title
    assert "learning_rate" in hint
