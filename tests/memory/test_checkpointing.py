from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.memory.checkpointing import apply_checkpointing

WIDTH = 8


class Block(nn.Module):
    """Frozen base, small trained part; takes something that is no tensor, and a tensor that needs no gradient."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.trained = nn.Linear(WIDTH, WIDTH, bias=False)
        self.dropout = dropout
        self.adapter_on = True
        self.calls = 0

    def forward(self, hidden: Tensor, scale: float, shift: Tensor) -> Tensor:
        self.calls += 1
        update = self.trained(F.dropout(hidden, self.dropout)) if self.adapter_on else torch.zeros_like(hidden)
        return hidden + torch.tanh(self.base(hidden) * scale + update.to(hidden.dtype) + shift)


def make(count: int, dropout: float = 0.0) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([Block(dropout) for _ in range(count)])


def run(blocks: nn.ModuleList, *, input_grad: bool = False) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
    hidden = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_(input_grad)
    out = hidden
    for block in blocks:
        out = block(out, 0.5, torch.ones(WIDTH))
    loss = out.square().mean()
    loss.backward()
    return loss.detach(), [p.grad for p in blocks.parameters()], hidden.grad


def assert_equal(first: object, second: object) -> None:
    if isinstance(first, Tensor):
        assert isinstance(second, Tensor)
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, (list, tuple)):
        assert isinstance(second, (list, tuple))
        for a, b in zip(first, second, strict=True):
            assert_equal(a, b)
    else:
        assert first == second


@pytest.mark.parametrize("input_grad", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3, 9])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_loss_and_gradients_are_bit_for_bit_those_without(count, every, input_grad):
    plain, checkpointed = make(count), make(count)
    apply_checkpointing(checkpointed, every=every)
    assert_equal(run(checkpointed, input_grad=input_grad), run(plain, input_grad=input_grad))


@pytest.mark.parametrize(("every", "recomputed"), [(1, 4), (2, 2), (3, 2), (4, 1), (5, 1)])
def test_one_block_in_every_is_run_twice_and_the_last_never(every, recomputed):
    blocks = make(5)
    assert apply_checkpointing(blocks, every=every) == recomputed
    run(blocks)
    assert [block.calls for block in blocks] == [2 if i % every == 0 and i < 4 else 1 for i in range(5)]


def test_names_and_state_stay_as_they_were():
    blocks = make(3)
    names = list(blocks.state_dict())
    modules = [name for name, _ in blocks.named_modules()]
    apply_checkpointing(blocks, every=1)
    assert list(blocks.state_dict()) == names
    assert [name for name, _ in blocks.named_modules()] == modules


def saved_bytes(blocks: nn.ModuleList) -> int:
    """Memory that the graph keeps between forward and backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden = torch.randn(3, WIDTH)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for block in blocks:
            hidden = block(hidden, 0.5, torch.ones(WIDTH))
    assert hidden.requires_grad
    return sum(kept.values())


def test_fewer_activations_are_kept_the_more_blocks_are_recomputed():
    sizes = []
    for every in (1, 2, 4):
        blocks = make(9)
        apply_checkpointing(blocks, every=every)
        sizes.append(saved_bytes(blocks))
    sizes.append(saved_bytes(make(9)))
    assert sizes == sorted(set(sizes))


def test_nothing_is_recomputed_without_gradients():
    blocks = make(3)
    apply_checkpointing(blocks, every=1)
    with torch.no_grad():
        for block in blocks:
            block(torch.randn(2, WIDTH), 0.5, torch.ones(WIDTH))
    blocks.requires_grad_(False)
    assert not blocks[0](torch.randn(2, WIDTH), 0.5, torch.ones(WIDTH)).requires_grad
    assert [block.calls for block in blocks] == [2, 1, 1]


def test_dropout_draws_the_same_numbers_twice_and_leaves_the_generator_where_it_was():
    plain, checkpointed = make(4, dropout=0.5), make(4, dropout=0.5)
    apply_checkpointing(checkpointed, every=1, preserve_rng_state=True)
    results = []
    for blocks in (plain, checkpointed):
        torch.manual_seed(5)
        results.append((run(blocks), torch.get_rng_state()))
    assert_equal(*results)


@pytest.mark.parametrize("within", ["forward only", "both"])
def test_autocast_of_the_forward_holds_in_the_recomputation(within):
    results = []
    for blocks in (make(4), make(4)):
        if results:
            apply_checkpointing(blocks, every=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = torch.ones(2, WIDTH)
            for block in blocks:
                hidden = block(hidden, 0.5, torch.ones(WIDTH))
            loss = hidden.float().square().mean()
            if within == "both":
                loss.backward()
        if within != "both":
            loss.backward()
        results.append((loss.detach(), [p.grad for p in blocks.parameters()]))
    assert_equal(*results)


def test_gradients_can_be_asked_for_without_storing_them():
    grads = []
    for blocks in (make(3), make(3)):
        if grads:
            apply_checkpointing(blocks, every=1)
        hidden = torch.ones(2, WIDTH)
        for block in blocks:
            hidden = block(hidden, 0.5, torch.ones(WIDTH))
        grads.append(torch.autograd.grad(hidden.sum(), [p for p in blocks.parameters() if p.requires_grad]))
        assert all(p.grad is None for p in blocks.parameters())
    assert_equal(*grads)


@pytest.mark.parametrize("off", [(0,), (1, 2), (0, 1, 2, 3)])
def test_an_adapter_that_is_switched_off_gets_no_gradient(off):
    results = []
    for blocks in (make(4), make(4)):
        if results:
            apply_checkpointing(blocks, every=1)
        for index in off:
            blocks[index].adapter_on = False
        results.append(run(blocks, input_grad=True))
    assert_equal(*results)


def test_parameters_that_come_later_are_trained_too():
    blocks = make(3)
    apply_checkpointing(blocks, every=1)
    blocks[0].trained = nn.Linear(WIDTH, WIDTH, bias=False)
    run(blocks)
    assert blocks[0].trained.weight.grad is not None


def test_a_checkpointed_model_can_be_copied():
    blocks = make(3)
    apply_checkpointing(blocks, every=1)
    twin = copy.deepcopy(blocks)
    run(twin)
    assert twin[0].calls == 2
    assert blocks[0].calls == 0
    assert all(p.grad is None for p in blocks.parameters())


def test_the_recomputation_imports_no_compiler():
    code = """
import sys, torch
from simpletuner.memory.checkpointing import apply_checkpointing
blocks = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(3)])
assert apply_checkpointing(blocks, every=1) == 2
hidden = torch.ones(2, 3)
for block in blocks:
    hidden = block(hidden)
hidden.sum().backward()
print({"sympy", "torch._dynamo"} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
