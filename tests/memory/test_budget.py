"""Any choice of blocks to recompute gives the same numbers, and the chosen ones stay within the budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from simpletuner.adapters.lora import LoraSettings, apply_lora
from simpletuner.memory.budget import BlockCost, FixedBudget, SeenBudget, WithinBudget, measure_block
from simpletuner.memory.checkpointing import apply_checkpointing, apply_policy
from simpletuner.models.z_image.transformer import KEPT_PRODUCTS, ZImageTransformer, ZImageTransformerConfig

NUM_BLOCKS = 5
LIBERAL = 1 << 40


def transformer(dropout: float = 0.0) -> ZImageTransformer:
    """Z-Image in small with an adapter whose B is not zero."""
    torch.manual_seed(0)
    config = ZImageTransformerConfig(
        dim=64, n_layers=NUM_BLOCKS, n_refiner_layers=1, n_heads=2, cap_feat_dim=32, axes_dims=(8, 12, 12)
    )
    model = ZImageTransformer(config)
    apply_lora(model, LoraSettings(rank=4, alpha=4, dropout=dropout, targets=("to_q", "to_v", "w1", "w2"), seed=1))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model.train()


class Chosen:
    """The blocks that the test names."""

    def __init__(self, *recomputed: int) -> None:
        self.recomputed, self.ends = recomputed, 0

    def begin(self, forward: object, args: object, output: object) -> None:
        pass

    def recomputes(self, index: int) -> bool:
        return index in self.recomputed

    def keeps_products(self, index: int) -> bool:
        return index % 2 == 0

    def end(self) -> None:
        self.ends += 1


def within(budget_bytes: int, *, offload: bool = False) -> WithinBudget:
    return WithinBudget(NUM_BLOCKS, FixedBudget(budget_bytes), offload=offload, key=lambda x, layout, time: x.shape)


def inputs(sides: tuple[int, ...] = (16,)) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    latents = [torch.randn(16, side, 16, generator=generator) for side in sides]
    context = [torch.randn(32, 64, generator=generator) for _ in sides]
    return latents, torch.linspace(0.3, 0.6, len(sides)), context


def step(model: ZImageTransformer, sides: tuple[int, ...] = (16,)) -> list[Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = torch.stack([out.square().mean() for out in model(*inputs(sides))]).mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert len(ours) == len(expected) > NUM_BLOCKS
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sides", [(16,), (16, 16), (16, 24)])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("products", [(), KEPT_PRODUCTS])
@pytest.mark.parametrize("recomputed", [(), (0,), (0, 1, 2, 3), (1, 3), (0, 1, 2, 3, 4), (4,)])
def test_any_choice_gives_the_same_loss_and_gradients(recomputed, products, offload, sides):
    model, plain, policy = transformer(), transformer(), Chosen(*recomputed)
    apply_policy(model.layers, policy, products=products, offload=offload)
    for _ in range(2):
        assert_equal(step(model, sides), step(plain, sides))
    assert policy.ends == (2 if 0 in recomputed else 0)


@pytest.mark.parametrize("offload", [False, True])
def test_dropout_draws_the_same_numbers_whatever_is_chosen_and_measured(offload):
    model, plain = transformer(dropout=0.3), transformer(dropout=0.3)
    budget = within(cost_of_a_block(dropout=0.3).of_all(NUM_BLOCKS, 3, offload=offload), offload=offload)
    apply_policy(model.layers, budget, offload=offload, preserve_rng_state=True)
    for _ in range(2):
        assert_equal(step(model), step(plain))
    assert budget.num_kept == 3


@pytest.mark.parametrize("every", [1, 2])
def test_intervals_offload_too(every):
    model, plain = transformer(), transformer()
    apply_checkpointing(model.layers, every=every, offload=True)
    assert_equal(step(model), step(plain))


def cost_of_a_block(sides: tuple[int, ...] = (16,), dropout: float = 0.0) -> BlockCost:
    model, found = transformer(dropout), []
    model.layers[1].register_forward_pre_hook(
        lambda block, args: found.append(measure_block(block.forward, args)), prepend=True
    )
    with torch.enable_grad():
        model(*inputs(sides))
    return found[0]


def saved_bytes(model: ZImageTransformer, sides: tuple[int, ...] = (16,)) -> int:
    """What the graph of the main blocks keeps, each storage once; without parameters and what all blocks share."""
    kept: dict[int, int] = {}
    shared: set[int] = set()
    counting: list[bool] = []

    def pack(tensor: Tensor) -> Tensor:
        if counting and not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def begin(block: nn.Module, args: tuple[object, ...]) -> None:
        counting.append(True)
        _, layout, time = args
        tensors = (layout.rotation, time)
        shared.update(t.untyped_storage().data_ptr() for t in tensors)

    handles = [model.layers[0].register_forward_pre_hook(begin)]
    handles.append(model.layers[-1].register_forward_hook(lambda *_: counting.clear()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(*inputs(sides))
    assert out[0].requires_grad
    for handle in handles:
        handle.remove()
    return sum(size for pointer, size in kept.items() if pointer not in shared)


@pytest.mark.parametrize("sides", [(16,), (16, 24)])
@pytest.mark.parametrize("num_kept", range(1, NUM_BLOCKS + 1))
def test_what_is_saved_stays_within_the_budget_and_uses_it(num_kept, sides):
    cost = cost_of_a_block(sides)
    budget_bytes = cost.of_all(NUM_BLOCKS, num_kept, offload=False)
    for slack, expected in ((0, num_kept), (cost.saved_bytes - cost.input_bytes - 1, num_kept), (-1, num_kept - 1)):
        policy, model = within(budget_bytes + slack), transformer()
        apply_policy(model.layers, policy)
        assert_equal(step(model, sides), step(transformer(), sides))  # measures in its first pass
        assert policy.num_kept == max(1, expected)
        saved = saved_bytes(model, sides)
        assert saved <= max(budget_bytes + slack, cost.of_all(NUM_BLOCKS, 1, offload=False))
        # The measure counts for each block what all of them share: rotations, a few per cent.
        assert saved > 0.95 * cost.of_all(NUM_BLOCKS, policy.num_kept, offload=False) - cost.input_bytes


def product_bytes(model: ZImageTransformer, sides: tuple[int, ...] = (16,)) -> int:
    sizes: list[int] = []
    layers = [model.layers[0].get_submodule(name) for name in KEPT_PRODUCTS]
    handles = [layer.register_forward_hook(lambda layer, args, out: sizes.append(out.nbytes)) for layer in layers]
    with torch.no_grad():
        model(*inputs(sides))
    for handle in handles:
        handle.remove()
    return sum(sizes)


@pytest.mark.parametrize("sides", [(16,), (16, 24)])
@pytest.mark.parametrize(("num_kept", "num_products"), [(1, 0), (1, 1), (1, 3), (1, 4), (2, 3), (4, 1), (5, 0)])
def test_products_come_before_whole_blocks_and_within_the_budget(num_kept, num_products, sides):
    cost = replace(cost_of_a_block(sides), product_bytes=product_bytes(transformer(), sides))
    budget_bytes = cost.of_all(NUM_BLOCKS, num_kept, num_products=num_products, offload=False)
    policy, model = within(budget_bytes), transformer()
    apply_policy(model.layers, policy, products=KEPT_PRODUCTS)
    assert_equal(step(model, sides), step(transformer(), sides))
    assert (policy.num_kept, policy.num_products) == (num_kept, num_products)
    chosen = [(policy.recomputes(index), policy.keeps_products(index)) for index in range(NUM_BLOCKS)]
    bare = NUM_BLOCKS - num_kept - num_products
    assert chosen[:bare] == [(True, False)] * bare
    assert chosen[bare : bare + num_products] == [(True, True)] * num_products
    assert not any(recomputed for recomputed, _ in chosen[bare + num_products :])
    assert saved_bytes(model, sides) <= budget_bytes


def test_the_last_blocks_keep_their_activations():
    policy = within(cost_of_a_block().of_all(NUM_BLOCKS, 2, offload=False))
    model = transformer()
    apply_policy(model.layers, policy)
    step(model)
    assert [policy.recomputes(index) for index in range(NUM_BLOCKS)] == [True, True, True, False, False]


def test_a_budget_for_everything_recomputes_nothing_and_none_all_but_the_last():
    for budget_bytes, kept in ((LIBERAL, NUM_BLOCKS), (1, 1)):
        policy, model = within(budget_bytes), transformer()
        apply_policy(model.layers, policy)
        step(model)
        assert policy.num_kept == kept


def test_fewer_blocks_keep_theirs_when_a_batch_has_more_tokens():
    policy, model = within(cost_of_a_block().of_all(NUM_BLOCKS, NUM_BLOCKS, offload=False)), transformer()
    apply_policy(model.layers, policy)
    seen = []
    for sides in ((16,), (48,), (16,)):
        assert_equal(step(model, sides), step(transformer(), sides))
        seen.append(policy.num_kept)
    assert seen[0] == seen[2] == NUM_BLOCKS > seen[1]


def test_measuring_happens_once_for_a_shape_and_leaves_no_gradient():
    model, calls = transformer(), []
    model.layers[0].attention.register_forward_hook(lambda *_: calls.append(1))
    apply_policy(model.layers, within(LIBERAL))
    step(model)
    assert len(calls) == 2
    step(model)
    assert len(calls) == 3


class FakeMemory:
    """A device of `size_bytes` on which a pass takes `base` for each token and what the policy lets blocks keep."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes, self.peak_bytes, self.forgotten = size_bytes, 0, 0

    def available(self) -> int:
        return self.size_bytes

    def peak(self) -> int:
        return self.peak_bytes

    def forget_peak(self) -> None:
        self.peak_bytes, self.forgotten = 0, self.forgotten + 1


def test_a_device_is_filled_only_after_it_was_seen_what_is_left():
    """Law: what passes need beside kept activations, plus what these are allowed, never exceeds the device."""
    memory, settled, per_token = FakeMemory(1_000_000), [False], 300
    budget = SeenBudget(memory, is_settled=lambda: settled[0], reserve_bytes=10_000)
    extras = []
    for number, tokens in enumerate((1000, 1000, 1000, 500, 2000, 2000, 1000)):
        settled[0] = number > 0
        extra = budget.bytes_for(tokens, 7) - 7
        memory.peak_bytes = max(memory.peak_bytes, tokens * per_token + extra)
        assert memory.peak_bytes <= memory.size_bytes
        budget.seen(tokens)
        extras.append(extra)
    usable = int(1_000_000 * (1 - SeenBudget.SHARE_KEPT_FREE)) - 10_000
    small, large = usable - 1000 * per_token, usable - 2000 * per_token
    assert extras == [0, 0, small, small, 0, large, large]
    assert memory.forgotten == 3


def test_a_full_device_recomputes_everything():
    memory = FakeMemory(1000)
    budget = SeenBudget(memory, is_settled=lambda: True, reserve_bytes=0)
    budget.bytes_for(10, 5)
    memory.peak_bytes = 999
    budget.seen(10)
    assert budget.bytes_for(10, 5) == 5
