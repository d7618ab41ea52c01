"""memory_plan and fit: a plan fits by its own estimate, more memory is never worse, the user has the last word."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner.catalog.modules import LORA_TARGETS
from simpletuner.cli.main import main
from simpletuner.config.settings import OriginKind
from simpletuner.config.sizes import parse_bytes
from simpletuner.hardware.space import Space
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.planner.choose import choose, ladder, planned
from simpletuner.planner.estimate import ROOM, device_peak
from simpletuner.planner.from_config import Machine, plan_input
from simpletuner.planner.inputs import Adapter, Picture, PlanInput

GB = 10**9
EXAMPLE = "z-image-turbo.lora-24gb"


def card(gigabytes: float) -> Machine:
    space = Space(total_bytes=round(gigabytes * GB), free_bytes=round(gigabytes * GB))
    return Machine(kind="cuda", name="NVIDIA GeForce RTX 4090", device=space, host=space)


def unset(loaded, *names):
    """As if the example had not set these options."""
    from dataclasses import replace

    from simpletuner.config.settings import DEFAULT_ORIGIN

    return replace(loaded, origins={**loaded.origins, **dict.fromkeys(names, DEFAULT_ORIGIN)})


OPEN = ("base_model_precision", "gradient_checkpointing", "text_encoder_precision")


def test_without_being_asked_nothing_is_chosen(load_example):
    loaded = load_example(EXAMPLE)
    assert planned(loaded, card(4)).loaded is loaded


@pytest.mark.parametrize("gigabytes", [9, 12, 16, 24, 48, 80])
def test_a_plan_fits_the_card_it_is_made_for(load_example, gigabytes):
    plan = planned(unset(load_example(EXAMPLE, "--memory_plan=auto"), *OPEN), card(gigabytes))
    assert plan.fits
    after = plan_input(plan.loaded.config, plan.loaded.datasets, card(gigabytes))
    assert device_peak(after) <= ROOM * gigabytes * GB
    for choice in plan.choices:
        assert plan.loaded.config.option(choice.option) == choice.after != choice.before
        assert plan.loaded.origins[choice.option].kind is OriginKind.PLAN


def test_large_cards_recompute_nothing_and_small_ones_quantise(load_example):
    loaded = unset(load_example(EXAMPLE, "--memory_plan=auto"), *OPEN)
    large, small = (planned(loaded, card(size)).loaded.config.memory for size in (80, 12))
    assert (large.base_model_precision, large.gradient_checkpointing) == ("no_change", False)
    assert (small.base_model_precision, small.gradient_checkpointing) == ("int8-torchao", True)


def test_what_the_user_set_stays(load_example):
    loaded = load_example(EXAMPLE, "--fit=2GB", "--base_model_precision=no_change", "--gradient_checkpointing=true")
    plan = planned(loaded, card(80))
    assert plan.loaded.config.memory.base_model_precision == "no_change"
    assert plan.fits is False
    (problem,) = (p for p in plan.loaded.warnings if p.code == "W-PLAN-TOO-SMALL")
    for language in LANGUAGES:
        title, hint = render_problem(problem, language)
        assert "2.0 GB" in title
        assert "resolution" in (hint or "")


def test_without_a_known_memory_the_user_is_asked(load_example):
    unknown = Machine(kind="cuda", name="CUDA", device=None, host=None)
    plan = planned(load_example(EXAMPLE, "--memory_plan=auto"), unknown)
    (problem,) = (p for p in plan.loaded.warnings if p.code == "W-PLAN-NO-MEMORY")
    for language in LANGUAGES:
        title, hint = render_problem(problem, language)
        assert "memory_plan" in title
        assert "fit" in (hint or "")


PLANS = st.builds(
    PlanInput,
    adapter=st.builds(Adapter, rank=st.integers(1, 256), targets=st.sampled_from(list(LORA_TARGETS.values()))),
    train=st.builds(
        Picture,
        width_px=st.sampled_from([256, 512, 1024]),
        height_px=st.sampled_from([256, 768]),
        count=st.integers(1, 4),
        caption_tokens=st.integers(1, 300),
    ),
    compute_bytes=st.sampled_from([2, 4]),
    accumulation=st.integers(1, 3),
)


@settings(max_examples=25, deadline=None)
@given(
    plan=PLANS,
    first=st.integers(1, 60),
    more=st.integers(0, 40),
    fixed=st.sampled_from([{}, {"gradient_checkpointing": True}, {"train_batch_size": 1}]),
)
def test_more_memory_never_gives_a_slower_or_coarser_plan(plan, first, more, fixed):
    rungs = list(ladder(plan, fixed))
    small, large = (choose(plan, rungs, budget * GB) for budget in (first, first + more))
    fits = device_peak(small.applied(plan), phases=("latents", "training")) <= first * GB
    if fits:
        assert rungs.index(large) <= rungs.index(small)
        assert device_peak(large.applied(plan), phases=("latents", "training")) <= (first + more) * GB


@settings(max_examples=25, deadline=None)
@given(plan=PLANS, fixed=st.sampled_from([{}, {"train_batch_size": 1}]))
def test_the_ladder_goes_from_fast_and_fine_to_slow_and_coarse(plan, fixed):
    from simpletuner.planner.speed import step_flops

    rungs = list(ladder(plan, fixed))
    order = list(dict.fromkeys(rung.precision for rung in rungs))
    assert order[:2] == ["no_change", "int8-torchao"]
    for name in order:
        made = [rung.applied(plan) for rung in rungs if rung.precision == name]
        flops = [step_flops(one).step / one.train.count for one in made]
        assert flops == sorted(flops)
        assert {one.train.count * one.accumulation for one in made} == {plan.train.count * plan.accumulation}


def test_a_batch_that_does_not_fit_is_made_in_parts(load_example):
    arguments = ("--fit=14GB", "--train_batch_size=8", "--base_model_precision=int8")
    loaded = unset(load_example(EXAMPLE, *arguments), "gradient_checkpointing", "text_encoder_precision")
    plan = planned(loaded, card(24))
    optimizer = plan.loaded.config.optimizer
    assert plan.fits
    assert optimizer.train_batch_size * optimizer.gradient_accumulation_steps == 8
    assert 1 <= optimizer.train_batch_size < 8
    assert {dataset.train_batch_size for dataset in plan.loaded.datasets.images} == {optimizer.train_batch_size}
    after = plan_input(plan.loaded.config, plan.loaded.datasets, card(24))
    assert (after.train.count, after.accumulation) == (
        optimizer.train_batch_size,
        optimizer.gradient_accumulation_steps,
    )
    assert plan.loaded.origins["train_batch_size"].kind is OriginKind.PLAN
    whole = planned(unset(load_example(EXAMPLE, *arguments[1:], "--fit=400GB"), "gradient_checkpointing"), card(24))
    assert whole.loaded.config.optimizer.train_batch_size == 8


@pytest.mark.parametrize("option", ["gradient_accumulation_steps", "a dataset's batch"])
def test_a_batch_stays_whole_where_its_parts_are_said(load_example, option):
    from dataclasses import replace

    loaded = load_example(EXAMPLE, "--fit=24GB", "--train_batch_size=8")
    if option == "gradient_accumulation_steps":
        loaded = load_example(EXAMPLE, "--fit=24GB", "--train_batch_size=8", "--gradient_accumulation_steps=1")
    else:
        first, *rest = loaded.datasets.images
        images = (first.model_copy(update={"train_batch_size": 3}), *rest)
        loaded = replace(loaded, datasets=replace(loaded.datasets, images=images))
    assert planned(loaded, card(24)).loaded.config.optimizer.train_batch_size == 8


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("10GB", 10**10), ("10", 10**10), ("9.5 gib", int(9.5 * 2**30)), ("800MB", 8 * 10**8), ("1,5 TB", 15 * 10**11)],
)
def test_amounts_of_memory(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("text", ["ten", "-3GB", "0", "10XB"])
def test_what_is_no_amount_is_refused(capsys, language, text):
    assert main(["estimate", "--example", "demo", f"--fit={text}", "--lang", language]) == 2
    err = capsys.readouterr().err
    assert "E-FIT-SIZE" in err
    assert "9.5GiB" in err


@pytest.mark.parametrize(("language", "words"), [("en", "<- memory_plan"), ("es", "<- memory_plan")])
def test_the_origin_of_what_was_chosen_is_shown(capsys, language, words):
    shown = ["config", "show", "--origin", "--example", "z-image-base.lora", "--fit=12GB", "--lang", language]
    assert main(shown) == 0
    assert any(words in line and "text_encoder_precision" in line for line in capsys.readouterr().out.splitlines())
