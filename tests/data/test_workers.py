"""Processes and threads that read files."""

from __future__ import annotations

import subprocess
import sys

import pytest

_MASKS = """
import signal
from simpletuner.data.workers import process_pool

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
