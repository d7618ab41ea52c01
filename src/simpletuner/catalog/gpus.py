"""GPUs by name, with what their makers' data sheets say of bfloat16 products. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """`name`: words of the device name. `bf16_tflops`: dense, sums in float32, in 10^12 operations per second."""

    name: str
    bf16_tflops: float


GPUS = (
    Gpu(name="GB200", bf16_tflops=2250),
    Gpu(name="B200", bf16_tflops=2250),
    Gpu(name="H200", bf16_tflops=989),
    Gpu(name="H100 PCIe", bf16_tflops=756),
    Gpu(name="H100 NVL", bf16_tflops=835),
    Gpu(name="H100", bf16_tflops=989),
    Gpu(name="A100", bf16_tflops=312),
    Gpu(name="L40S", bf16_tflops=362),
    Gpu(name="L40", bf16_tflops=181),
    Gpu(name="L4", bf16_tflops=121),
    Gpu(name="A40", bf16_tflops=150),
    Gpu(name="A30", bf16_tflops=165),
    Gpu(name="A10", bf16_tflops=125),
    Gpu(name="RTX 6000 Ada", bf16_tflops=364),
    Gpu(name="RTX A6000", bf16_tflops=155),
    Gpu(name="RTX A5000", bf16_tflops=111),
    Gpu(name="RTX 5090", bf16_tflops=209),
    Gpu(name="RTX 5080", bf16_tflops=113),
    Gpu(name="RTX 5070 Ti", bf16_tflops=88),
    Gpu(name="RTX 5070", bf16_tflops=62),
    Gpu(name="RTX 5060 Ti", bf16_tflops=47),
    Gpu(name="RTX 4090", bf16_tflops=165),
    Gpu(name="RTX 4080", bf16_tflops=98),
    Gpu(name="RTX 4070 Ti", bf16_tflops=80),
    Gpu(name="RTX 4070", bf16_tflops=58),
    Gpu(name="RTX 4060 Ti", bf16_tflops=44),
    Gpu(name="RTX 4060", bf16_tflops=30),
    Gpu(name="RTX 3090 Ti", bf16_tflops=80),
    Gpu(name="RTX 3090", bf16_tflops=71),
    Gpu(name="RTX 3080 Ti", bf16_tflops=68),
    Gpu(name="RTX 3080", bf16_tflops=60),
    Gpu(name="RTX 3070", bf16_tflops=41),
    Gpu(name="RTX 3060 Ti", bf16_tflops=32),
    Gpu(name="RTX 3060", bf16_tflops=25),
)
"""A name that contains another stands before it."""


def gpu_named(device_name: str) -> Gpu | None:
    """The GPU whose words are all in the driver's name for the device, or None."""
    words = set(device_name.lower().replace("-", " ").split())
    return next((gpu for gpu in GPUS if set(gpu.name.lower().split()) <= words), None)
