"""Ctrl-C, against real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from simpletuner.events import control
from simpletuner.events.run_status import read_run
from simpletuner.events.signals import KILL, LEAVE, SAVE, StopRequest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
SAVING = "Finishing this step and saving."
LEAVING = "Leaving without saving."


def press(process: subprocess.Popen[str], until: str) -> str:
    """Ctrl-C, then read until the process has said `until`: two signals too close together are one."""
    process.send_signal(signal.SIGINT)
    return read_until(process, until)


def read_until(process: subprocess.Popen[str], until: str) -> str:
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if until in line:
            return said
    raise AssertionError(f"{until!r} not in {said}")


def test_the_first_saves_and_says_so_once(children, tmp_path):
    process = children.start(tmp_path, "step=0.3")
    said = press(process, SAVING)
    out, rest = process.communicate(timeout=20)
    assert process.returncode == 75
    assert (said + rest).count(SAVING) == 1
    assert "checkpoint" in said + rest
    assert out == ""  # stdout is for results
    assert read_run(tmp_path).state == "stopped"
    assert read_run(tmp_path).snapshot.ending.exit_code == 75


def test_the_second_leaves_without_saving(children, tmp_path):
    process = children.start(tmp_path, "step=0.5")
    press(process, SAVING)
    press(process, LEAVING)
    _, rest = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "without saving" in rest
    assert "checkpoint-" not in rest


def test_the_third_ends_a_process_that_hears_nothing(children, tmp_path):
    process = children.start(tmp_path, "mode=busy", wait=False)
    read_until(process, "output")
    press(process, SAVING)
    press(process, LEAVING)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    status = read_run(tmp_path)
    assert (status.state, status.snapshot.ending.reason) == ("stopped", "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_polite_signal_saves_however_often_it_comes(children, tmp_path, number):
    process = children.start(tmp_path, "step=0.3")
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.02)
    process.communicate(timeout=20)
    assert process.returncode == 75


def test_loading_is_interrupted_at_once(children, tmp_path):
    process = children.start(tmp_path, "mode=load")
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - started < 10
    assert read_run(tmp_path).snapshot.ending.reason == "interrupted"


def test_a_stop_command_interrupts_loading_too(children, tmp_path):
    process = children.start(tmp_path, "mode=load")
    command_id = control.send(tmp_path, "stop")
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert control.read_answer(tmp_path, command_id).message == "stopped"


def test_a_worker_of_the_same_group_does_not_count_the_key_again(children, tmp_path):
    process = children.start(tmp_path, "mode=fork", "step=0.2")
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    said = read_until(process, "Stopped at step")
    os.killpg(process.pid, signal.SIGKILL)  # the worker
    assert said.count(SAVING) == 1
    assert LEAVING not in said


def test_requests_only_rise():
    stop = StopRequest()
    seen: list[tuple[int, str]] = []
    stop.subscribe(lambda level, source: seen.append((level, source)))
    stop.check()
    stop.request(SAVE)
    stop.request(SAVE)
    stop.check()
    stop.request(LEAVE, "keyboard")
    stop.request(SAVE)
    assert stop.level == LEAVE < KILL
    assert seen == [(SAVE, "command"), (LEAVE, "keyboard")]
    with pytest.raises(KeyboardInterrupt):
        stop.check()


def test_a_phase_with_nothing_to_save_does_not_begin_after_a_stop():
    stop = StopRequest()
    stop.request(SAVE)
    with pytest.raises(KeyboardInterrupt), stop.interruptible():
        pytest.fail("began")


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest().installed():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    wakeup = signal.set_wakeup_fd(-1)
    assert wakeup == -1


def test_a_request_made_in_an_interruptible_phase_leaves():
    stop = StopRequest()
    with stop.interruptible():
        stop.request(SAVE)
    assert stop.level == LEAVE
