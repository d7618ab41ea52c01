"""Entries of the datasets file that are not images to train on: masks, held-out images, places of caches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.i18n import LANGUAGES, render_problem

IMAGE = {"id": "a", "instance_data_dir": "x"}
MASKS = {"id": "m", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "masks"}
HELD_OUT = {"id": "e", "dataset_type": "eval", "instance_data_dir": "e"}
TEXT = {"id": "t", "dataset_type": "text_embeds"}
LATENTS = {"id": "l", "dataset_type": "image_embeds"}


def test_entries_go_where_they_belong(with_datasets):
    masked = {**IMAGE, "conditioning_data": "m"}
    datasets = with_datasets([masked, MASKS, HELD_OUT, TEXT, LATENTS]).load().datasets
    assert [[entry.id for entry in kind] for kind in (datasets.images, datasets.evals, datasets.masks)] == [
        ["a"],
        ["e"],
        ["m"],
    ]
    assert datasets.masks_of(datasets.images[0]) is datasets.masks[0]
    assert datasets.masks_of(datasets.evals[0]) is None
    assert (datasets.text_embeds.id, datasets.text_embeds.default) == ("t", True)
    assert {entry.id for entry in datasets.entries} == {"a", "m", "e", "t", "l"}


@pytest.mark.parametrize("names", ["m", ["m"]])
def test_a_mask_is_named_by_itself_or_in_a_list(with_datasets, names):
    project = with_datasets([{**IMAGE, "conditioning_data": names}, {**MASKS, "source_dataset_id": "a"}])
    assert project.codes() == []
    assert project.load().datasets.images[0].conditioning_data == ("m",)


def test_captions_are_cached_where_their_dataset_says(with_datasets):
    entries = [
        IMAGE,
        {**IMAGE, "id": "b", "text_embeds": "u"},
        {**TEXT, "default": True, "cache_dir": "one"},
        {**TEXT, "id": "u", "cache_dir": "{id}/two", "write_batch_size": 3},
    ]
    project = with_datasets(entries)
    datasets = project.load().datasets
    one, two = (datasets.embeds_of(image) for image in datasets.images)
    assert [Path(entry.cache_dir) for entry in (one, two)] == [project.folder / "one", project.folder / "u/two"]
    assert (one.write_batch_size, two.write_batch_size) == (128, 3)


def test_latents_are_cached_where_their_dataset_says(with_datasets):
    """By its own word, else by the entry that it names, else by the default one."""
    entries = [
        {**IMAGE, "id": "own", "cache_dir_vae": "own/{id}", "image_embeds": "l"},
        {**IMAGE, "id": "named", "image_embeds": "l"},
        {**IMAGE, "id": "usual"},
        {**HELD_OUT, "image_embeds": "l"},
        {**LATENTS, "cache_dir": "{output_dir}/l"},
        {**LATENTS, "id": "k", "default": True},
    ]
    project = with_datasets(entries)
    datasets = project.load("--output_dir=out").datasets
    folders = [Path(dataset.cache_dir_vae).relative_to(project.folder) for dataset in datasets.images]
    assert folders == [Path("own/own"), Path("out/l"), Path("out/cache/vae/k")]
    assert Path(datasets.evals[0].cache_dir_vae) == project.folder / "out/l"


INHERITED = {
    "text_encoder_batch_size": (7, 2),
    "text_cache_disable": (True, False),
    "write_batch_size": (5, 6),
}


@pytest.mark.parametrize("key", INHERITED)
@pytest.mark.parametrize("is_written", [True, False])
def test_a_cache_of_texts_inherits_what_it_does_not_name(project, key, is_written):
    inherited, own = INHERITED[key]
    project.write("config/config.json", {"validation_disable": True, key: inherited})
    project.write("config/multidatabackend.json", [IMAGE, *([{**TEXT, key: own}] if is_written else [])])
    assert getattr(project.load().datasets.text_embeds, key) == (own if is_written else inherited)


def test_texts_have_a_folder_of_their_own(with_config):
    project = with_config(cache_dir_text="texts", cache_dir="caches")
    assert Path(project.load().datasets.text_embeds.cache_dir) == project.folder / "texts"
    project = with_config(cache_dir="caches")
    assert Path(project.load().datasets.text_embeds.cache_dir) == project.folder / "caches/text"


@pytest.mark.parametrize("more", [{"type": "memory"}, {"text_cache_disable": True}])
def test_embeddings_that_are_not_kept(with_datasets, more):
    assert not with_datasets([IMAGE, {**TEXT, **more}]).load().datasets.text_embeds.is_kept
    assert with_datasets([IMAGE, TEXT]).load().datasets.text_embeds.is_kept


def test_what_a_broken_entry_is_named_is_not_called_missing(with_datasets):
    """One mistake, one message."""
    broken = {"id": "m", "dataset_type": "conditioning", "conditioning_type": "mask"}
    project = with_datasets([{**IMAGE, "conditioning_data": "m"}, broken])
    assert project.codes() == ["E-DATASET-KEY-MISSING"]


def test_masks_and_evaluation_need_images_to_train_on(with_datasets):
    assert "E-DATASETS-NONE" in with_datasets([HELD_OUT]).codes()


# code -> (entries, words of the message)
MESSAGES = {
    "E-CACHE-STORAGE": ([IMAGE, {**LATENTS, "type": "memory"}], ["l", "memory", "local"]),
    "W-DATASET-KEYS-IDLE": ([IMAGE, {**HELD_OUT, "repeats": 3, "probability": 0.5}], ["probability, repeats", "eval"]),
    "E-CONDITIONING-TYPE": (
        [{**IMAGE, "conditioning_data": "m"}, {**MASKS, "conditioning_type": "controlnet"}],
        ["controlnet", '"conditioning_type": "mask"'],
    ),
    "E-CONDITIONING-MANY": ([{**IMAGE, "conditioning_data": ["m", "n"]}, MASKS, {**MASKS, "id": "n"}], ["m, n"]),
    "W-MASKS-UNUSED": ([IMAGE, MASKS], ["m", '"conditioning_data": "m"']),
    "E-MASKS-SOURCE": (
        [{**IMAGE, "conditioning_data": "m"}, {**IMAGE, "id": "b"}, {**MASKS, "source_dataset_id": "b"}],
        ["source_dataset_id b", "a"],
    ),
    "W-MASKS-SHAPE": (
        [{**IMAGE, "conditioning_data": "m", "resolution": 512}, {**MASKS, "resolution": 768, "crop": True}],
        ["resolution, crop", "m", "a"],
    ),
    "E-DATASET-REFERENCE": ([{**IMAGE, "conditioning_data": "m"}], ["m", "conditioning_data", "a"]),
    "E-DATASETS-DEFAULT-TWICE": (
        [IMAGE, {**LATENTS, "default": True}, {**LATENTS, "id": "k", "default": True}],
        ["l, k", "image_embeds"],
    ),
    "W-DATASETS-EMBEDS-UNUSED": ([IMAGE, LATENTS], ["l", "image_embeds"]),
}

# code -> (options, words of the message)
OPTIONS = {
    "W-EVAL-TWICE": (
        {"eval_steps_interval": 5, "eval_epoch_interval": 0.5},
        ["eval_steps_interval = 5", "eval_epoch_interval = 0.5"],
    ),
    "W-EVAL-NONE": ({"eval_steps_interval": 5}, ["eval_steps_interval"]),
    "E-EVAL-DATASET": ({"eval_dataset_id": "z"}, ["z", "e"]),
    "I-TEXT-ONDEMAND": ({"text_cache_ondemand": True}, ["text_cache_ondemand"]),
}


def check(problem, words):
    told = [" ".join(filter(None, render_problem(problem, language))) for language in LANGUAGES]
    assert told[0] != told[1]
    for told_in in told:
        assert problem.code not in told_in
        for word in words:
            assert word in told_in


@pytest.mark.parametrize("code", MESSAGES)
def test_problems_of_entries(with_datasets, code):
    entries, words = MESSAGES[code]
    problem = with_datasets(json.dumps(entries, indent=1)).problem(code)
    assert problem.origin.startswith("config/multidatabackend.json:")
    check(problem, words)


@pytest.mark.parametrize("code", OPTIONS)
def test_problems_of_options_with_entries(project, code):
    options, words = OPTIONS[code]
    project.write("config/config.json", {"validation_disable": True, **options})
    if code == "E-EVAL-DATASET":
        project.write("config/multidatabackend.json", [IMAGE, HELD_OUT])
    problem = project.problem(code)
    assert problem.origin.startswith("config/config.json")
    check(problem, words)


@pytest.mark.parametrize("kind", ["controlnet", "segmentation", "reference_strict", "reference_loose"])
def test_other_conditioning_is_refused_by_name(with_datasets, kind):
    project = with_datasets([{**IMAGE, "conditioning_data": "m"}, {**MASKS, "conditioning_type": kind}])
    assert project.codes() == ["E-CONDITIONING-TYPE"]
