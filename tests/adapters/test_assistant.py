"""The assistant adapter acts while training, not while sampling, is never trained and never saved."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from simpletuner.adapters.assistant import ASSISTANT_NAME, OPTION, activate_with_assistant_, attach_assistant
from simpletuner.adapters.files import LoraInfo, save_lora
from simpletuner.adapters.frozen import load_fitting
from simpletuner.adapters.lora import (
    LoraSettings,
    adapter_state,
    apply_lora,
    disabled,
    set_scale,
    trainable_parameters,
)
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.models.z_image.transformer import ZImageTransformer, ZImageTransformerConfig
from simpletuner.problems import ModelError

TARGETS = ("layers.*.attention.to_q", "layers.*.feed_forward.w1")


def model() -> ZImageTransformer:
    torch.manual_seed(0)
    config = ZImageTransformerConfig(
        dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=16, axes_dims=(4, 6, 6)
    )
    found = ZImageTransformer(config)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return found.eval()


def fitting(path):
    """The file, found to fit the model."""
    return load_fitting(model(), path, option=OPTION)


def predict(transformer) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    latent = torch.randn(16, 4, 4, generator=draws)
    prompt = torch.randn(5, 16, generator=draws)
    with torch.no_grad():
        return transformer([latent], torch.tensor([0.5]), transformer.refine_context([prompt]))[0]


@pytest.fixture
def assistant_file(tmp_path):
    """A LoRA of rank 3 with alpha 6 and random factors, as another program would have made it."""
    other = model()
    apply_lora(other, LoraSettings(rank=3, alpha=6.0, targets=TARGETS))
    state = {key: torch.randn_like(tensor) * 0.3 for key, tensor in adapter_state(other).items()}
    path = tmp_path / "assistant.safetensors"
    save_lora(path, state, LoraInfo(rank=3, alpha=6.0))
    return path


def test_training_sees_the_assistant_and_sampling_does_not(assistant_file):
    base = predict(model())
    trained = model()
    attach_assistant(trained, fitting(assistant_file), dtype=torch.float32)
    with_assistant = predict(trained)
    apply_lora(trained, LoraSettings(rank=4, alpha=4.0, targets=TARGETS))
    activate_with_assistant_(trained, strength=1.0)
    assert not torch.allclose(with_assistant, base, atol=1e-3)
    assert torch.allclose(predict(trained), with_assistant, atol=1e-5)
    set_scale(trained, 0.0, ASSISTANT_NAME)
    set_scale(trained, 0.0)
    assert torch.equal(predict(trained), base)


def test_only_the_other_adapter_is_trained_and_saved(assistant_file):
    trained = model()
    attach_assistant(trained, fitting(assistant_file), dtype=torch.float32)
    before = {key: tensor.clone() for key, tensor in adapter_state(trained, ASSISTANT_NAME).items()}
    apply_lora(trained, LoraSettings(rank=4, alpha=4.0, targets=TARGETS))
    activate_with_assistant_(trained, strength=1.0)
    assert {p.shape[0] if p.shape[0] == 4 else p.shape[1] for p in trainable_parameters(trained)} == {4}
    latent, prompt = torch.randn(16, 4, 4), torch.randn(5, 16)
    with torch.no_grad():
        context = trained.refine_context([prompt])
    trained([latent], torch.tensor([0.5]), context)[0].square().sum().backward()
    torch.optim.SGD(trainable_parameters(trained), lr=0.1).step()
    after = adapter_state(trained, ASSISTANT_NAME)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(tensor.shape[0 if "lora_A" in key else 1] == 4 for key, tensor in adapter_state(trained).items())


def test_the_parent_of_regularisation_keeps_the_assistant(assistant_file):
    trained = model()
    attach_assistant(trained, fitting(assistant_file), dtype=torch.float32)
    with_assistant = predict(trained)
    apply_lora(trained, LoraSettings(rank=4, alpha=4.0, targets=TARGETS))
    activate_with_assistant_(trained, strength=1.0)
    for parameter in trainable_parameters(trained):
        torch.nn.init.normal_(parameter, std=0.3)
    assert not torch.allclose(predict(trained), with_assistant, atol=1e-3)
    with disabled(trained):
        assert torch.allclose(predict(trained), with_assistant, atol=1e-5)


def test_an_assistant_of_another_model_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_lora(
        path,
        {"blocks.9.mixer.lora_A.weight": torch.zeros(2, 8), "blocks.9.mixer.lora_B.weight": torch.zeros(8, 2)},
        LoraInfo(rank=2, alpha=2.0),
    )
    for language in LANGUAGES:
        with pytest.raises(ModelError) as caught:
            fitting(path)
        (problem,) = caught.value.problems
        assert problem.code == "E-LORA-OTHER-MODEL"
        title, hint = render_problem(problem, language)
        assert "blocks.9.mixer" in title and str(path) in title and hint


def test_an_assistant_of_another_size_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    name = "layers.0.attention.to_q"
    save_lora(
        path,
        {f"{name}.lora_A.weight": torch.zeros(2, 64), f"{name}.lora_B.weight": torch.zeros(32, 2)},
        LoraInfo(rank=2, alpha=2.0),
    )
    for language in LANGUAGES:
        with pytest.raises(ModelError) as caught:
            fitting(path)
        assert caught.value.problems[0].code == "E-ADAPTER-SIZES"
        assert f"{name}: 32x64 / 32x32" in render_problem(caught.value.problems[0], language)[0]


def test_modules_of_different_rank_and_alpha_keep_their_own_strength(tmp_path):
    draws = torch.Generator().manual_seed(4)
    contents, merged, trained = {}, model(), model()
    for name, rank, alpha in (("layers.0.attention.to_q", 2, 1.0), ("layers.1.feed_forward.w1", 3, 6.0)):
        weight = merged.get_submodule(name).weight
        down, up = torch.randn(rank, weight.shape[1], generator=draws), torch.randn(len(weight), rank, generator=draws)
        weight.data += alpha / rank * 0.1 * up @ down
        stem = f"diffusion_model.{name}"
        contents |= {
            f"{stem}.lora_A.weight": down,
            f"{stem}.lora_B.weight": 0.1 * up,
            f"{stem}.alpha": torch.tensor(alpha),
        }
    save_file(contents, tmp_path / "assistant.safetensors")
    attach_assistant(trained, fitting(tmp_path / "assistant.safetensors"), dtype=torch.float32)
    assert torch.allclose(predict(trained), predict(merged), atol=1e-4)
    assert not torch.allclose(predict(trained), predict(model()), atol=1e-2)
