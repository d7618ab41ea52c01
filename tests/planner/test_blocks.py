"""What a step takes is what the arithmetic says: every allocation of a real step is counted and compared."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from simpletuner.adapters.lora import LoraSettings, apply_lora, trainable_parameters
from simpletuner.adapters.lycoris import apply_lycoris
from simpletuner.catalog.lycoris import LycorisSettings, Update
from simpletuner.catalog.modules import LORA_TARGETS
from simpletuner.catalog.precisions import PRECISIONS
from simpletuner.memory.checkpointing import apply_checkpointing
from simpletuner.models.streaming import place_module_
from simpletuner.models.z_image.load import quantisable_layers
from simpletuner.models.z_image.transformer import KEPT_PRODUCTS, ZImageTransformer, ZImageTransformerConfig, velocity
from simpletuner.planner.blocks import adapter_params
from simpletuner.planner.inputs import Adapter, Picture, PlanInput
from simpletuner.planner.memory import step_height
from simpletuner.planner.sizes import ModelSizes, TransformerSizes
from simpletuner.quant.build import quantiser

SIZES = {"dim": 256, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 4, "cap_feat_dim": 64}
LORA = {"rank": 16, "targets": LORA_TARGETS["attention+mlp"]}
LYCORIS = {
    name: LycorisSettings(update=update, excluded=("*_refiner.*",), wildcards=True)
    for name, update in {
        "lokr": Update(algo="lokr", dim=10000, factor=8, full_matrix=True),
        "loha": Update(algo="loha", dim=8),
    }.items()
}


def peak_of_a_step(model: ZImageTransformer, side: int, captions: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that a second step allocates beside what was there before it."""
    latents = [torch.randn(16, side, side) for _ in captions]
    contexts = [torch.randn(length, model.config.dim, dtype=dtype) for length in captions]
    sigma = torch.rand(len(captions))

    def step():
        out = velocity(model, latents, sigma, contexts)
        torch.stack([(v.float() - x).square().mean() for v, x in zip(out, latents, strict=True)]).mean().backward()
        for parameter in trainable_parameters(model):
            parameter.grad = None

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"every": 1},
        {"every": 2},
        {"rank": 64},
        {"targets": "attention"},
        {"targets": "attention", "every": 1},
        {"side": 48},
        {"captions": (32, 32)},
        {"captions": (32, 64)},
        {"captions": (32, 64), "every": 1},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "every": 1},
        {"precision": "int8-torchao"},
        {"precision": "int8-torchao", "every": 1},
        {"precision": "int8-torchao", "every": 1, "dtype": torch.bfloat16},
        {"every": 1, "product": True},
        {"every": 2, "product": True, "dtype": torch.bfloat16},
        {"dropout": 0.1},
        {"dora": True},
        {"dora": True, "every": 1},
        {"lycoris": "lokr"},
        {"lycoris": "lokr", "every": 1},
        {"lycoris": "lokr", "dtype": torch.bfloat16},
        {"lycoris": "loha", "every": 1},
    ],
    ids=str,
)
def test_the_peak_of_a_step(case):
    dtype, every, side = case.get("dtype", torch.float32), case.get("every", 0), case.get("side", 32)
    captions, precision = case.get("captions", (32,)), case.get("precision", "no_change")
    targets, rank = LORA_TARGETS[case.get("targets", "attention+mlp")], case.get("rank", 16)
    model = ZImageTransformer(ZImageTransformerConfig(**SIZES, axes_dims=(16, 24, 24))).to(dtype).requires_grad_(False)
    make = quantiser(precision, dtype)
    for name in quantisable_layers(model) if make is not None else ():
        place_module_(model, name, make(model.get_submodule(name).weight.detach()))
    settings = LoraSettings(
        rank=rank, alpha=rank, targets=targets, dropout=case.get("dropout", 0.0), dora="dora" in case
    )
    lycoris = LYCORIS[case["lycoris"]] if "lycoris" in case else None
    report = apply_lora(model, settings) if lycoris is None else apply_lycoris(model, lycoris, seed=1)
    if every:
        apply_checkpointing(model.layers, every=every, products=KEPT_PRODUCTS if "product" in case else ())
    model.train()
    plan = PlanInput(
        sizes=ModelSizes(transformer=TransformerSizes(**SIZES)),
        device="cpu",
        weight_bytes=dtype.itemsize,
        compute_bytes=dtype.itemsize,
        precision=PRECISIONS[precision],
        adapter=Adapter(rank=rank, targets=targets, dropout="dropout" in case, lycoris=lycoris, dora="dora" in case),
        train=Picture(width_px=side * 8, height_px=side * 8, count=len(captions), caption_tokens=max(captions)),
        is_mixed=len(set(captions)) > 1,
        checkpointing=bool(every),
        interval=every or 1,
        keeps_product="product" in case,
    )
    assert adapter_params(plan, plan.adapter) == report.num_params
    assert step_height(plan).total == pytest.approx(peak_of_a_step(model, side, captions, dtype), rel=0.08)


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("releases", [False, True])
def test_the_peak_of_a_step_that_trains_everything(every, releases):
    """The refiners' activations, small beside the gradients, are not counted; the update is, which this step lacks."""
    model = ZImageTransformer(ZImageTransformerConfig(**SIZES, axes_dims=(16, 24, 24)))
    if every:
        for stack in (model.noise_refiner, model.layers):
            apply_checkpointing(stack, every=every, ends_pass=stack is model.layers)
    if releases:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    plan = PlanInput(
        sizes=ModelSizes(transformer=TransformerSizes(**SIZES)),
        device="cpu",
        weight_bytes=4,
        compute_bytes=4,
        adapter=Adapter(rank=0, targets=("*",), whole=True),
        train=Picture(width_px=256, height_px=256, count=1, caption_tokens=32),
        checkpointing=bool(every),
        interval=every or 1,
        releases=releases,
    )
    assert adapter_params(plan, plan.adapter) == model.num_params
    height = step_height(plan)
    assert height.total == pytest.approx(peak_of_a_step(model, 32, (32,), torch.float32), rel=0.25)
    if not releases:
        assert height.gradients == 4 * model.num_params
