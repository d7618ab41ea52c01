"""A step of a model that streams, in a process that may take only so much memory. Arguments: folder of the model,
where to spill ("" for main memory), MiB that it may take beyond what an idle Python with torch has.

Prints the loss, the bytes of the streamed weights, and by how many bytes the resident set grew at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from simpletuner.adapters.lora import LoraSettings, apply_lora, trainable_parameters
from simpletuner.config.sections.memory import MemorySection
from simpletuner.memory.checkpointing import apply_checkpointing
from simpletuner.models.files import WeightFiles
from simpletuner.models.z_image.load import load_transformer
from simpletuner.models.z_image.transformer import velocity
from simpletuner.train.device import Compute
from simpletuner.train.offload import stream_conversion, transformer_stream


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def warm_up() -> None:
    """What the first backward brings into memory whatever the model is."""
    weight = torch.randn(8, 8, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(
        *(torch.randn(1, 2, 8, 8) @ weight for _ in "qkv")
    ).sum().backward()


def main(folder: Path, spill: str, allowed_mib: int) -> None:
    compute = Compute(device=torch.device("cpu"), weights=torch.float32, autocast=None)
    files = WeightFiles(part="transformer", config_path=folder / "config.json", shards=(folder / "w.safetensors",))
    options = MemorySection(enable_group_offload=True, group_offload_to_disk_path=spill or None)
    warm_up()
    resident_bytes = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    limit = memory("VmData") + (allowed_mib << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    stream = transformer_stream(options, files, compute)
    assert stream is not None
    builder = stream.builder()
    conversion = stream_conversion(stream, builder, quantise_on_device=True)
    model = load_transformer(files, dtype=torch.float32, conversion=conversion)
    builder.attach(model)
    apply_lora(model, LoraSettings(rank=4, alpha=4.0, targets=("layers.*.attention.*",)))
    apply_checkpointing(model.layers, every=1)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(16, 8, 8, generator=generator)
    context = model.refine_context([torch.randn(8, model.config.cap_feat_dim, generator=generator)])
    (out,) = velocity(model, [latents], torch.tensor([0.5]), context)
    loss = out.square().mean()
    torch.autograd.grad(loss, trainable_parameters(model))
    print(loss.item(), sum(stream.plan.group_bytes), memory("VmHWM") - resident_bytes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
