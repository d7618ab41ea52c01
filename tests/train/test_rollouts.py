"""Options of scheduled sampling become settings, and its cost is told."""

from __future__ import annotations

import pytest

from simpletuner.config.root import Config
from simpletuner.config.sections.experimental import ExperimentalSection
from simpletuner.i18n import render_problem
from simpletuner.planner.blocks import Adapter
from simpletuner.planner.inputs import Picture, PlanInput
from simpletuner.planner.speed import step_flops
from simpletuner.problems import Problem
from simpletuner.train.rollouts import make_rollout, rollout_cost, rollout_settings


def with_options(**options: object) -> Config:
    named = {f"scheduled_sampling_{name}": value for name, value in options.items()}
    return Config(experimental=ExperimentalSection(**named))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"probability": 0.5},
        {"max_step_offset": 2},
        {"max_step_offset": 2, "ramp_steps": 5, "prob_end": 0.0, "probability": 0.9},
    ],
)
def test_off_is_no_hook_at_all(options):
    config = with_options(**options)
    assert rollout_settings(config) is None
    assert make_rollout(config, lambda latents, sigma_B, prompts: latents) is None


def test_a_ramp_starts_where_it_is_told_and_replaces_the_probability():
    ramped = rollout_settings(with_options(max_step_offset=2, probability=0.9, ramp_steps=10, start_step=5))
    assert [ramped.ramp.at(step) for step in (4, 5, 10, 15)] == [0.0, 0.0, 0.25, 0.5]
    plain = rollout_settings(with_options(max_step_offset=2, probability=0.9))
    assert plain.ramp.at(0) == 0.9
    assert len(plain.levels) == 8 and plain.levels[0] == 1.0 and plain.levels[-1] > 0
    assert plain.reflexflow is not None
    assert rollout_settings(with_options(max_step_offset=2, probability=1, reflexflow="off")).reflexflow is None


def test_its_cost_is_told_in_both_languages():
    problem = rollout_cost(rollout_settings(with_options(max_step_offset=3, probability=0.5)))
    assert problem.params["extra"] == "1"
    titles = [render_problem(problem, language)[0] for language in ("en", "es")]
    assert titles[0] != titles[1]
    for title in titles:
        assert all(word in title for word in ("50%", "1 to 3" if title is titles[0] else "1 a 3", "8", "unipc"))


def test_the_planner_counts_its_forwards():
    picture = Picture(width_px=512, height_px=512, count=2, caption_tokens=32)
    plans = [
        PlanInput(adapter=Adapter(rank=4, targets=("to_q",)), train=picture, extra_forwards=extra)
        for extra in (0.0, 1.5)
    ]
    plain, rolled = map(step_flops, plans)
    assert rolled.step - plain.step == pytest.approx(1.5 * plain.forward)


def test_an_average_that_begins_late_is_told_in_both_languages():
    problem = Problem(code="W-EMA-BEGINS", params={"checkpoint": "checkpoint-40", "step": 40})
    english, spanish = (render_problem(problem, language)[0] for language in ("en", "es"))
    assert english != spanish
    assert all("checkpoint-40" in title and "use_ema" in title for title in (english, spanish))
