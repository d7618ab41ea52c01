"""Every message about the optimizer: what brings it about, and what it says in both languages."""

import json
import re
import sys
from pathlib import Path

import pytest

import simpletuner
from simpletuner.catalog.libraries import LIBRARIES
from simpletuner.catalog.optimizers import OPTIMIZER_SPELLINGS, OPTIMIZERS, REFUSED_OPTIMIZERS
from simpletuner.config.optimizer_arguments import read_arguments
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import Severity

LOCALES = Path(simpletuner.__file__).parent / "locales"
ROOT = Path(__file__).parents[2]

# code -> (options, words that both languages' texts must hold, what the fixes set)
PROBLEMS = {
    "E-BETAS": ({"optimizer_beta1": 0.5}, ["optimizer_beta1", "optimizer_beta2"], {"optimizer_beta2": 0.999}),
    "W-SCHEDULE-UNREAD": ({"lr_scheduler": "cosine", "lr_power": 2}, ["cosine", "lr_power"], {}),
    "W-LEARNING-RATE-HIGH": (
        {"learning_rate": 0.5},
        ["learning_rate = 0.5", "0.01", "adamw_bf16"],
        {"learning_rate": 0.0001},
    ),
    "W-LEARNING-RATE-LOW": ({"optimizer": "prodigy"}, ["0.0001", "0.05", "prodigy"], {"learning_rate": 1}),
    "W-OPTIMIZER-UNREAD": (
        {"optimizer": "muon", "optimizer_beta1": 0.9, "optimizer_beta2": 0.95, "adam_epsilon": 1e-6},
        ["muon", "optimizer_beta1, optimizer_beta2, adam_epsilon"],
        {},
    ),
    "W-OPTIMIZER-SCHEDULE": (
        {"optimizer": "adamw_schedulefree", "lr_scheduler": "cosine"},
        ["adamw_schedulefree", "cosine"],
        {"lr_scheduler": "constant_with_warmup"},
    ),
    "E-OPTIMIZER-DEEPSPEED": (
        {"optimizer": "deepspeed-adamw"},
        ["deepspeed-adamw", "DeepSpeed"],
        {"optimizer": "bnb-adamw8bit-paged"},
    ),
    "E-OPTIMIZER-VARIANT": (
        {"optimizer": "adamw_schedulefree+aggressive"},
        ["adamw_schedulefree+aggressive", "schedulefree"],
        {"optimizer": "adamw_schedulefree"},
    ),
    "E-OPTIMIZER-UNPUBLISHED": ({"optimizer": "dion"}, ["dion", "muon"], {"optimizer": "muon"}),
    "E-OPTIMIZER-SDNQ": ({"optimizer": "sdnq-came"}, ["sdnq-came", "adafactor"], {"optimizer": "adafactor"}),
    "E-OPTIMIZER-SPARSE": (
        {"optimizer": "torch-sparseadam"},
        ["torch-sparseadam", "torch-adam"],
        {"optimizer": "torch-adam"},
    ),
    "E-OPTIMIZER-DEVICE": (
        {"optimizer": "bnb-lion8bit-paged", "device": "cpu", "learning_rate": 2e-5},
        ["bnb-lion8bit-paged", "cuda", "cpu", "device"],
        {"optimizer": "bnb-lion8bit"},
    ),
    "E-OPTIMIZER-CONFIG": ({"optimizer_config": "rounding"}, ["optimizer_config", "rounding"], {}),
    "E-OPTIMIZER-ARGUMENT-OPTION": (
        {"optimizer_config": {"weight_decay": 0.1}},
        ["weight_decay", "adam_weight_decay", "optimizer_config"],
        {"adam_weight_decay": 0.1},
    ),
    "E-OPTIMIZER-ARGUMENT-NONE": (
        {"optimizer": "lion", "optimizer_config": "momentum=0.9"},
        ["lion", "momentum", "optimizer_config"],
        {},
    ),
    "E-OPTIMIZER-ARGUMENT-UNKNOWN": ({"optimizer_config": "zzz=1"}, ["adamw_bf16", "zzz", "rounding"], {}),
    "E-OPTIMIZER-ARGUMENT-MISSPELT": (
        {"optimizer": "prodigy", "learning_rate": 1, "optimizer_config": "d_coeff=2,d0=1e-5"},
        ["prodigy", "d_coeff", "d_coef?", "slice_p"],
        {"optimizer_config": "d_coef=2,d0=1e-5"},
    ),
    "E-OPTIMIZER-ARGUMENT-VALUE": (
        {"optimizer_config": "rounding=up"},
        ["rounding", "up", "stochastic, kahan", "adamw_bf16"],
        {},
    ),
    "E-OPTIMIZER-ARGUMENT-NUMBER": (
        {"optimizer": "muon", "optimizer_config": "momentum=2"},
        ["momentum", "2", ">= 0, <= 1"],
        {},
    ),
    "E-OPTIMIZER-ARGUMENT-INTEGER": (
        {"optimizer": "muon", "optimizer_config": "ns_steps=2.5"},
        ["ns_steps", "2.5", ">= 1, <= 20"],
        {},
    ),
}


def check(problem, words, fixes):
    for language in LANGUAGES:
        title, hint = render_problem(problem, language)
        whole = f"{title}\n{hint or ''}"
        for word in words:
            assert word in whole, (word, whole)
    assert {fix.key: fix.value for fix in problem.fixes} == fixes
    assert render_problem(problem, "en")[0] != render_problem(problem, "es")[0]


OF_OPTIMIZERS = [library for library in LIBRARIES if library.extra == "optimizers"]


@pytest.mark.parametrize("code", PROBLEMS)
def test_problems_of_the_optimizer(with_config, code):
    options, words, fixes = PROBLEMS[code]
    problem = with_config(options).problem(code)
    check(problem, words, fixes)
    assert problem.origin.startswith("config/config.json:")
    assert problem.severity is (Severity.WARNING if code.startswith("W-") else Severity.ERROR)


@pytest.mark.parametrize("library", OF_OPTIMIZERS, ids=lambda library: library.module)
def test_a_missing_library_is_named_with_the_command_that_brings_it(with_config, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library.module, None)  # Python's own way to say that it is not there
    row = next(row for row in OPTIMIZERS.values() if row.library == library and "cpu" in row.devices)
    project = with_config(optimizer=row.name, learning_rate=row.rates.usual)
    problem = project.problem("E-LIBRARY-MISSING")
    words = [row.name, library.distribution, "pip install -e '.[optimizers]'", f"pip install '{library.requirement}'"]
    check(problem, words, {"optimizer": "adamw_bf16"})
    assert [p.severity for p in project.load(must_run=False).warnings] == [Severity.WARNING], "no mistake of the file"


def test_every_text_is_asserted_above():
    catalog = json.loads((LOCALES / "en/optimizers.json").read_text(encoding="utf-8"))
    assert {key.split(".")[1] for key in catalog} == PROBLEMS.keys()


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if "cpu" in row.devices])
def test_what_runs_on_a_cpu_is_accepted_without_a_word(with_config, name):
    usual = OPTIMIZERS[name].rates.usual
    assert not with_config(optimizer=name, device="cpu", learning_rate=usual).load().warnings


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.needs_cuda])
def test_what_needs_cuda_is_refused_on_a_cpu(with_config, name):
    assert "E-OPTIMIZER-DEVICE" in with_config(optimizer=name, device="cpu").codes()
    assert "E-OPTIMIZER-DEVICE" not in with_config(optimizer=name, device="cuda").codes()


@pytest.mark.parametrize("name", REFUSED_OPTIMIZERS)
def test_a_refused_one_has_one_reason(with_config, name):
    assert with_config(optimizer=name, optimizer_beta1=0.9).codes() == [f"E-OPTIMIZER-{REFUSED_OPTIMIZERS[name].why}"]


@pytest.mark.parametrize(("written", "name"), OPTIMIZER_SPELLINGS)
def test_other_names_of_an_optimizer(with_config, written, name):
    assert with_config(optimizer=written).load().config.optimizer.optimizer == name


def test_a_choice_that_is_refused_is_not_suggested(with_config):
    assert with_config(optimizer="dionn").problem("E-VALUE-CHOICE").fixes == ()


@pytest.mark.parametrize(
    "written",
    ["d_coef=2, slice_p=11,decouple=no", '{"d_coef": 2, "slice_p": "11", "decouple": false}'],
)
def test_arguments_are_read_from_text_and_from_an_object(written):
    arguments, problems = read_arguments(written, OPTIMIZERS["prodigy"])
    assert not problems
    assert arguments == {"d_coef": 2.0, "slice_p": 11, "decouple": False}


def test_all_problems_of_the_arguments_are_told_at_once():
    written = {"d_coef": -1, "slice_p": 0, "decouple": "maybe", "growth_rate": True, "d0": "x", "zzz": [1], "lr": 1}
    _, problems = read_arguments(json.dumps(written), OPTIMIZERS["prodigy"])
    assert len(problems) == len(written)


def test_the_extra_installs_what_the_catalog_names():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in {library.extra for library in LIBRARIES}:
        extra = re.search(rf"^{name} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
        wanted = {library.requirement for library in LIBRARIES if library.extra == name}
        assert set(re.findall(r'"([^"]+)"', extra[1])) == wanted
    for name in ("cuda", "cuda13"):
        told = re.search(rf"^{name} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
        wanted = {library.requirement for library in LIBRARIES if library.module in ("bitsandbytes", "torchao")}
        assert wanted <= set(re.findall(r'"([^"]+)"', told[1]))
