from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from simpletuner.models.z_image.transformer import ZImageTransformer, ZImageTransformerConfig

TINY = {
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "cap_feat_dim": 12,
    "axes_dims": (8, 8, 8),
}
MAIN_BLOCKS = ("layers.*.attention.*", "layers.*.feed_forward.*")


def tiny_transformer() -> ZImageTransformer:
    torch.manual_seed(0)
    model = ZImageTransformer(ZImageTransformerConfig(**TINY))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(False)


@pytest.fixture
def transformer() -> ZImageTransformer:
    return tiny_transformer()


@pytest.fixture
def predict() -> Callable[[nn.Module], list[Tensor]]:
    """The model's answer to two fixed noisy images of different sizes."""
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(16, *size, generator=generator) for size in ((4, 6), (8, 4))]
    prompts = [torch.randn(count, TINY["cap_feat_dim"], generator=generator) for count in (3, 40)]
    t_B = torch.tensor([0.3, 0.8])

    def run(model: nn.Module) -> list[Tensor]:
        return model(latents, t_B, model.refine_context(prompts))

    run.inputs = (latents, prompts, t_B)  # type: ignore[attr-defined]
    return run


def randomise_(model: nn.Module, seed: int = 2) -> None:
    """Give trained parameters values of the size that a trained adapter has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
