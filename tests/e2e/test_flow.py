"""What can be switched on in the flow, end to end: a run that is stopped and goes on makes the steps of one that was
left alone, bit for bit."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

WEIGHTS = "pytorch_lora_weights.safetensors"
EMA_WEIGHTS = "pytorch_lora_weights_ema.safetensors"

SWITCHED_ON = {
    "law, loss, noise, average": {
        "flow_use_beta_schedule": True,
        "loss_type": "huber",
        "offset_noise": True,
        "input_perturbation": 0.1,
        "input_perturbation_steps": 5,
        "gradient_accumulation_steps": 2,
        "use_ema": True,
        "ema_update_interval": 2,
        "ema_decay": 0.9,
    },
    "levels in turn, average on the CPU": {
        "flow_custom_timesteps": [900, 500, 100],
        "flow_timesteps_mode": "round-robin",
        "loss_type": "smooth_l1",
        "use_ema": True,
        "ema_device": "cpu",
        "ema_warmup_steps": 3,
        "ema_foreach_disable": True,
    },
    "rollouts": {
        "scheduled_sampling_max_step_offset": 3,
        "scheduled_sampling_prob_start": 0.4,
        "scheduled_sampling_prob_end": 1.0,
        "scheduled_sampling_ramp_steps": 4,
        "scheduled_sampling_ramp_shape": "cosine",
        "lora_dropout": 0.1,
        "disable_segmented_timestep_sampling": True,
    },
}


def assert_same(one, other) -> None:
    first, second = load_file(one), load_file(other)
    assert first and first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.equal(second[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("case", SWITCHED_ON)
def test_stopped_and_resumed_equals_uninterrupted(project, train, case):
    options = SWITCHED_ON[case]
    project.set(cache_dir="cache", checkpoint_step_interval=0, **options)
    train("--output_dir", "straight")
    train("--max_train_steps", "3")
    train()
    assert project.losses() == project.losses(project.root / "straight")
    forwards = [event.get("rollout_forwards") for event in project.events() if event["event"] == "step.finished"]
    assert any(forwards) == (case == "rollouts")
    names = (WEIGHTS, EMA_WEIGHTS) if options.get("use_ema") else (WEIGHTS,)
    for name in names:
        assert_same(project.root / "straight" / name, project.output / name)
    if len(names) == 2:
        raw, averaged = (load_file(project.output / name) for name in names)
        assert any(not raw[key].equal(averaged[key]) for key in raw)


IMAGES = {
    "validation_disable": False,
    "validation_prompt": "a photo of a sks ball",
    "validation_step_interval": 0,
    "validation_num_inference_steps": 1,
    "validation_resolution": "64x64",
    "disable_benchmark": True,
    "max_train_steps": 2,
    "checkpoint_step_interval": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize(("shown", "wanted"), [("comparison", [False, True]), ("ema_only", [True])])
def test_images_of_the_average_are_made_as_asked(project, shown, wanted):
    project.set(**IMAGES, use_ema=True, ema_validation=shown)
    done = project.run("train")
    assert done.returncode == 0, done.stderr
    folder = project.output / "validation_images"
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["is_averaged"]) for line in lines] == [(2, kind) for kind in wanted]
    if len(lines) == 2:
        one, another = ((folder / line["file"]).read_bytes() for line in lines)
        assert one != another
    assert (folder / "contact_sheet.png").is_file()


@pytest.mark.slow
def test_an_average_may_begin_at_a_checkpoint_without_one(project, train):
    train("--max_train_steps", "2")
    train("--use_ema", "true", "--max_train_steps", "3")
    told = [event["problem"]["code"] for event in project.events() if event["event"] == "problem"]
    assert "W-EMA-BEGINS" in told
    assert "W-CHECKPOINT-DIFFERS" not in told, "nothing that decides a step was changed"
    assert (project.output / EMA_WEIGHTS).is_file()
