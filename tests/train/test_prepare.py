"""Which prompts are cached where."""

from __future__ import annotations

from pathlib import Path

from simpletuner.config.datasets import DatasetsConfig, ImageDataset, TextEmbeds
from simpletuner.config.root import Config
from simpletuner.data.records import Bucket, DatasetPlan, Geometry, ImageRecord, Plan, Sample
from simpletuner.data.storage import FileInfo, LocalStorage
from simpletuner.train.flow_options import deciding_options
from simpletuner.train.prepare import prompt_groups, run_prompts


def planned(name: str, *captions: str, dropout: float = 0.0) -> DatasetPlan:
    record = ImageRecord(file=FileInfo(key="a.png", size_bytes=1, version="1"), size=(64, 64))
    geometry = Geometry(target=(64, 64), intermediary=(64, 64), crop=(0, 0))
    sample = Sample(dataset_id=name, record=record, geometry=geometry, captions=captions)
    return DatasetPlan(
        id=name,
        buckets=(Bucket(size=(64, 64), samples=(sample,)),),
        repeats=0,
        probability=1.0,
        is_regularisation=False,
        caption_dropout_probability=dropout,
        dropped=(),
        storage=LocalStorage(folder=Path(name)),
    )


def dataset(name: str, **options: object) -> ImageDataset:
    return ImageDataset.model_validate({"id": name, "instance_data_dir": "x", **options})


DATASETS = DatasetsConfig(
    images=(dataset("cats", conditioning_data=("masks",)), dataset("dogs", text_embeds="own")),
    evals=(dataset("held-out", dataset_type="eval", text_embeds="own"),),
    text_embeds=TextEmbeds(id="default", cache_dir="usual", text_encoder_batch_size=2),
    other_text_embeds=(TextEmbeds(id="own", cache_dir="own", text_cache_disable=True, write_batch_size=3),),
    path=Path("x.json"),
)


def test_captions_go_where_their_dataset_says_and_all_else_to_the_default_entry():
    plan = Plan(datasets=(planned("dogs", "a dog"), planned("cats", "a cat", "cats", dropout=0.1)), fingerprint="")
    usual, own = prompt_groups(plan, DATASETS, ["shown"])
    assert (set(usual.prompts), usual.directory, usual.batch_size) == ({"shown", "a cat", "cats", ""}, Path("usual"), 2)
    assert (set(own.prompts), own.directory, own.write_batch_size) == ({"a dog"}, None, 3)


def test_a_plan_without_captions_for_an_entry_has_no_group_of_it():
    plan = Plan(datasets=(planned("held-out", "a mouse"),), fingerprint="")
    (group,) = prompt_groups(plan, DATASETS)
    assert (set(group.prompts), group.directory) == ({"a mouse"}, None)


def test_captions_of_held_out_images_share_no_call_with_others():
    """So that who is held out does not change, by whom a caption is padded with, what is learnt from the others."""
    trained = Plan(datasets=(planned("cats", "a cat"), planned("dogs", "a dog")), fingerprint="")
    held_out = Plan(datasets=(planned("held-out", "a mouse", "a dog"),), fingerprint="")
    alone = run_prompts(trained, Plan(datasets=(), fingerprint=""), DATASETS, ["shown"])
    together = run_prompts(trained, held_out, DATASETS, ["shown"])
    assert together[: len(alone)] == alone
    assert [set(group.prompts) for group in together[len(alone) :]] == [{"a mouse", "a dog"}]


def test_a_checkpoint_remembers_what_masks_it_was_made_with():
    decided = deciding_options(Config(), DATASETS)
    assert (decided["cats.conditioning_data"], decided["dogs.conditioning_data"]) == ("masks", "")
    assert decided["masked_loss_probability"] == 1.0
