"""Processes and threads that read files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from simpletuner.data.workers import ThreadPool, in_order, process_pool, until_done
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import ExitCode, SimpletunerError

_MASKS = """
import signal
from simpletuner.data.workers import ThreadPool, in_order, process_pool, until_done
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import ExitCode, SimpletunerError

def held():
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])

with process_pool(2) as pool:
    args = (signal.pthread_sigmask, signal.SIG_BLOCK, [])
    print(held(), [signal.SIGINT in pool.submit(*args).result() for _ in range(2)])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows holds no signals back")
def test_a_process_that_is_still_starting_leaves_ctrl_c_alone():
    # In a fresh interpreter, whose first process this is.
    done = subprocess.run([sys.executable, "-c", _MASKS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False [True, True]"


_LEAVING = """
import threading, time
from simpletuner.data.workers import ThreadPool, in_order, process_pool, until_done
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import ExitCode, SimpletunerError

pool = ThreadPool(2)
try:
    with until_done(pool):
        for task, result in in_order(lambda s: time.sleep(s) or s, [0.0, 600.0, 600.0, 600.0], pool, num_ahead=3):
            raise KeyboardInterrupt
except KeyboardInterrupt:
    print("left")
"""


def test_an_interrupted_program_does_not_wait_for_servers():
    done = subprocess.run([sys.executable, "-c", _LEAVING], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "left"
    assert not done.stderr


def test_threads_do_their_tasks_in_any_number_and_end_with_the_pool():
    before = threading.active_count()
    pool = ThreadPool(3)
    with until_done(pool):
        assert list(in_order(str, range(50), pool, num_ahead=7)) == [(number, str(number)) for number in range(50)]
        broken = pool.submit(int, "x")
        with pytest.raises(ValueError, match="invalid literal"):
            broken.result()
    assert threading.active_count() == before


def test_a_pool_that_is_shut_down_drops_what_is_not_begun():
    pool, gate = ThreadPool(1), threading.Event()
    pool.submit(gate.wait)
    waiting = [pool.submit(str) for _ in range(3)]
    with pytest.raises(RuntimeError), until_done(pool):
        raise RuntimeError
    gate.set()
    assert all(future.cancelled() for future in waiting)


def test_a_process_that_the_system_ended_is_told_as_such():
    pool = process_pool(1)
    with pytest.raises(SimpletunerError) as caught, until_done(pool):
        list(in_order(os._exit, [9], pool, num_ahead=2))
    assert caught.value.exit_code is ExitCode.ENVIRONMENT
    (problem,) = caught.value.problems
    for language in LANGUAGES:
        assert "max_workers" in str(render_problem(problem, language))
