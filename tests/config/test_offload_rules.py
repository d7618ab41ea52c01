"""Every pair of memory options works or is refused with a reason; and every message about offload says what to do."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

import simpletuner
from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import ConfigError, Severity

LOCALES = Path(simpletuner.__file__).parent / "locales"

# code -> (options, words that both languages' texts must hold, what the fixes set)
PROBLEMS = {
    "E-OFFLOAD-TWICE": (
        {"enable_group_offload": True, "musubi_blocks_to_swap": 10},
        ["enable_group_offload", "musubi_blocks_to_swap"],
        {"musubi_blocks_to_swap": None},
    ),
    "E-OFFLOAD-PRECISION": (
        {"enable_group_offload": True, "base_model_precision": "int4-quanto"},
        ["enable_group_offload", "base_model_precision = int4-quanto", "int4-torchao"],
        {"base_model_precision": "int4-torchao"},
    ),
    "E-OFFLOAD-TRAINED": (
        {"ramtorch": True, "model_type": "full"},
        ["ramtorch", "model_type = full"],
        {"ramtorch": None},
    ),
    "E-OFFLOAD-KEPT-TWICE": (
        {
            "enable_group_offload": True,
            "group_offload_to_disk_path": "a",
            "quantized_model_dir": "b",
            "base_model_precision": "int8-torchao",
        },
        ["group_offload_to_disk_path", "quantized_model_dir"],
        {"quantized_model_dir": None},
    ),
    "W-OFFLOAD-UNREAD": (
        {"group_offload_type": "leaf_level", "ramtorch_transformer_percent": 50},
        ["group_offload_type, ramtorch_transformer_percent", "enable_group_offload", "ramtorch"],
        {},
    ),
}
# One setting of every memory option that is not its default, with what it needs to be read.
SETTINGS: dict[str, dict[str, object]] = {
    "mixed_precision": {"mixed_precision": "no"},
    "int8": {"base_model_precision": "int8-torchao"},
    "nf4": {"base_model_precision": "nf4-bnb"},
    "quanto": {"base_model_precision": "int8-quanto"},
    "text int8": {"text_encoder_precision": "int8-torchao"},
    "text quanto": {"text_encoder_precision": "int8-quanto"},
    "quantize_via": {"quantize_via": "cpu"},
    "kept": {"quantized_model_dir": "kept", "base_model_precision": "int8-torchao"},
    "fp32 base": {"base_model_default_dtype": "fp32"},
    "no checkpointing": {"gradient_checkpointing": False},
    "interval": {"gradient_checkpointing_interval": 2},
    "auto": {"gradient_checkpointing_interval": "auto", "gradient_checkpointing_budget": 4},
    "inputs": {"gradient_checkpointing_offload": True},
    "product": {"gradient_checkpointing_keep": "product"},
    "tiling": {"vae_enable_tiling": True},
    "slicing": {"vae_enable_slicing": True},
    "vae_dtype": {"vae_dtype": "fp32"},
    "keep_vae_loaded": {"keep_vae_loaded": True},
    "startup": {"offload_during_startup": True},
    "group": {"enable_group_offload": True},
    "leaf": {"enable_group_offload": True, "group_offload_type": "leaf_level"},
    "pairs": {"enable_group_offload": True, "group_offload_blocks_per_group": 2},
    "some blocks": {"enable_group_offload": True, "group_offload_blocks": 3},
    "stream": {"enable_group_offload": True, "group_offload_use_stream": True},
    "disk": {"enable_group_offload": True, "group_offload_to_disk_path": "spill"},
    "group text": {"group_offload_text_encoder": True},
    "group vae": {"group_offload_vae": True},
    "musubi": {"musubi_blocks_to_swap": 10},
    "ramtorch": {"ramtorch": True},
    "ramtorch targets": {"ramtorch": True, "ramtorch_target_modules": ["feed_forward.w1"]},
    "ramtorch percent": {"ramtorch": True, "ramtorch_transformer_percent": 50},
    "ramtorch text": {"ramtorch_text_encoder": True, "ramtorch_text_encoder_percent": 50},
    "ramtorch vae": {"ramtorch_vae": True},
    "plan": {"memory_plan": "auto", "fit": "10GB"},
}
GROUP = {"group", "leaf", "pairs", "some blocks", "stream", "disk", "group text", "group vae"}
RAMTORCH = {"ramtorch", "ramtorch targets", "ramtorch percent", "ramtorch text", "ramtorch vae"}
MUSUBI = {"musubi"}
TRANSFORMER = (GROUP | RAMTORCH | MUSUBI) - {"group text", "group vae", "ramtorch text", "ramtorch vae"}


def refused(first: str, second: str) -> set[str]:
    """The codes that a pair is refused with."""
    codes, pair = set(), {first, second}
    if sum(bool(pair & strategy) for strategy in (GROUP, RAMTORCH, MUSUBI)) > 1:
        codes.add("E-OFFLOAD-TWICE")
    if ("quanto" in pair and pair & TRANSFORMER) or ("text quanto" in pair and pair & {"group text", "ramtorch text"}):
        codes.add("E-OFFLOAD-PRECISION")
    if pair == {"disk", "kept"}:
        codes.add("E-OFFLOAD-KEPT-TWICE")
    return codes


def argv(options: dict[str, object]) -> list[str]:
    return [f"--{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in options.items()]


def test_every_memory_option_is_among_the_pairs():
    from simpletuner.config.sections.memory import MemorySection

    named = {key for options in SETTINGS.values() for key in options}
    assert named == MemorySection.model_fields.keys()


def test_every_pair_of_memory_options_works_or_is_refused(project):
    """The whole table: what is refused, with which reason, and that nothing else is."""
    found, expected = {}, {}
    for first, second in itertools.combinations(SETTINGS, 2):
        options = {**SETTINGS[first], **SETTINGS[second]}
        if any(options[key] != value for key, value in SETTINGS[first].items()):
            continue  # two values of one option
        try:
            project.load(*argv(options))
            found[first, second] = set()
        except ConfigError as error:
            found[first, second] = {problem.code for problem in error.problems}
        expected[first, second] = refused(first, second)
    assert found == expected
    assert len(found) > 400


@pytest.mark.parametrize("option", ["enable_group_offload", "ramtorch", "musubi_blocks_to_swap"])
def test_every_precision_that_can_be_streamed_is(project, option):
    value = "10" if option == "musubi_blocks_to_swap" else "true"
    for name, row in PRECISIONS.items():
        if row.refused is None:
            codes = project.codes(f"--{option}={value}", f"--base_model_precision={name}")
            assert ("E-OFFLOAD-PRECISION" in codes) == name.endswith("-quanto"), name


@pytest.mark.parametrize("code", PROBLEMS)
def test_the_message(project, code):
    options, words, fixes = PROBLEMS[code]
    problem = project.problem(code, *argv(options))
    assert {fix.key: fix.value for fix in problem.fixes} == fixes
    for language in LANGUAGES:
        texts = " ".join(text for text in render_problem(problem, language) if text)
        for word in words:
            assert word in texts, (language, word)
    assert (problem.severity is Severity.WARNING) == code.startswith("W-")


def test_a_fix_solves_its_problem(project):
    for code, (options, _, fixes) in PROBLEMS.items():
        mended = {key: value for key, value in {**options, **fixes}.items() if value is not None}
        if fixes:
            assert code not in project.codes(*argv(mended)), code


def test_blocks_per_group_is_not_read_at_leaf_level(project):
    options = {"enable_group_offload": True, "group_offload_type": "leaf_level", "group_offload_blocks_per_group": 2}
    problem = project.problem("W-OFFLOAD-UNREAD", *argv(options))
    assert problem.params["readers"] == "group_offload_type = block_level"


@pytest.mark.parametrize(("option", "value"), [("musubi_blocks_to_swap", 30), ("group_offload_blocks_per_group", 0)])
def test_counts_have_bounds(project, option, value):
    assert any(code.startswith("E-VALUE") for code in project.codes(f"--{option}={value}"))


def test_options_of_the_ramtorch_library_that_mean_nothing_here_are_named(project):
    told = project.load("--ramtorch", "--ramtorch_disable_sync_hooks", "--ramtorch_disable_extensions=true").warnings
    named = " ".join(str(problem.params) for problem in told)
    assert "ramtorch_disable_sync_hooks" in named and "ramtorch_disable_extensions" not in named


def test_every_text_of_the_area_is_asserted_somewhere():
    """Here, or where a run brings it about."""
    texts = json.loads((LOCALES / "en" / "offload.json").read_text(encoding="utf-8"))
    codes = {key.split(".")[1] for key in texts if key.startswith("problem.")}
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("test_*.py"))
    assert {code for code in codes if not re.search(rf'"{code}"', tests)} == set()
