"""The benchmarks that need hardware still run where it is absent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_accelerators_benchmark_runs_on_the_demo_base():
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--steps", "1", "--warm-up", "0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    rows = run.stdout.splitlines()[1:]
    assert len(rows) == 11, run.stdout
    assert all(" s" in row and "Error" not in row for row in rows), run.stdout
