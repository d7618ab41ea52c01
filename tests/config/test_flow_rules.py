"""Mistakes in the options of the noise levels, the noise and the loss."""

from __future__ import annotations

import pytest

from simpletuner.config.number_list import parse_numbers
from simpletuner.i18n import render_problem

# code -> (options, words that both languages' texts must hold)
CASES = {
    "E-SIGMA-LAW-TWICE": (
        {"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True},
        ["flow_use_uniform_schedule", "flow_use_beta_schedule"],
    ),
    "E-CUBIC-WEIGHTS": ({"flow_cubic_schedule_weights": "1,-2"}, ["flow_cubic_schedule_weights = 1,-2"]),
    "E-CUSTOM-TIMESTEPS": ({"flow_custom_timesteps": [500, 1001]}, ["flow_custom_timesteps = [500, 1001]"]),
    "W-SIGMA-UNREAD": (
        {"flow_use_uniform_schedule": True, "flow_sigmoid_scale": 2},
        ["flow_sigmoid_scale", "flow_use_uniform_schedule"],
    ),
    "E-EMA-TWICE": ({"use_ema": True, "optimizer": "adamw_schedulefree"}, ["adamw_schedulefree", "use_ema"]),
    "W-EMA-UNREAD": ({"ema_decay": 0.9, "ema_validation": "none"}, ["ema_decay, ema_validation", "use_ema=true"]),
    "W-ROLLOUT-NEVER": ({"scheduled_sampling_max_step_offset": 2}, ["scheduled_sampling_probability"]),
    "W-FLOW-UNREAD": ({"huber_c": 0.5, "noise_offset": 0.2}, ["huber_c, noise_offset", "loss_type=huber"]),
}


@pytest.mark.parametrize("code", CASES)
def test_messages(with_config, code):
    options, words = CASES[code]
    problem = with_config(options).problem(code)
    assert problem.origin.startswith("config/config.json:")
    english, spanish = ("\n".join(filter(None, render_problem(problem, language))) for language in ("en", "es"))
    assert english != spanish
    for word in words:
        assert word in english and word in spanish, word


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        ({"flow_beta_schedule_alpha": 3}, "flow_beta_schedule_alpha"),
        ({"flow_timesteps_mode": "round-robin"}, "flow_timesteps_mode"),
        ({"flow_custom_timesteps": "0.5", "flow_schedule_auto_shift": True}, "flow_schedule_auto_shift"),
    ],
)
def test_what_the_law_does_not_read(with_config, options, unread):
    assert with_config(options).problem("W-SIGMA-UNREAD").params["unread"] == unread


@pytest.mark.parametrize(
    "options",
    [
        {"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 3},
        {"flow_custom_timesteps": [250, 500], "flow_timesteps_mode": "round-robin"},
        {"flow_cubic_schedule_weights": "1, 3, 1"},
        {"loss_type": "huber", "huber_c": 0.2, "offset_noise": True, "noise_offset": 0.05},
    ],
)
def test_good_options_are_accepted_in_silence(with_config, options):
    assert not [code for code in with_config(options).codes() if not code.startswith("W-SHIFT")]


def test_any_two_laws_conflict(with_config):
    laws = {
        "flow_use_uniform_schedule": True,
        "flow_use_beta_schedule": True,
        "flow_cubic_schedule_weights": "1,2",
        "flow_custom_timesteps": "500",
    }
    for first in laws:
        for second in laws:
            if first != second:
                problem = with_config({name: laws[name] for name in (first, second)}).problem("E-SIGMA-LAW-TWICE")
                assert {problem.params["first"], problem.params["second"]} == {first, second}


@pytest.mark.parametrize(("text", "numbers"), [("1", (1.0,)), ("[0.5, 1]", (0.5, 1.0)), (" 1e-1,2 ", (0.1, 2.0))])
def test_numbers_are_read(text, numbers):
    assert parse_numbers(text) == numbers


@pytest.mark.parametrize("text", ["", "1,,2", "a", "nan", "inf", "[]"])
def test_what_is_no_list_of_numbers(text):
    with pytest.raises(ValueError):
        parse_numbers(text)


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({"scheduled_sampling_probability": 0.5}, "scheduled_sampling_max_step_offset"),
        (
            {
                "scheduled_sampling_max_step_offset": 2,
                "scheduled_sampling_ramp_steps": 5,
                "scheduled_sampling_prob_end": 0,
            },
            "scheduled_sampling_prob_end",
        ),
    ],
)
def test_rollouts_that_will_not_happen(with_config, options, needs):
    assert with_config(options).problem("W-ROLLOUT-NEVER").params["needs"] == needs


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        ({"scheduled_sampling_ramp_steps": 5}, "scheduled_sampling_probability"),
        (
            {"scheduled_sampling_prob_start": 0.1, "scheduled_sampling_sampler": "euler"},
            "scheduled_sampling_prob_start",
        ),
        ({"scheduled_sampling_sampler": "euler", "scheduled_sampling_order": 3}, "scheduled_sampling_order"),
    ],
)
def test_what_rollouts_do_not_read(with_config, options, unread):
    on = {"scheduled_sampling_max_step_offset": 2, "scheduled_sampling_probability": 0.5}
    assert with_config({**on, **options}).problem("W-FLOW-UNREAD").params["unread"] == unread


def test_rollouts_on_are_accepted_in_silence(with_config):
    options = {
        "scheduled_sampling_max_step_offset": 4,
        "scheduled_sampling_prob_start": 0.0,
        "scheduled_sampling_ramp_steps": 100,
        "scheduled_sampling_ramp_shape": "cosine",
        "reflexflow": False,
    }
    project = with_config(options)
    assert project.codes() == []
    assert project.load().config.experimental.scheduled_sampling_reflexflow == "off"
