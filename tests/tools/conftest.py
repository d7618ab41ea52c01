from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from simpletuner.adapters.formats.weights import Adapter, LohaWeights, LokrWeights, LoraWeights, ModuleWeights
from simpletuner.models.z_image.layouts import to_comfy
from simpletuner.models.z_image.transformer import ZImageTransformer, ZImageTransformerConfig

TINY = {
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "cap_feat_dim": 12,
    "axes_dims": (8, 8, 8),
}
ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
KINDS = ("LoRA", "DoRA", "LoHa", "LoKr", "LoKr full", "fused LoKr")


def tiny_state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = ZImageTransformer(ZImageTransformerConfig(**TINY))
    return {name: tensor + torch.randn_like(tensor) * 0.1 for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="session")
def state() -> dict[str, Tensor]:
    return tiny_state()


@pytest.fixture
def predict() -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """The answer of a model with these weights to a fixed noisy image."""
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(16, 4, 6, generator=generator)]
    prompts = [torch.randn(3, TINY["cap_feat_dim"], generator=generator)]
    t_B = torch.tensor([0.3])

    def run(state: dict[str, Tensor]) -> list[Tensor]:
        model = ZImageTransformer(ZImageTransformerConfig(**TINY))
        model.load_state_dict(state)
        with torch.no_grad():
            return model(latents, t_B, model.refine_context(prompts))

    run.inputs = (latents, prompts, t_B)  # type: ignore[attr-defined]
    return run


def save_file(path: Path, state: dict[str, Tensor], *, comfy: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    tensors = to_comfy(state) if comfy else state
    safetensors.torch.save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)
    return path


def save_folder(folder: Path, state: dict[str, Tensor]) -> Path:
    """A pipeline's folder with a transformer in two shards."""
    where = folder / "transformer"
    where.mkdir(parents=True)
    config = {"_class_name": "ZImageTransformer2DModel", **TINY}
    (where / "config.json").write_text(json.dumps(config))
    names = sorted(state)
    stem = "diffusion_pytorch_model"
    halves = {f"{stem}-00001-of-00002.safetensors": names[::2], f"{stem}-00002-of-00002.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file(where / file, {name: state[name] for name in own})
    weight_map = {name: file for file, own in halves.items() for name in own}
    (where / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def adapter_of(kind: str, *, seed: int = 1, dim: int = TINY["dim"]) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator) * 0.3

    def one() -> ModuleWeights:
        if kind in ("LoRA", "DoRA"):
            magnitude = draw(dim).abs() + 0.5 if kind == "DoRA" else None
            return LoraWeights(down=draw(2, dim), up=draw(dim, 2), alpha=3.0, magnitude=magnitude)
        if kind == "LoHa":
            first, second = ((draw(dim, 2), draw(2, dim)) for _ in range(2))
            return LohaWeights(w1=first, w2=second, alpha=3.0)
        if kind == "LoKr":
            return LokrWeights(w1=(draw(4, 4),), w2=(draw(dim // 4, 2), draw(2, dim // 4)), alpha=3.0)
        return LokrWeights(w1=(draw(4, 4),), w2=(draw(dim // 4, dim // 4),), alpha=9.0)

    if kind == "fused LoKr":  # 4 rows of w1 are no three thirds
        fused = LokrWeights(w1=(draw(4, 4),), w2=(draw(3 * dim // 4, dim // 4),), alpha=None)
        return Adapter(modules={"layers.1.attention.qkv": fused}, metadata={})
    return Adapter(modules={f"layers.{block}.{name}": one() for block in range(2) for name in ATTENTION}, metadata={})
