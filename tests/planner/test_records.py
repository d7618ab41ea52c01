"""What a run took is kept, survives torn lines and other writers, and corrects later estimates within bounds."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest

from simpletuner.planner.inputs import Adapter, Picture, PlanInput
from simpletuner.planner.records import (
    Measurement,
    PhasePeak,
    append_measurement,
    correction,
    measured_rate,
    newest,
    plan_key,
    plan_kin,
    read_measurements,
    runtime_bytes,
)

PLAN = PlanInput(
    adapter=Adapter(rank=16, targets=("to_q",)), train=Picture(width_px=512, height_px=512, count=1, caption_tokens=9)
)
RECORD = Measurement(
    key="k",
    kin="a",
    device="GPU",
    phases={"training": PhasePeak(num_bytes=110, host_bytes=5, computed_bytes=100)},
    runtime_host_bytes=7,
    step_s=2.0,
    step_flops=50.0,
)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "measurements.jsonl"
    assert read_measurements(path) == ()
    append_measurement(path, RECORD)
    with path.open("a") as file:
        file.write('{"torn": \n["no"]\n{"version":99}\n')
    append_measurement(path, replace(RECORD, key="l"))
    assert read_measurements(path) == (RECORD, replace(RECORD, key="l"))


def _write(path, name):
    for _ in range(50):
        append_measurement(path, replace(RECORD, key=name))


@pytest.mark.slow
def test_writers_beside_each_other_tear_nothing(tmp_path):
    path = tmp_path / "measurements.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_measurements(path)) == 100


def test_equal_plans_have_one_key_and_near_ones_are_kin():
    other = replace(PLAN, train=replace(PLAN.train, width_px=768))
    assert plan_key(PLAN, "GPU") == plan_key(replace(PLAN), "GPU") != plan_key(other, "GPU")
    assert plan_key(PLAN, "GPU") != plan_key(PLAN, "another GPU")
    assert plan_kin(PLAN, "GPU") == plan_kin(other, "GPU") != plan_kin(replace(PLAN, checkpointing=False), "GPU")


def test_the_newest_of_equals_counts():
    records = (RECORD, replace(RECORD, step_s=3.0), replace(RECORD, key="other"))
    assert newest(records, "k").step_s == 3.0
    assert newest(records, "none") is None
    assert runtime_bytes(records, "GPU", "a") == 7
    assert runtime_bytes((replace(RECORD, kin=""),), "GPU", "b") == 7
    assert runtime_bytes(records, "GPU", "b") is None
    assert runtime_bytes(records, "CPU", "a") is None
    assert measured_rate((RECORD,), "GPU", "a") == 25.0
    assert measured_rate((RECORD,), "GPU", "b") is None
    assert measured_rate((RECORD,), "CPU", "a") is None


def test_a_correction_is_bounded():
    def record(measured):
        return replace(RECORD, phases={"training": PhasePeak(num_bytes=measured, computed_bytes=100)})

    assert correction([RECORD], "a", "training") == 1.1
    assert correction([RECORD], "b", "training") is None
    assert correction([record(105), record(900), record(107)], "a", "training") == 1.07
    assert correction([record(900)], "a", "training") == 1.3
