"""The tables agree with each other and with the declared options."""

from dataclasses import fields

import pytest

from simpletuner.catalog.families import CUSTOM_FLAVOUR, DEFAULT_FLAVOUR, FLAVOURS, REPOSITORY_SPELLINGS, Flavour
from simpletuner.catalog.precisions import PRECISION_SPELLINGS, PRECISIONS
from simpletuner.catalog.schedules import SCHEDULE_SPELLINGS, SCHEDULES
from simpletuner.catalog.upstream import DATASET_UPSTREAM, UPSTREAM, asks_for_something
from simpletuner.config.datasets import every_dataset_key
from simpletuner.config.root import option_aliases, options
from simpletuner.config.sizes import check_resolutions

NO_OPTIONS = {"name", "repository", "guidance", "steps", "distilled"}


def test_a_field_of_a_flavour_is_an_option_or_says_otherwise():
    assert {field.name for field in fields(Flavour)} - options().keys() == NO_OPTIONS


@pytest.mark.parametrize("flavour", FLAVOURS.values(), ids=FLAVOURS)
def test_a_flavour_keeps_its_own_rules(flavour):
    assert flavour.guidance[0] <= flavour.validation_guidance <= flavour.guidance[1]
    assert flavour.steps[0] <= flavour.validation_num_inference_steps <= flavour.steps[1]
    assert check_resolutions(flavour.validation_resolution)
    assert flavour.resolution % flavour.aspect_bucket_alignment == 0
    assert flavour.distilled == (flavour.assistant_lora_path is not None)
    assert (flavour.assistant_lora_path is None) == (flavour.assistant_lora_weight_name is None)


def test_defaults_of_the_schema_are_those_of_the_default_flavour():
    default = FLAVOURS[DEFAULT_FLAVOUR]
    for field in fields(Flavour):
        if field.name in options() and not field.name.startswith("assistant_"):
            assert options()[field.name].default == getattr(default, field.name)
    assert options()["pretrained_model_name_or_path"].default == default.repository
    assert CUSTOM_FLAVOUR in FLAVOURS
    repositories = {flavour.repository for flavour in FLAVOURS.values()}
    assert set(REPOSITORY_SPELLINGS.values()) <= repositories


def test_spellings_lead_to_rows():
    assert {choice for _, choice in PRECISION_SPELLINGS} <= PRECISIONS.keys()
    assert {choice for _, choice in SCHEDULE_SPELLINGS} <= SCHEDULES.keys()
    assert options()["base_model_precision"].default in PRECISIONS
    assert PRECISIONS["no_change"].refused is None


def test_an_option_of_ours_is_not_called_missing():
    ours = options().keys() | option_aliases().keys()
    assert not ours & UPSTREAM.keys()
    assert not every_dataset_key() & DATASET_UPSTREAM.keys()


@pytest.mark.parametrize("value", [None, False, "false", "no", "", 0, "none", [], {}, "no_change"])
def test_a_missing_option_that_is_off_asks_for_nothing(value):
    assert not asks_for_something(UPSTREAM["fsdp_enable"], value)


def test_a_missing_option_that_is_on_asks_for_something():
    assert asks_for_something(UPSTREAM["fsdp_enable"], True)
    assert asks_for_something(UPSTREAM["fsdp_enable"], "true")
    assert not asks_for_something(UPSTREAM["prediction_type"], "flow_matching")
    assert asks_for_something(UPSTREAM["prediction_type"], "epsilon")
