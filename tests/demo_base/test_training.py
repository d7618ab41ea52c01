"""Laws of the parts that train the demo base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scripts.demo_base import optim, text_encoder, train_transformer, train_vae


def test_orthogonalised_moves_singular_values_towards_one():
    torch.manual_seed(0)
    for rows, columns in ((8, 24), (24, 8)):
        result = optim.orthogonalised(torch.randn(3, rows, columns))
        values = torch.linalg.svdvals(result)
        assert result.shape == (3, rows, columns)
        assert values.min() > 0.3
        assert values.max() < 1.5


def test_muon_and_adamw_solve_a_small_problem_and_resume_exactly():
    def setup() -> tuple[nn.Sequential, optim.MuonAdamW]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6))
        matrices = [p for p in model.parameters() if p.ndim == 2]
        return model, optim.MuonAdamW(matrices, [p for p in model.parameters() if p.ndim == 1])

    def steps(model: nn.Sequential, optimizer: optim.MuonAdamW, first: int, last: int) -> float:
        loss = torch.zeros(())
        for index in range(first, last):
            x = torch.randn(32, 6, generator=torch.Generator().manual_seed(index))
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step(muon_lr=0.03, adamw_lr=0.01)
        return float(loss.detach())

    straight, optimizer = setup()
    final = steps(straight, optimizer, 0, 60)
    assert final < 0.2
    stopped, optimizer = setup()
    steps(stopped, optimizer, 0, 30)
    resumed, resumed_optimizer = setup()
    resumed.load_state_dict(stopped.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    assert steps(resumed, resumed_optimizer, 30, 60) == final


def test_schedule_rises_stays_and_falls_to_zero():
    assert optim.warmup_cosine(0.0) == 0.0
    assert optim.warmup_cosine(0.2) == 1.0
    assert optim.warmup_cosine(1.0) == pytest.approx(0.0, abs=1e-12)
    assert 0 < optim.warmup_cosine(0.8) < optim.warmup_cosine(0.5) < 1


def test_average_swaps_there_and_back():
    layer = nn.Linear(2, 2)
    average = optim.Average(layer, decay=0.9)
    kept = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    average.swap(layer)
    assert torch.equal(layer.weight, kept)
    average.swap(layer)
    assert torch.equal(layer.weight, kept + 1)


@torch.no_grad()
def test_rescaling_latents_changes_them_and_not_the_picture():
    torch.manual_seed(0)
    vae = train_vae.build_vae()
    picture, gain = torch.rand(1, 3, 32, 32) * 2 - 1, torch.linspace(0.5, 2, 16)
    before = vae.encode(picture).latent_dist
    restored = vae.decode(before.mode()).sample
    train_vae._rescale_latents(vae, gain)
    after = vae.encode(picture).latent_dist
    torch.testing.assert_close(after.mode(), before.mode() * gain.view(1, -1, 1, 1))
    torch.testing.assert_close(after.std, before.std * gain.view(1, -1, 1, 1))
    torch.testing.assert_close(vae.decode(after.mode()).sample, restored)


def test_an_untrained_transformer_predicts_nothing():
    torch.manual_seed(0)
    latents = torch.randn(2, 16, 4, 4)
    group = train_transformer.LatentScenes(latents_NChw=latents, caption_of_N=torch.tensor([1, 1]))
    prompts = [torch.randn(8, text_encoder.HIDDEN), torch.randn(12, text_encoder.HIDDEN)]
    transformer = train_transformer.build_transformer()
    loss = train_transformer.flow_loss(
        transformer, prompts, group, torch.tensor([0, 1]), torch.tensor([0.2, 0.9]), device="cpu"
    )
    assert 1.0 < float(loss.detach()) < 3.5  # clean - noise has variance 2
    loss.backward()
    assert transformer.all_final_layer["2-1"].linear.weight.grad.abs().sum() > 0


def test_noise_levels_are_spread_over_the_whole_range():
    sigma_B = train_transformer._spread_sigmas(64)
    assert 0 <= sigma_B.min() < 0.1
    assert 0.9 < sigma_B.max() <= 1
    assert (sigma_B.diff() > 0).all()


def test_every_word_of_the_scenes_is_one_token_and_any_text_survives():
    tokenizer = text_encoder.build_tokenizer()
    for prompt, num_tokens in (("a red circle on a blue background", 7), ("an orange heart and a small pink star", 8)):
        assert len(tokenizer(prompt)["input_ids"]) == num_tokens
    odd = "Größe 12 sks!\n☃"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
