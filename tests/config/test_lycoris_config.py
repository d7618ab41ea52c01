"""The file that lycoris_config names: read into what it means, and refused with the line that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import simpletuner
from simpletuner.catalog.lycoris import LycorisSettings, Update
from simpletuner.config.lycoris import canonical_lycoris, read_lycoris
from simpletuner.config.release import releases_gradients
from simpletuner.config.sections.adapter import merges_assistant

from .test_messages import check

# The example that guides carry.
USUAL = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "full_matrix": True,
    "factor": 16,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
    },
}
PRESET = "apply_preset"
# code -> (changes of the file, words that both languages' texts must hold, whether a line is told)
FILES = {
    "E-LYCORIS-MISSING": ({"multiplier": None, "linear_alpha": None}, ["multiplier, linear_alpha"], False),
    "E-LYCORIS-KEY": ({"linear_dmi": 4}, ["linear_dmi", "linear_dim"], True),
    "E-LYCORIS-VALUE": ({"factor": "sixteen"}, ["factor", "sixteen", ">= -1"], True),
    "E-LYCORIS-ALGO": ({"algo": "locker"}, ["locker", "lokr, loha"], True),
    "E-LYCORIS-NOT-YET": ({"algo": "dylora"}, ["dylora", "lokr, loha"], True),
    "E-LYCORIS-CLASS": ({PRESET: {"target_module": ["Atention"]}}, ["Atention", "Attention, FeedForward"], True),
}
ELSEWHERE = {  # asserted where they come about
    "E-LYCORIS-TARGET", "E-LYCORIS-SIZE", "E-LYCORIS-MODULES", "E-LYCORIS-SHAPE", "E-LYCORIS-SCALE", "E-LYCORIS-KIND",
    "E-LORA-DORA", "E-FULL-WEIGHTS",
}  # fmt: skip


def changed(**changes: object) -> dict[str, object]:
    content = {**USUAL, **changes}
    return {key: value for key, value in content.items() if value is not None}


def write(project, content: object) -> Path:
    project.write("config/config.json", {"validation_disable": True, "lora_type": "lycoris"})
    return project.write("config/lycoris_config.json", json.dumps(content, indent=1))


def test_the_usual_file_means_what_it_says(project):
    lokr = Update(algo="lokr", dim=10000, alpha=1.0, factor=16, full_matrix=True)
    path = write(project, USUAL)
    assert read_lycoris(path) == LycorisSettings(
        update=lokr, by_class={"Attention": lokr, "FeedForward": replace(lokr, factor=8)}
    )
    assert not [problem for problem in project.problems() if "LYCORIS" in problem.code]
    assert project.load().config.adapter.lycoris_config == str(path)


def test_what_is_left_out_is_usual_and_equal_settings_are_equal_text(project):
    short = {"algo": "LoCon", "multiplier": 0.5, "linear_dim": 8, "linear_alpha": 0}
    settings = read_lycoris(write(project, short))
    assert settings == LycorisSettings(update=Update(algo="lora", dim=8, alpha=8.0), multiplier=0.5)
    one = canonical_lycoris(write(project, short))
    assert one == canonical_lycoris(write(project, dict(reversed(short.items()))))


def test_names_go_before_classes(project):
    preset = {"name_algo_map": {"layers.*.to_q": {"algo": "loha", "dim": 4}}, "use_fnmatch": True}
    settings = read_lycoris(write(project, changed(apply_preset=preset)))
    assert settings.classes == () and settings.wildcards
    assert settings.by_name["layers.*.to_q"] == replace(settings.update, algo="loha", dim=4)


@pytest.mark.parametrize("code", FILES)
def test_a_file_that_is_wrong_is_refused_with_its_line(project, monkeypatch, code):
    monkeypatch.chdir(project.folder)
    changes, words, has_line = FILES[code]
    write(project, changed(**changes))
    problem = project.problem(code)
    check(problem, words)
    assert problem.origin.startswith("config/lycoris_config.json" + (":" if has_line else ""))
    assert problem.path == "/lycoris_config"


@pytest.mark.parametrize(
    "changes",
    [
        {"full_matrix": "yes"},
        {"linear_dim": 2.5},
        {"linear_alpha": -1},
        {PRESET: []},
        {PRESET: {"target_module": "Attention"}},
        {PRESET: {"module_algo_map": {"Attention": 4}}},
        {"dropout": 1},
    ],
)
def test_values_of_the_wrong_kind_are_refused(project, changes):
    write(project, changed(**changes))
    assert project.codes() == ["E-LYCORIS-VALUE"]


def test_all_problems_are_told_at_once(project):
    write(project, changed(algo="nope", dora_wd=True, factor=1.5, extra=1))
    codes = sorted(code for code in project.codes() if code.startswith("E-"))
    assert codes == ["E-LYCORIS-ALGO", "E-LYCORIS-KEY", "E-LYCORIS-NOT-YET", "E-LYCORIS-VALUE"]


def test_a_missing_or_broken_file_is_told(project):
    project.write("config/config.json", {"validation_disable": True, "lora_type": "lycoris"})
    check(project.problem("E-LYCORIS-FILE"), ["lycoris_config.json", "linear_dim"])
    project.write("config/lycoris_config.json", "{")
    assert project.codes() == ["E-JSON-END"]
    project.write("config/lycoris_config.json", "[]")
    assert project.codes() == ["E-LYCORIS-VALUE"]


def test_options_that_nothing_reads_are_named(project):
    write(project, USUAL)
    check(project.problem("W-ADAPTER-UNREAD", "--lora_rank=4"), ["lora_rank", "lycoris"])
    project.write("config/config.json", {"validation_disable": True, "init_lokr_norm": 0.001})
    check(project.problem("W-ADAPTER-UNREAD"), ["init_lokr_norm", "standard"])


def test_starts_that_exclude_each_other_or_are_not_offered(with_config):
    check(with_config(lora_init_type="pissa", use_dora=True).problem("E-LORA-INIT-TWICE"), ["pissa", "use_dora"])
    check(with_config(lora_init_type="loftq").problem("E-LORA-INIT-LOFTQ"), ["loftq", "pissa"])
    assert not with_config(lora_init_type="olora").codes() and not with_config(use_dora=True).codes()


FULL = {"model_type": "full"}
# code -> (options beside model_type full, words that both languages' texts must hold)
OF_FULL = {
    "E-FULL-BASE": ({"base_model_precision": "int8"}, ["base_model_precision = int8-torchao"]),
    "W-FULL-ROUNDING": ({"optimizer": "adamw"}, ["adamw", "adamw_bf16", "fp32"]),
    "E-RELEASE-GRADIENTS": (
        {"optimizer_release_gradients": True, "gradient_accumulation_steps": 2, "optimizer": "prodigy"},
        ["gradient_accumulation_steps = 2, max_grad_norm = 1, optimizer = prodigy"],
    ),
    "E-FULL-FP16": ({"mixed_precision": "fp16"}, ["float16", "bf16", "fp32"]),
    "I-FULL-GRADIENTS": ({}, ["max_grad_norm = 1", "grad_clip_method"]),
}


@pytest.mark.parametrize("code", OF_FULL)
def test_what_full_training_cannot_have_is_told(with_config, code):
    options, words = OF_FULL[code]
    check(with_config({**FULL, **options}).problem(code), words)


@pytest.mark.parametrize("option", ["enable_group_offload", "ramtorch"])
def test_weights_that_stream_are_not_trained(with_config, option):
    check(with_config({**FULL, option: True}).problem("E-FULL-BASE"), [option])


def test_full_training_without_clipping_by_norm_is_nothing_special(with_config):
    project = with_config({**FULL, "max_grad_norm": 0, "optimizer": "adamw", "base_model_default_dtype": "fp32"})
    assert not project.codes()
    assert releases_gradients(project.load().config)
    assert not releases_gradients(project.load("--optimizer_release_gradients=false").config)
    assert not releases_gradients(with_config(max_grad_norm=0).load().config)
    assert releases_gradients(with_config(max_grad_norm=0, optimizer_release_gradients=True).load().config)


def test_regularisation_needs_the_untrained_model(with_config, with_datasets):
    with_datasets(is_regularisation_data=True)
    check(with_config({**FULL, "max_grad_norm": 0}).problem("E-FULL-REGULARISATION"), ["subject", "model_type full"])


@pytest.mark.parametrize("option", [{"use_dora": True}, {"model_type": "full"}])
def test_a_merged_assistant_would_be_in_the_file(with_config, option):
    turbo = {"model_flavour": "turbo", "assistant_lora_mode": "merged"}
    problem = with_config({**turbo, **option}).problem("E-ASSISTANT-IN-FILE")
    check(problem, [next(iter(option)), "merged", "live"])
    adapter = with_config({"model_flavour": "turbo", "use_dora": True}).load().config.adapter
    assert not merges_assistant(adapter, is_quantised=True)


def test_targets_may_be_in_a_file(with_config):
    project = with_config(peft_lora_target_modules="config/targets.json")
    check(project.problem("E-LORA-TARGETS-FILE"), ["config/targets.json", "to_q"])
    project.write("config/targets.json", ["to_q", "layers.*.attention.to_v"])
    assert project.load().config.adapter.peft_lora_target_modules == ("to_q", "layers.*.attention.to_v")
    project.write("config/targets.json", {"to_q": 1})
    assert project.codes() == ["E-LORA-TARGETS-FILE"]


def test_every_text_is_asserted():
    catalog = json.loads((Path(simpletuner.__file__).parent / "locales/en/lycoris.json").read_text(encoding="utf-8"))
    known = {key.split(".")[1] for key in catalog}
    assert known == OF_FULL.keys() | FILES.keys() | ELSEWHERE | {
        "E-LYCORIS-FILE",
        "W-ADAPTER-UNREAD",
        "E-LORA-INIT-LOFTQ",
        "E-LORA-INIT-TWICE",
        "E-FULL-REGULARISATION",
        "E-LORA-TARGETS-FILE",
        "E-ASSISTANT-IN-FILE",
    }
