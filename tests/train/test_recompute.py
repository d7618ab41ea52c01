"""The options of recomputation, put on a model."""

from __future__ import annotations

import pytest
import torch

from simpletuner.config.sections.memory import MemorySection
from simpletuner.events.types import SettingOverridden
from simpletuner.i18n import LANGUAGES, catalog
from simpletuner.models.z_image.transformer import ZImageTransformer, ZImageTransformerConfig
from simpletuner.train.recompute import apply_recomputation

NUM_BLOCKS = 4


def counted(**options: object) -> tuple[list[int], list[SettingOverridden], torch.Tensor]:
    """(runs of each block in a step, notices, the gradient of the first block) of a small model."""
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": NUM_BLOCKS, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 16}
    model = ZImageTransformer(ZImageTransformerConfig(**sizes, axes_dims=(4, 6, 6)))
    model.requires_grad_(False)
    for block in model.layers:
        block.feed_forward.w1.requires_grad_(True)
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    events: list[SettingOverridden] = []
    apply_recomputation(
        model,
        MemorySection(**options),
        device=torch.device("cpu"),
        params=params,
        optimizer=torch.optim.SGD(params),
        uses_dropout=False,
        emit=events.append,
    )
    runs = [0] * NUM_BLOCKS
    for index, block in enumerate(model.layers):
        block.attention.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(16, 8, 8, generator=generator), torch.randn(32, 32, generator=generator)
    for _ in range(2):  # a first step measures the first block
        runs[:] = [0] * NUM_BLOCKS
        model.zero_grad()
        model([latents], torch.tensor([0.4]), [context])[0].square().mean().backward()
    return runs, events, params[0].grad


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        ({"gradient_checkpointing": False}, [1, 1, 1, 1]),
        ({}, [2, 2, 2, 1]),
        ({"gradient_checkpointing_interval": 2}, [2, 1, 2, 1]),
        ({"gradient_checkpointing_interval": 0, "gradient_checkpointing_budget": 1e-9}, [2, 2, 2, 1]),
        ({"gradient_checkpointing_interval": 0, "gradient_checkpointing_budget": 4.5e-4}, [2, 2, 1, 1]),
        ({"gradient_checkpointing_interval": 0, "gradient_checkpointing_budget": 1}, [1, 1, 1, 1]),
    ],
)
def test_options_choose_the_blocks_and_not_the_result(options, runs):
    found, events, gradient = counted(**options)
    assert found == runs
    assert not events
    assert torch.equal(gradient, counted(gradient_checkpointing=False)[2])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"gradient_checkpointing_interval": 0}, ("gradient_checkpointing_interval", "auto", "1")),
        ({"gradient_checkpointing_offload": True}, ("gradient_checkpointing_offload", "true", "false")),
    ],
)
def test_what_a_cpu_cannot_do_is_told(options, told):
    runs, (event,), _ = counted(**options)
    assert runs == [2, 2, 2, 1]
    assert (event.option, event.requested, event.used) == told
    assert all(event.reason in catalog(language) for language in LANGUAGES)
