"""Our packed transformer against diffusers' implementation with the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import Tensor

from simpletuner.models.z_image.transformer import ZImageTransformer, ZImageTransformerConfig, velocity

SIZES = {
    "dim": 96,
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": 3,
    "cap_feat_dim": 40,
    "axes_dims": [8, 12, 12],
}
TOLERANCE = 1e-5  # relative, float32

# latent (h, w) and caption tokens of each sample
BATCHES = {
    "one square": [((8, 8), 31)],
    "one, caption of one token": [((8, 12), 1)],
    "one, caption of 512 tokens": [((6, 4), 512)],
    "three alike": [((8, 8), 32)] * 3,
    "three aspects, three captions": [((8, 12), 33), ((16, 4), 1), ((10, 10), 64)],
    "equal lengths at different positions": [((8, 16), 32), ((16, 8), 20), ((16, 8), 31)],
    "equal lengths, other captions": [((8, 16), 40), ((8, 16), 70), ((4, 2), 512)],
}


@pytest.fixture(scope="module")
def pair() -> tuple[ZImageTransformer, ZImageTransformer2DModel]:
    torch.manual_seed(0)
    reference = ZImageTransformer2DModel(n_kv_heads=SIZES["n_heads"], axes_lens=[1024, 64, 64], **SIZES)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif "pad_token" in name:
                parameter.normal_()
            elif parameter.ndim == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    ours = ZImageTransformer(ZImageTransformerConfig.from_dict(dict(reference.config)))
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


def inputs(batch: str) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(16, *size, generator=generator) for size, _ in BATCHES[batch]]
    captions = [torch.randn(length, SIZES["cap_feat_dim"], generator=generator) for _, length in BATCHES[batch]]
    return latents, torch.rand(len(latents), generator=generator), captions


def assert_close(ours: Tensor, reference: Tensor) -> None:
    error = (ours - reference).norm() / reference.norm()
    assert error < TOLERANCE, f"relative error {error:.1e}"


@pytest.mark.parametrize("batch", BATCHES)
def test_output_and_gradients_equal_the_reference(pair, batch):
    ours, reference = pair
    latents, t, captions = inputs(batch)
    results = []
    for model in (ours, reference):
        model.zero_grad()
        captions_leaf = [caption.clone().requires_grad_() for caption in captions]
        if model is ours:
            out = model(latents, t, model.refine_context(captions_leaf))
        else:
            out = [o[:, 0] for o in model([x[:, None] for x in latents], t, captions_leaf, return_dict=False)[0]]
        weights = [torch.linspace(-1, 1, o.numel()).view_as(o) for o in out]
        sum((o * w).sum() + o.square().sum() for o, w in zip(out, weights, strict=True)).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((out, gradients, [c.grad for c in captions_leaf]))
    (out, gradients, caption_gradients), (out_ref, gradients_ref, caption_gradients_ref) = results
    for a, b in zip(out + caption_gradients, out_ref + caption_gradients_ref, strict=True):
        assert_close(a, b)
    unused_padding = {name for name, g in gradients_ref.items() if not g.any()} - gradients.keys()
    assert gradients.keys() | unused_padding == gradients_ref.keys()
    assert all("pad_token" in name for name in unused_padding)
    for name, gradient in gradients.items():
        if gradients_ref[name].any():
            assert_close(gradient, gradients_ref[name])


def test_frozen_prefix_builds_no_graph_and_changes_no_gradient(pair):
    ours, _ = pair
    latents, t, captions = inputs("three aspects, three captions")

    def main_gradients() -> list[Tensor]:
        ours.zero_grad()
        sum(o.square().sum() for o in ours(latents, t, ours.refine_context(captions))).backward()
        return [p.grad.clone() for p in ours.layers.parameters()]

    everything = main_gradients()
    ours.requires_grad_(False)
    ours.layers.requires_grad_(True)
    try:
        assert not any(context.requires_grad for context in ours.refine_context(captions))
        prefix_frozen = main_gradients()
    finally:
        ours.requires_grad_(True)
    for a, b in zip(everything, prefix_frozen, strict=True):
        assert torch.equal(a, b)


def test_a_sample_is_the_same_alone_and_in_a_batch(pair):
    ours, _ = pair
    latents, t, captions = inputs("three aspects, three captions")
    with torch.no_grad():
        together = ours(latents, t, ours.refine_context(captions))
        for index, one in enumerate(together):
            alone = ours(latents[index : index + 1], t[index : index + 1], ours.refine_context([captions[index]]))[0]
            assert_close(alone, one)


def test_velocity_is_the_negated_output_at_one_minus_sigma(pair):
    ours, _ = pair
    latents, sigma, captions = inputs("one square")
    with torch.no_grad():
        context = ours.refine_context(captions)
        assert torch.equal(velocity(ours, latents, sigma, context)[0], -ours(latents, 1 - sigma, context)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qk_norm": False}, "qk_norm = False"),
        ({"all_patch_size": [2, 4]}, "all_patch_size"),
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim = 1152"),
        ({"axes_dims": [8, 8, 8]}, "sum of axes_dims"),
    ],
)
def test_checkpoints_of_another_kind_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ZImageTransformerConfig.from_dict({**SIZES, "n_kv_heads": 3, **change})
