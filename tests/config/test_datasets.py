import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simpletuner.config import ImageDataset
from simpletuner.config.datasets import dataset_options
from simpletuner.config.json_text import parse_json
from simpletuner.i18n import render_problem

EXAMPLE = Path(__file__).parents[2] / "config/multidatabackend.json.example"
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)


def test_the_specifications_example_is_read_as_written(with_datasets):
    loaded = with_datasets(EXAMPLE.read_text(encoding="utf-8")).load()
    camera, subject, small = loaded.datasets.images
    root = loaded.datasets.path.parent.parent
    assert (camera.id, camera.is_regularisation_data, camera.crop) == ("pseudo-camera-10k-zimage", True, True)
    assert (camera.crop_aspect, camera.crop_style, camera.resolution) == ("square", "center", 512)
    assert subject.instance_prompt == ("the name of your subject goes here",)
    assert (subject.repeats, small.repeats, camera.repeats) == (1000, 1000, 0)
    assert subject.instance_data_dir == small.instance_data_dir == str(root / "datasets/dreambooth-subject")
    assert small.cache_dir_vae == str(root / "cache/vae/zimage/dreambooth-subject-512")
    assert loaded.datasets.text_embeds.cache_dir == str(root / "cache/text/zimage")
    assert {w.code for w in loaded.warnings} <= {"W-NO-PROMPT", "W-PLACEHOLDER"}


INHERITED = {
    "resolution": (640, 512),
    "resolution_type": ("pixel", "pixel_area"),
    "minimum_image_size": (64, 128),
    "caption_strategy": ("textfile", "filename"),
    "caption_dropout_probability": (0.5, 0.0),
    "instance_prompt": ("a", "b"),
}


@pytest.mark.parametrize("key", INHERITED)
def test_a_dataset_inherits_what_it_does_not_name(project, key):
    inherited, own = INHERITED[key]
    wrap = (lambda value: (value,)) if key == "instance_prompt" else (lambda value: value)
    project.write("config/config.json", {"validation_disable": True, key: inherited})
    entries = [{"id": "a", "instance_data_dir": "x"}, {"id": "b", "instance_data_dir": "x", key: own}]
    project.write("config/multidatabackend.json", entries)
    first, second = project.load().datasets.images
    assert getattr(first, key) == wrap(inherited)
    assert getattr(second, key) == wrap(own)


def test_placeholders_and_default_folders(with_datasets):
    project = with_datasets(
        [
            {"id": "a", "instance_data_dir": "x", "cache_dir_vae": "{output_dir}/v/{model_family}/{id}"},
            {"id": "b", "instance_data_dir": "{package}/assets"},
        ]
    )
    loaded = project.load("--output_dir=out")
    first, second = loaded.datasets.images
    assert Path(first.cache_dir_vae) == project.folder / "out/v/z_image/a"
    assert Path(second.cache_dir_vae) == project.folder / "out/cache/vae/b"
    assert Path(second.instance_data_dir).is_absolute()
    assert loaded.datasets.text_embeds.id == "text-embeds"
    assert Path(loaded.datasets.text_embeds.cache_dir) == project.folder / "out/cache/text"


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("../../etc", ".._.._etc"),
        ("..", "_"),
        ("a/b", "a_b"),
        ("{output_dir}", "_output_dir_"),
        ("C:\\cats?\n", "C__cats__"),
        ("~", "~"),
        ("gato ñandú. ", "gato ñandú"),
        ("猫" * 300, "猫" * 60),
    ],
)
def test_an_id_never_leads_out_of_the_cache(with_datasets, name, folder):
    project = with_datasets([{"id": name, "instance_data_dir": "x"}])
    (dataset,) = project.load("--output_dir=out").datasets.images
    assert dataset.id == name
    assert Path(dataset.cache_dir_vae) == project.folder / "out/cache/vae" / folder
    Path(dataset.cache_dir_vae).mkdir(parents=True)


@pytest.mark.parametrize("key", ["disabled", "disable"])
@pytest.mark.parametrize("value", [True, "true", "True", 1])
def test_a_disabled_entry_is_left_out_whatever_it_says(with_datasets, key, value):
    entries = [{"id": "a", "instance_data_dir": "x"}, {"id": "b", "type": "aws", "nonsense": 1, key: value}]
    assert [image.id for image in with_datasets(entries).load().datasets.images] == ["a"]


def test_spellings_that_people_use(with_datasets):
    (image,) = (
        with_datasets(
            caption_strategy="instance_prompt",
            instance_prompt=["one, two", "three"],
            is_regularization_data="true",
            crop="False",
            crop_style="centre",
            metadata_backend="json",
            skip_file_discovery=False,
            probability="",
            _note="anything",
        )
        .load()
        .datasets.images
    )
    assert image.caption_strategy == "instanceprompt"
    assert image.instance_prompt == ("one, two", "three")
    assert image.is_regularisation_data is True
    assert image.crop is False
    assert image.crop_style == "center"
    assert image.probability == 1.0


def test_aspect_buckets_are_numbers_or_objects(with_datasets):
    buckets = [{"aspect": 0.5, "weight": 0.25}, {"aspect": "1.5", "weight": 0.75}]
    (image,) = with_datasets(crop=True, crop_aspect="closest", crop_aspect_buckets=buckets).load().datasets.images
    assert [(bucket.aspect, bucket.weight) for bucket in image.crop_aspect_buckets] == [(0.5, 0.25), (1.5, 0.75)]


def test_a_problem_names_dataset_file_and_line(with_datasets):
    text = '[\n {"id": "a",\n  "instance_data_dir": "x",\n  "repeats": -1}\n]'
    problem = with_datasets(text).problem("E-VALUE-RANGE")
    assert problem.origin == "config/multidatabackend.json:4"
    assert problem.path == "/0/repeats"
    assert problem.params["key"] == "a.repeats"


RAW = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.lists(st.floats(0, 2))
ENTRY = st.dictionaries(st.sampled_from(sorted(dataset_options("image"))) | st.text(), RAW, max_size=6)


@SHARED
@given(st.lists(ENTRY | RAW, max_size=4) | RAW)
def test_any_file_is_read_or_refused_with_its_place(with_datasets, document):
    project = with_datasets(json.dumps(document))
    for problem in project.problems():
        assert problem.origin.startswith("config/multidatabackend.json"), problem


@SHARED
@given(st.data())
def test_settings_of_a_dataset_come_back(with_datasets, data):
    """What a valid dataset says is what the loaded one says."""
    drawn = {
        "repeats": data.draw(st.integers(0, 1000)),
        "probability": data.draw(st.floats(0, 10)),
        "crop": data.draw(st.booleans()),
        "caption_dropout_probability": data.draw(st.floats(0, 1)),
        "max_num_samples": data.draw(st.none() | st.integers(1, 100)),
        "instance_prompt": tuple(data.draw(st.lists(st.text(min_size=1), max_size=3))),
    }
    written = {k: v for k, v in drawn.items() if v not in ((), None)}
    (image,) = with_datasets(**written).load().datasets.images
    assert {key: getattr(image, key) for key in drawn} == drawn


def test_the_example_names_only_declared_keys():
    entries = parse_json(EXAMPLE.read_text(encoding="utf-8"), "x").value
    for entry in entries:
        kind = "text_embeds" if entry.get("dataset_type") == "text_embeds" else "image"
        assert entry.keys() <= dataset_options(kind).keys()


def test_datasets_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        ImageDataset(id="a", instance_data_dir="x").repeats = 2


@pytest.mark.parametrize(
    ("options", "entry", "words"),
    [
        ({"output_dir": "x/out"}, {}, ["output_dir", "out"]),
        ({"cache_dir": "x"}, {}, ["cache_dir"]),
        ({}, {"cache_dir_vae": "x/.vae"}, ["a.cache_dir_vae"]),
        ({}, {"instance_data_dir": "."}, ["output_dir"]),
    ],
)
def test_nothing_is_written_into_a_folder_of_images(project, options, entry, words):
    project.write("config/config.json", {"validation_disable": True, **options})
    entries = [{"id": "a", "instance_data_dir": "x", **entry}, {"id": "b", "instance_data_dir": "xy"}]
    project.write("config/multidatabackend.json", entries)
    problem = project.problem("E-DATASET-WRITTEN")
    assert problem.path == "/0/instance_data_dir"
    for language in ("en", "es"):
        told = " ".join(filter(None, render_problem(problem, language)))
        assert all(word in told for word in ["a", str(project.folder), *words])


def test_the_cache_of_one_embeds_entry_in_the_images_of_another_dataset(with_datasets):
    entries = [
        {"id": "a", "instance_data_dir": "x"},
        {"id": "t", "dataset_type": "text_embeds", "default": True, "cache_dir": "x/text"},
    ]
    assert with_datasets(entries).problem("E-DATASET-WRITTEN").params["key"] == "t.cache_dir"
