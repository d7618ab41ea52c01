from __future__ import annotations

import sys
from pathlib import Path

import pytest

from simpletuner.catalog.gpus import GPUS, gpu_named
from simpletuner.hardware.process_memory import peak_bytes, reset_peak, resident_bytes, return_free_memory
from simpletuner.hardware.space import free_disk, gpu_memory, main_memory


def test_main_memory_and_disk(tmp_path):
    space = main_memory()
    assert space is not None
    assert space.free_bytes is None or 0 < space.free_bytes <= space.total_bytes
    assert free_disk(tmp_path / "not" / "there") > 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux")
def test_the_peak_of_a_phase():
    before = resident_bytes()
    held = bytearray(b"x" * 80_000_000)
    assert peak_bytes() >= before + 70_000_000
    del held
    return_free_memory()
    if reset_peak():
        assert peak_bytes() < before + 40_000_000


def test_a_gpu_is_known_by_its_words():
    assert gpu_named("NVIDIA GeForce RTX 4090").name == "RTX 4090"
    assert gpu_named("NVIDIA GeForce RTX 3080 Ti").name == "RTX 3080 Ti"
    assert gpu_named("NVIDIA H100 80GB HBM3").name == "H100"
    assert gpu_named("NVIDIA H100 PCIe").name == "H100 PCIe"
    assert gpu_named("NVIDIA L40S").name == "L40S"
    assert gpu_named("NVIDIA A100-SXM4-80GB").name == "A100"
    assert gpu_named("CPU") is None
    for index, gpu in enumerate(GPUS):
        assert gpu_named(gpu.name) == gpu, f"{gpu.name} is hidden by an earlier one of {index}"


def test_without_a_driver_there_is_no_gpu():
    if sys.platform == "linux" and not Path("/dev/nvidiactl").exists():
        assert gpu_memory() is None
