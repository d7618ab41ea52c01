"""What a run trains gets onto the model, into a folder and back; and what it counts for in images."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from simpletuner.adapters.assistant import activate_with_assistant_, attach_assistant
from simpletuner.adapters.files import LORA_FILE_NAME, LoraInfo, load_lora, save_lora
from simpletuner.adapters.lora import LoraSettings, adapter_state, apply_lora, trainable_parameters
from simpletuner.adapters.lycoris import lycoris_layers
from simpletuner.catalog.lycoris import LycorisSettings, Update
from simpletuner.models.z_image.transformer import ZImageTransformer, ZImageTransformerConfig
from simpletuner.optim.build import build_optimizer
from simpletuner.optim.release import ReleasedUpdates
from simpletuner.optim.settings import OptimizerSettings
from simpletuner.problems import SimpletunerError
from simpletuner.train.build import Training
from simpletuner.train.flow import FlowSettings
from simpletuner.train.step import MicroBatch, StepSettings, train_step
from simpletuner.train.trained import Trained, TrainedLora, TrainedLycoris, TrainedModel

SIZES = {"dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 12, "axes_dims": (8, 8, 8)}
LORA = LoraSettings(rank=2, alpha=2.0, targets=("to_q", "to_v"))
LOKR = LycorisSettings(update=Update(algo="lokr", dim=10000, factor=4, full_matrix=True), multiplier=0.5)


def lora(settings: LoraSettings) -> Trained:
    return TrainedLora(settings, lambda step: LoraInfo(rank=settings.rank, alpha=settings.alpha, global_step=step))


def lokr() -> TrainedLycoris:
    return TrainedLycoris(
        LOKR, config="{}", seed=1, first_norm=1e-2, sampling_multiplier=0.8, metadata=lambda step: {"step": str(step)}
    )


KINDS = {
    "lora": lambda: lora(LORA),
    "dora": lambda: lora(replace(LORA, dora=True)),
    "pissa": lambda: lora(replace(LORA, start="pissa")),
    "lokr": lokr,
    "full": TrainedModel,
}


def model() -> ZImageTransformer:
    torch.manual_seed(0)
    return ZImageTransformer(ZImageTransformerConfig(**SIZES)).requires_grad_(False)


@torch.no_grad()
def move_(transformer: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable_parameters(transformer):
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture
def assistant(tmp_path: Path) -> Path:
    other = model()
    apply_lora(other, LoraSettings(rank=2, alpha=2.0, targets=("to_q", "w1")))
    move_(other)
    path = tmp_path / "assistant.safetensors"
    save_lora(path, adapter_state(other), LoraInfo(rank=2, alpha=2.0))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back_bit_for_bit_beside_an_assistant(tmp_path, assistant, kind):
    first, second = model(), model()
    for transformer in (first, second):
        attach_assistant(transformer, load_lora(assistant), dtype=torch.float32)
        report = KINDS[kind]().attach(transformer, start=None)
        activate_with_assistant_(transformer, strength=1.0)
        assert report.num_params == sum(p.numel() for p in trainable_parameters(transformer))
        trained = {name for name, p in transformer.named_parameters() if p.requires_grad}
        assert trained and not any(".assistant." in name for name in trained)
    move_(first)
    path = KINDS[kind]().save(tmp_path, first, step=3)
    assert path.exists() and path.parent == tmp_path
    KINDS[kind]().load(tmp_path, second)
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_all_weights_are_saved_under_the_checkpoints_names_without_the_assistant(tmp_path, assistant):
    transformer = model()
    names = set(transformer.state_dict())
    attach_assistant(transformer, load_lora(assistant), dtype=torch.float32)
    report = TrainedModel().attach(transformer, start=None)
    assert report.num_params == transformer.num_params
    folder = TrainedModel().save(tmp_path, transformer, step=1)
    from safetensors.torch import load_file

    assert load_file(folder / "diffusion_pytorch_model.safetensors").keys() == names
    assert not (tmp_path / LORA_FILE_NAME).exists()


def test_images_take_the_strength_for_images_and_training_its_multiplier():
    transformer, trained = model(), lokr()
    report = trained.attach(transformer, start=None)
    training = Training(
        transformer=transformer,
        adapter=report,
        trained=trained,
        multiplier=trained.multiplier,
        sampling_multiplier=trained.sampling_multiplier,
        **dict.fromkeys(
            ("contexts", "sampling_contexts", "assistant", "params", "optimizer", "ema", "released", "compute")
        ),
    )

    def strengths() -> set[float]:
        return {layer.strengths["default"] for _, layer in lycoris_layers(transformer)}

    assert strengths() == {0.5}
    with training.sampling(1.0):
        assert strengths() == {0.8}
    with training.sampling(0.0):
        assert strengths() == {0.0}
    assert strengths() == {0.5}


@pytest.mark.parametrize("released", [False, True])
def test_a_loss_that_is_not_finite_moves_nothing(released):
    weight = nn.Parameter(torch.tensor([0.3]))
    optimizer = build_optimizer("adamw", [weight], OptimizerSettings(learning_rate=1e-2))
    batch = MicroBatch(index=0, latents=[torch.ones(4, 4, 4)], prompts=[""], is_regularisation=False, names=["a.png"])
    settings = StepSettings(
        seed=1, rank=0, flow=FlowSettings(), max_grad_norm=0.0, clip_by_value=False, latents_per_token=4,
        uses_dropout=False,
    )  # fmt: skip

    def step(factor: float) -> float:
        return train_step(
            [batch],
            num_batches=1,
            predict=lambda latents, sigma_B, prompts: [weight * factor * x for x in latents],
            parent=None,
            params=[weight],
            optimizer=optimizer,
            released=updates,
            learning_rate=1e-2,
            settings=settings,
        ).grad_norm

    updates = ReleasedUpdates([weight], optimizer) if released else None
    with pytest.raises(SimpletunerError) as error:
        step(math.nan)
    assert error.value.problems[0].code == "E-NAN-LOSS" and weight.item() == pytest.approx(0.3)
    weight.grad = None
    assert step(1.0) > 0 and weight.item() != pytest.approx(0.3, abs=1e-4)
