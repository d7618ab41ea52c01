"""The loop's order of events: steps, saves, images, stops."""

from __future__ import annotations

import math
from itertools import count

import pytest

from simpletuner.optim.schedules import ScheduleSettings
from simpletuner.train.loop import Ending, LoopSettings, run_loop
from simpletuner.train.step import MicroBatch, StepResult


class Steering:
    """Answers from a script: {updates done: what is asked then}."""

    def __init__(self, script=None) -> None:
        self.script = script or {}
        self.step = 0

    def stop_level(self) -> int:
        return {"stop": 1, "leave": 2}.get(self.script.get(self.step), 0)

    def wants_checkpoint(self) -> bool:
        return self.script.get(self.step) == "checkpoint"

    def wants_validation(self) -> bool:
        return self.script.get(self.step) == "validate"


def drive(
    *,
    total=6,
    start=0,
    accumulation=2,
    checkpoint=0,
    validation=0,
    evaluation=0,
    script=None,
    regularisation_loss=0.0,
    **schedule,
):
    steering = Steering(script)
    told = []
    indices = []

    def batches():
        for index in count(start * accumulation):
            yield MicroBatch(index=index, latents=(), prompts=(), is_regularisation=False, names=())

    def update(micro, rate):
        taken = [batch.index for batch in micro]
        indices.append(taken)
        steering.step += 1
        told.append(("step", steering.step, rate))
        return StepResult(
            loss=1.0,
            regularisation_loss=regularisation_loss,
            grad_norm=1.0,
            num_samples=len(taken),
            mean_sigma=0.5,
        )

    steering.step = start
    events = []
    ending = run_loop(
        batches(),
        settings=LoopSettings(
            start_step=start,
            total_steps=total,
            accumulation_steps=accumulation,
            epoch_of=lambda index: index // 3,
            schedule=ScheduleSettings(learning_rate=0.5, **schedule),
            checkpoint_interval=checkpoint,
            validation_interval=validation,
            evaluation_interval=evaluation,
        ),
        update=update,
        save=lambda step: told.append(("save", step)),
        validate=lambda step: told.append(("validate", step)),
        evaluate=lambda step: told.append(("evaluate", step)),
        steering=steering,
        emit=events.append,
    )
    return ending, told, indices, events


@pytest.mark.parametrize(("loss", "told"), [(math.nan, None), (0.25, 0.25)])
def test_the_loss_of_regularisation_is_told_where_there_is_one(loss, told):
    _, _, _, events = drive(total=1, regularisation_loss=loss)
    assert [event.regularisation_loss for event in events] == [told]


def test_every_update_takes_its_own_micro_batches():
    ending, _, indices, events = drive(total=3)
    assert ending == (Ending.COMPLETE, 3)
    assert indices == [[0, 1], [2, 3], [4, 5]]
    assert [event.step for event in events] == [1, 2, 3]
    assert [event.epoch for event in events] == [1, 1, 2]


def test_a_resumed_loop_does_what_the_whole_one_would_have_done():
    _, told, indices, _ = drive(total=6, kind="linear", warmup_steps=2)
    _, told_later, indices_later, _ = drive(total=6, start=4, kind="linear", warmup_steps=2)
    assert indices[4:] == indices_later
    assert told[4:] == told_later


def test_saves_and_images_come_when_they_are_due_but_not_after_the_last_step():
    _, told, _, _ = drive(total=6, checkpoint=2, validation=3)
    assert [entry for entry in told if entry[0] != "step"] == [("save", 2), ("validate", 3), ("save", 4)]


def test_held_out_images_come_between_the_save_and_the_images():
    _, told, _, _ = drive(total=6, checkpoint=4, validation=4, evaluation=2)
    assert [entry for entry in told if entry[0] != "step"] == [
        ("evaluate", 2),
        ("save", 4),
        ("evaluate", 4),
        ("validate", 4),
    ]


def test_what_is_asked_for_happens_after_the_running_step():
    _, told, _, _ = drive(total=4, script={1: "checkpoint", 2: "validate"})
    assert [entry for entry in told if entry[0] != "step"] == [("save", 1), ("validate", 2)]


@pytest.mark.parametrize(
    ("script", "expected", "saves"),
    [
        ({2: "stop"}, (Ending.STOPPED, 2), [("save", 2)]),
        ({2: "leave"}, (Ending.ABANDONED, 2), []),
        ({0: "stop"}, (Ending.STOPPED, 0), [("save", 0)]),
        ({6: "stop"}, (Ending.COMPLETE, 6), []),
    ],
)
def test_a_stop_finishes_the_step_and_saves_unless_told_not_to(script, expected, saves):
    ending, told, _, _ = drive(script=script)
    assert ending == expected
    assert [entry for entry in told if entry[0] == "save"] == saves


def test_nothing_is_left_to_do_when_the_checkpoint_is_at_the_end():
    assert drive(total=4, start=4)[0] == (Ending.COMPLETE, 4)
    assert drive(total=4, start=9)[0] == (Ending.COMPLETE, 9)
