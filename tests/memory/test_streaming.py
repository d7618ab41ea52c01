"""Offload changes where weights lie and nothing else: outputs and gradients are those without, bit for bit."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import cache

import pytest
import torch

from simpletuner.adapters.lora import disabled
from simpletuner.memory.groups import GroupSettings
from simpletuner.quant.build import FORMATS
from tests.memory.streamed import SIZES, Case, assert_same_bits, build, frozen_layers, predict, step

PRECISIONS = ["no_change", *(name for name in FORMATS if name not in ("plain", "fp8-torchao"))]
SETTINGS = {
    "blocks": GroupSettings(),
    "pairs": GroupSettings(blocks_per_group=2),
    "one group": GroupSettings(blocks_per_group=99),
    "leaves": GroupSettings(blocks_per_group=None),
    "three blocks": GroupSettings(num_blocks=3),
    "half of the leaves": GroupSettings(blocks_per_group=None, share=0.5),
    "some leaves": GroupSettings(blocks_per_group=None, targets=("feed_forward.w1", "layers.*.attention.to_q")),
}
CHECKPOINTING = [0, 1, 2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


@cache
def plain_steps(case: Case) -> list[list[torch.Tensor]]:
    streamed = build(replace(case, settings=None))
    return [step(streamed, seed) for seed in range(3)]


def assert_as_without(case: Case) -> None:
    streamed = build(case)
    assert streamed.streamer is not None
    reference = plain_steps(replace(case, settings=None, ahead=True, directory=None, poisoned=True))
    for seed, expected in enumerate(reference):
        assert_same_bits(step(streamed, seed), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("every", CHECKPOINTING)
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_steps_are_bit_for_bit_those_without(settings, ahead, every, device):
    """Three steps with updates between them, batches of two sizes."""
    assert_as_without(Case(settings=SETTINGS[settings], ahead=ahead, every=every, device=torch.device(device)))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_from_main_memory_without_poison(settings, ahead):
    assert_as_without(Case(settings=SETTINGS[settings], ahead=ahead, every=1, poisoned=False))


@pytest.mark.parametrize("every", CHECKPOINTING)
@pytest.mark.parametrize("settings", ["blocks", "leaves", "three blocks"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_with_every_precision(precision, settings, every):
    assert_as_without(Case(precision=precision, settings=SETTINGS[settings], every=every))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("settings", ["blocks", "leaves"])
@pytest.mark.parametrize("precision", ["no_change", "int8-torchao", "nf4-bnb"])
def test_with_autocast(precision, settings, autocast, dtype):
    assert_as_without(Case(precision=precision, settings=SETTINGS[settings], every=1, dtype=dtype, autocast=autocast))


@pytest.mark.parametrize("settings", ["blocks", "leaves"])
@pytest.mark.parametrize("targets", [("attention.to_q",), ("*attention.*", "*feed_forward.*"), ("layers.4.*.w2",)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_with_adapters_in_some_layers_and_dropout(targets, settings, dropout):
    assert_as_without(Case(settings=SETTINGS[settings], every=1, targets=targets, dropout=dropout))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("settings", ["blocks", "pairs", "leaves"])
def test_from_disk(tmp_path, settings, ahead):
    """Made by the first model, read by the second."""
    case = Case(settings=SETTINGS[settings], ahead=ahead, every=1, precision="int8-torchao", directory=tmp_path)
    assert_as_without(case)
    assert_as_without(case)


@pytest.mark.parametrize("settings", ["blocks", "leaves", "three blocks"])
@pytest.mark.parametrize("every", CHECKPOINTING)
def test_other_passes_in_between(settings, every):
    """Validation, regularisation (the base model as a teacher, within the step), other sizes, a step of one image."""

    def story(case):
        streamed = build(case)
        results = [*step(streamed, 0)]
        with torch.no_grad():
            results += predict(streamed, 1)
            streamed.model.eval()
            results += predict(streamed, 2, sizes=((6, 6),))
            streamed.model.train()
        for seed in (3, 4):
            with torch.no_grad(), disabled(streamed.model):
                results += predict(streamed, seed)
            results += step(streamed, seed, sizes=((4, 4),) * seed)
        with torch.inference_mode():
            results += [out.clone() for out in predict(streamed, 5)]
        return [*results, *step(streamed, 6)]

    case = Case(settings=SETTINGS[settings], every=every)
    assert_same_bits(story(case), story(replace(case, settings=None)))


@pytest.mark.parametrize("every", CHECKPOINTING)
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_no_more_groups_are_resident_than_planned(settings, ahead, every):
    """Whenever a group is used: the layers that have weights are those of the slots, and so is the memory."""
    streamed = build(Case(settings=SETTINGS[settings], ahead=ahead, every=every))
    streamer, layers = streamed.streamer, {}
    names = {id(module): name for name, module in streamed.model.named_modules()}
    planned = min(2 if ahead else 1, len(streamed.groups))
    owner = {name: group for group, members in enumerate(streamed.groups) for name in members}
    most, storages = 0, set()
    for layer in frozen_layers(streamed.model):
        layers[names[id(layer)].replace(".base_layer", "")] = layer
    assert layers.keys() == owner.keys()

    def watched(name, before_use):
        def before():
            nonlocal most
            before_use()
            present = {n for n, layer in layers.items() if not next(iter(layer.parts().values())).is_meta}
            assert name in present
            assert {owner[n] for n in present} <= streamer.resident
            most = max(most, len({owner[n] for n in present}), len(streamer.resident))
            storages.update(part.untyped_storage().data_ptr() for n in present for part in layers[n].parts().values())

        return before

    for name, layer in layers.items():
        layer.before_use = watched(name, layer.before_use)
    for seed in range(2):
        step(streamed, seed)
    assert most == planned
    assert len(storages) == planned
    largest = max(sum(p.nbytes for n in members for p in plain_parts(layers[n])) for members in streamed.groups)
    assert streamer.slot_bytes < planned * (largest + 256 * 8 * len(layers))


def plain_parts(layer):
    return [torch.empty(part.shape, dtype=part.dtype) for part in layer.parts().values()]


@pytest.mark.parametrize("every", CHECKPOINTING)
@pytest.mark.parametrize("settings", ["blocks", "pairs", "leaves", "three blocks", "half of the leaves"])
def test_after_the_first_pass_nearly_every_group_was_fetched_ahead(settings, every, record_property):
    streamed = build(Case(settings=SETTINGS[settings], every=every))
    counts = streamed.streamer.counts
    step(streamed, 0)
    step(streamed, 0)  # the captions of this step end the first pass
    counts.changes = counts.hits = counts.copies = 0
    for seed in range(1, 4):
        step(streamed, seed)
    record_property("share", counts.hits / counts.changes)
    assert counts.hits >= 0.95 * counts.changes
    # What stays in the other slot where the pass turns is not copied again, and nothing is copied in vain.
    assert counts.copies <= counts.changes
    with torch.no_grad():
        predict(streamed, 4)
        predict(streamed, 4)
        counts.changes = counts.hits = 0
        for seed in range(4):
            predict(streamed, seed)
    assert counts.hits >= 0.9 * counts.changes


def test_weights_are_never_copied_back():
    """Whatever happens to a slot, the next fetch brings the numbers that were stored."""
    streamed = build(Case(settings=GroupSettings(), ahead=True))
    step(streamed, 0)
    before = predict(streamed, 1)
    for slot in streamed.streamer._slots:
        slot.buffer.fill_(7)
        streamed.streamer._hide(slot)
        slot.group = None
    streamed.streamer._current = None
    assert_same_bits([out.detach() for out in predict(streamed, 1)], [out.detach() for out in before])


def test_a_model_that_is_dropped_takes_everything_with_it():
    """No cycle holds the blocks in main memory until Python looks for cycles."""
    streamed = build(Case())
    step(streamed, 0)
    layers = [weakref.ref(layer) for layer in frozen_layers(streamed.model)]
    slots = [weakref.ref(slot) for slot in streamed.streamer._slots]
    gc.disable()
    try:
        streamer = weakref.ref(streamed.streamer)
        del streamed
        assert [ref() for ref in (*layers, *slots, streamer) if ref() is not None] == []
    finally:
        gc.enable()


def test_moving_the_model_leaves_streamed_weights_where_they_are():
    streamed = build(Case())
    expected = step(streamed, 0)
    again = build(Case())
    again.model.to("cpu").to(torch.float32)
    assert_same_bits(step(again, 0), expected)


def test_the_streamed_layers_are_all_large_ones():
    streamed = build(Case())
    assert len(streamed.groups) == SIZES["n_layers"] + 2 * SIZES["n_refiner_layers"]
    assert all(len(members) == 7 for members in streamed.groups)
