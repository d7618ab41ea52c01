"""What is derived from the declarations: index, schema, reference."""

import re
from pathlib import Path

import pytest

from simpletuner.config.datasets import ENTRY_MODELS, dataset_options, every_dataset_key
from simpletuner.config.docs import FILES, help_text, main, reference, stale_pages
from simpletuner.config.root import option_aliases, options, sections
from simpletuner.config.schema import json_schema

DOCS = Path(__file__).parents[2] / "docs"


def test_an_option_has_one_section_and_one_name():
    names = [name for model in sections().values() for name in model.model_fields]
    assert sorted(names) == sorted(options())
    assert len(names) == len(set(names))
    aliases = [alias for option in options().values() for alias in option.opt.aliases]
    assert len(aliases) == len(set(aliases)) == len(option_aliases())
    assert not set(aliases) & set(names)


@pytest.mark.parametrize("name", options())
def test_a_default_is_valid(name):
    """Defaults are not validated when a section is made; building it from them says that they could be."""
    model = sections()[options()[name].section]
    assert getattr(model.model_validate({name: options()[name].default}), name) == options()[name].default


@pytest.mark.parametrize("name", [name for name, option in options().items() if option.choices])
def test_a_section_refuses_what_is_no_choice(name):
    with pytest.raises(ValueError, match=name):
        sections()[options()[name].section].model_validate({name: "zzz"})


def test_help_is_a_sentence_in_both_languages():
    of_entries = [option for kind in ENTRY_MODELS for option in dataset_options(kind).values()]
    for option in (*options().values(), *of_entries):
        for language in FILES:
            assert re.fullmatch(r"[\w\"\-].*\.", help_text(option, language)), (option.name, language)
        assert help_text(option, "es") != help_text(option, "en"), option.name


def test_the_short_help_stays_short():
    assert 15 <= sum(option.opt.level == "basic" for option in options().values()) <= 28


def test_the_schema_has_every_option_with_its_limits():
    properties = json_schema()["properties"]
    assert properties.keys() == options().keys() | option_aliases().keys()
    assert properties["lora_rank"]["minimum"] == 1
    assert properties["lora_rank"]["maximum"] == 1024
    assert properties["optimizer"]["enum"][0] == "adamw_bf16"
    for name, option in options().items():
        assert properties[name]["x-group"] == option.section
        assert " ".join(properties[name]["description"].split()) == option.help


@pytest.mark.parametrize("language", FILES)
def test_the_reference_tells_of_every_option(language):
    page = reference(language)
    for name in (*options(), *every_dataset_key()):
        assert f"### `{name}`\n" in page
    assert not re.search(r"(measure|shown|option-\w+|reference|section|dataset)\.\w", page), "a text is missing"


def test_the_pages_in_the_repository_are_fresh():
    assert not stale_pages(DOCS), "run python -m simpletuner.config.docs"


def test_check_finds_a_stale_page_and_writing_mends_it(tmp_path, capsys):
    assert main([str(tmp_path), "--check"]) == 1
    assert "OPTIONS.es.md is stale" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), "--check"]) == 0
