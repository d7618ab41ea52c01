"""What the memory options ask of the machine is told before anything is loaded."""

from __future__ import annotations

import sys

import pytest

from simpletuner.config.schema import json_schema
from simpletuner.i18n import render_problem
from simpletuner.problems import ConfigError


@pytest.mark.parametrize("option", ["base_model_precision", "text_encoder_precision"])
@pytest.mark.parametrize(
    ("precision", "library"), [("nf4-bnb", "bitsandbytes"), ("int8-quanto", "optimum-quanto"), ("int8", None)]
)
def test_a_missing_library_is_named(project, monkeypatch, option, precision, library):
    for module in ("bitsandbytes", "optimum", "torchao"):
        monkeypatch.setitem(sys.modules, module, None)
    if library is None:
        project.load(f"--{option}", precision)
        return
    with pytest.raises(ConfigError) as caught:
        project.load(f"--{option}", precision)
    (problem,) = caught.value.problems
    assert problem.code == "E-LIBRARY-MISSING"
    for language in ("en", "es"):
        title, hint = render_problem(problem, language)
        assert library in title and f"pip install '{library}" in (hint or "")


@pytest.mark.parametrize(("found", "refused"), [(86, True), (89, False), (90, False), (None, False)])
def test_float8_products_need_a_card_that_has_them(project, monkeypatch, found, refused):
    monkeypatch.setattr("simpletuner.config.precision_rules.cuda_capability", lambda: found)
    arguments = ("--base_model_precision=fp8-torchao", "--text_encoder_precision=fp8wo-torchao", "--device=cuda")
    if not refused:
        project.load(*arguments)
        return
    with pytest.raises(ConfigError) as caught:
        project.load(*arguments)
    (problem,) = caught.value.problems
    assert problem.code == "E-PRECISION-CAPABILITY"
    for language in ("en", "es"):
        title, hint = render_problem(problem, language)
        assert "8.9" in title and "8.6" in title and "fp8wo-torchao" in (hint or "")


@pytest.mark.parametrize("option", ["text_encoder_precision", *(f"text_encoder_{i}_precision" for i in range(1, 5))])
@pytest.mark.parametrize(
    ("written", "meant"),
    [("int8", "int8-torchao"), ("NF4", "nf4-bnb"), ("int8_torchao", "int8-torchao"), ("none", "no_change")],
)
def test_the_text_encoders_precision_has_every_spelling(project, option, written, meant):
    assert project.load(f"--{option}", written).config.memory.text_encoder_precision == meant


@pytest.mark.parametrize(("written", "meant"), [("auto", 0), ("AUTO", 0), ("0", 0), ("3", 3)])
def test_the_interval_is_a_number_or_auto(project, written, meant):
    assert (
        project.load("--gradient_checkpointing_interval", written).config.memory.gradient_checkpointing_interval
        == meant
    )


def test_the_schema_knows_auto():
    schema = json_schema()["properties"]["gradient_checkpointing_interval"]
    assert schema["anyOf"] == [{"type": "integer", "minimum": 0}, {"enum": ["auto"]}]


@pytest.mark.parametrize("written", ["true", "false", True, False, "yes", "0"])
def test_checkpointing_stays_a_flag(with_config, written):
    loaded = with_config({"gradient_checkpointing": written}).load()
    assert loaded.config.memory.gradient_checkpointing is (written in (True, "true", "yes"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("gradient_checkpointing_budget", 2),
        ("gradient_checkpointing_offload", True),
        ("gradient_checkpointing_keep", "product"),
    ],
)
def test_recomputation_options_are_named_where_nothing_is_recomputed(project, option, value):
    loaded = project.load("--gradient_checkpointing=false", f"--{option}={value}")
    (problem,) = [p for p in loaded.warnings if p.code == "W-CHECKPOINTING-OFF"]
    for language in ("en", "es"):
        assert option in render_problem(problem, language)[0]
