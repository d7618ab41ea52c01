"""Laws of the held-out loss: the same noise every time, the mean of what it is said to be, nothing touched."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from simpletuner.config.sections.validation import ValidationSection
from simpletuner.data.held_out import HeldOutSet
from simpletuner.data.masks import MaskStore
from simpletuner.data.records import Geometry, ImageRecord, Sample
from simpletuner.data.storage import FileInfo
from simpletuner.events.types import EvaluationFinished, RunPhase
from simpletuner.optim.ema import EmaSettings, WeightAverage
from simpletuner.train.evaluate import Evaluator, HeldOutData, evaluation_interval, even_levels, held_out_loss
from simpletuner.train.seeds import generator


def sample(key: str) -> Sample:
    record = ImageRecord(file=FileInfo(key=key, size_bytes=1, version="1"), size=(32, 32))
    geometry = Geometry(target=(32, 32), intermediary=(32, 32), crop=(0, 0))
    return Sample(dataset_id="held-out", record=record, geometry=geometry, captions=(f"a {key}",))


class Latents:
    def get(self, sample: Sample) -> Tensor:
        return torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(len(sample.record.key)))


class HalfMasks(MaskStore):
    def __init__(self) -> None:
        super().__init__({}, px_per_latent=8)

    def weights(self, sample: Sample) -> Tensor | None:
        return torch.cat([torch.full((1, 4, 2), 2.0), torch.zeros(1, 4, 2)], dim=-1)


NO_MASKS = MaskStore({}, px_per_latent=8)
CHOSEN = HeldOutSet(name="held-out", samples=(sample("a"), sample("bb")))
LEVELS = even_levels(5)


def measure(predict, *, masks=NO_MASKS, chosen=CHOSEN, seed=42, levels=LEVELS):
    return held_out_loss(
        chosen,
        levels,
        latents=Latents(),
        masks=masks,
        predict=predict,
        seed=seed,
        device=torch.device("cpu"),
        on_forward=lambda: None,
    )


def nothing(latents, sigma_B, prompts):
    return [torch.zeros_like(x) for x in latents]


def test_levels_are_even():
    assert even_levels(4) == (0.125, 0.375, 0.625, 0.875)
    assert len(even_levels(28)) == 28


def test_the_loss_is_the_mean_squared_error_at_every_level():
    """Of a model that predicts 0: the mean square of noise - clean, whose noise is written out here."""
    found = measure(nothing)
    by_level = []
    for number in range(len(LEVELS)):
        errors = []
        for one in CHOSEN.samples:
            noise = torch.randn(4, 4, 4, generator=generator(42, "held out", one.record.key, number))
            errors.append((noise - Latents().get(one)).square().mean().item())
        by_level.append(sum(errors) / len(errors))
    assert found.by_sigma == pytest.approx(by_level)
    assert found.loss == pytest.approx(sum(by_level) / len(by_level))
    assert (found.dataset, found.num_images) == ("held-out", 2)


def test_the_true_velocity_has_no_loss_and_the_model_is_shown_noised_pictures():
    seen = []

    def true(latents, sigma_B, prompts):
        (x,), (sigma,), (prompt,) = latents, sigma_B.tolist(), prompts
        clean = Latents().get(sample(prompt.removeprefix("a ")))
        seen.append((prompt, sigma))
        return [(x - clean) / sigma]

    assert measure(true).loss < 1e-10
    assert seen == [(f"a {key}", pytest.approx(level)) for key in ("a", "bb") for level in LEVELS]


def test_two_measurements_of_one_model_are_equal_to_the_last_bit():
    torch.manual_seed(1)
    first = measure(nothing)
    state = torch.get_rng_state()
    assert measure(nothing) == first
    assert torch.equal(torch.get_rng_state(), state), "no draw from what training may use"
    assert measure(nothing, seed=43) != first
    alone = measure(nothing, chosen=HeldOutSet(name="held-out", samples=(sample("bb"),)))
    both = measure(nothing, chosen=HeldOutSet(name="held-out", samples=(sample("bb"), sample("bb"))))
    assert alone.by_sigma == both.by_sigma, "an image's noise is its own"


def test_masks_count_here_too():
    hidden_right = measure(
        lambda x, s, p: [torch.cat([y[..., :2] * 0, y[..., 2:] * 9], -1) for y in x], masks=HalfMasks()
    )
    assert hidden_right == measure(nothing, masks=HalfMasks())
    assert hidden_right.loss != measure(nothing).loss


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 100),
        ({"validation_step_interval": 7}, 7),
        ({"eval_steps_interval": 5}, 5),
        ({"eval_steps_interval": 0}, 0),
        ({"eval_epoch_interval": 0.5}, 12),
        ({"eval_epoch_interval": 0.001}, 1),
        ({"eval_epoch_interval": 2, "eval_steps_interval": 3}, 3),
    ],
)
def test_how_often(options, expected):
    assert evaluation_interval(ValidationSection(**options), updates_per_epoch=24) == expected


@dataclass
class Run:
    """What the evaluator says."""

    events: list[object] = field(default_factory=list)

    def emit(self, event: object) -> None:
        self.events.append(event)

    @contextmanager
    def phase(self, key, total=None, *, unit=None):
        yield SimpleNamespace(advance=lambda count: self.events.append(RunPhase(key=key, done=count, total=total)))

    @property
    def told(self):
        return [event for event in self.events if isinstance(event, EvaluationFinished)]


class Model:
    def __init__(self, *, with_average: bool) -> None:
        self.weight = nn.Parameter(torch.tensor(0.25))
        self.ema = WeightAverage([self.weight], EmaSettings(), device=torch.device("cpu")) if with_average else None
        with torch.no_grad():
            self.weight.fill_(0.75)
        self.optimizer = torch.optim.SGD([self.weight])
        self.compute = SimpleNamespace(device=torch.device("cpu"))

    def predict_still(self, latents, sigma_B, prompts):
        with torch.no_grad():
            return [self.weight * x for x in latents]


def evaluate(model, *, stop=0, data=None, **options):
    run = Run()
    held_out = HeldOutData(sets=(CHOSEN,), latents=Latents(), masks=NO_MASKS)
    evaluator = Evaluator(
        ValidationSection(eval_timesteps=3, **options),
        held_out if data is None else None,
        training=model,
        run=run,
        stop=SimpleNamespace(level=stop),
    )
    evaluator.evaluate(7)
    return run


@pytest.mark.parametrize(
    ("with_average", "wanted", "expected"),
    [
        (False, "comparison", [False]),
        (True, "comparison", [False, True]),
        (True, "ema_only", [True]),
        (True, "none", [False]),
    ],
)
def test_the_average_is_measured_as_images_are_made_of_it(with_average, wanted, expected):
    model = Model(with_average=with_average)
    told = evaluate(model, ema_validation=wanted).told
    assert [event.is_averaged for event in told] == expected
    for event in told:
        weight = 0.25 if event.is_averaged else 0.75
        expected_loss = measure(lambda x, s, p, w=weight: [w * y for y in x], levels=even_levels(3))
        assert event.losses == (expected_loss,)
        assert (event.step, event.sigmas, event.loss) == (7, even_levels(3), pytest.approx(expected_loss.loss))
    assert model.weight.item() == 0.75


def test_a_request_to_stop_ends_it_and_nothing_is_told():
    run = evaluate(Model(with_average=True), stop=1)
    assert run.told == []
    assert len(run.events) == 1


def test_without_held_out_images_there_is_nothing_to_do():
    assert evaluate(Model(with_average=True), data="none").events == []
