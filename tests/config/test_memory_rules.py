"""What the memory options ask of the machine is told before anything is loaded."""

from __future__ import annotations

import sys

import pytest

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
