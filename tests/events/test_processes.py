"""A process is recognised by number and start time together."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from simpletuner.events.processes import _start_ps, is_alive, process_start


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_this_process_is_alive():
    start = process_start(os.getpid())
    assert start is not None
    assert start == process_start(os.getpid())
    assert is_alive(os.getpid(), start) is True


def test_a_reused_number_is_another_process():
    assert is_alive(os.getpid(), "some other start") is False


def test_without_a_start_time_nothing_is_certain():
    assert is_alive(os.getpid(), None) is None


def test_an_ended_process_is_not_alive_not_even_as_a_zombie():
    process = sleeper()
    start = process_start(process.pid)
    assert is_alive(process.pid, start) is True
    process.kill()
    end = time.monotonic() + 10
    while is_alive(process.pid, start):  # nobody has waited for it: a zombie
        assert time.monotonic() < end
    process.wait()
    assert is_alive(process.pid, start) is False
    assert process_start(process.pid) is None


def test_no_process_has_such_a_number():
    assert process_start(0) is None
    assert process_start(-1) is None


@pytest.mark.skipif(sys.platform == "win32", reason="there is no ps")
def test_ps_tells_the_same_where_there_is_no_proc():
    process = sleeper()
    first = _start_ps(process.pid)
    if first is None:
        pytest.skip("ps is not installed")
    assert first == _start_ps(process.pid) != ""
    process.kill()
    process.wait()
    assert _start_ps(process.pid) is None
