"""Activations in main memory: the same numbers, and few of them on the device at a time."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from simpletuner.memory.checkpointing import apply_checkpointing
from simpletuner.memory.inputs import HostInputs

NUM_BLOCKS = 8


class Block(nn.Module):
    """Tells of each tensor that it is given."""

    def __init__(self, seen: list[weakref.ref[Tensor]]) -> None:
        super().__init__()
        self.seen = seen
        self.most_alive = 0
        self.trained = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(weakref.ref(x.untyped_storage()))
        pointers = {ref().data_ptr() for ref in self.seen if ref() is not None}
        self.most_alive = max(self.most_alive, len(pointers))
        return x + torch.tanh(self.trained(x))


def test_what_is_taken_is_what_was_put():
    inputs = HostInputs()
    for _ in range(2):
        inputs.begin()
        activations = [torch.randn(3, 4).requires_grad_() for _ in range(4)]
        stored = [inputs.put(activation) for activation in activations]
        for activation, one in zip(reversed(activations), reversed(stored), strict=True):
            taken = inputs.take(one)
            assert torch.equal(taken, activation)
            assert not taken.requires_grad


def on_device(stored: list[object]) -> list[bool]:
    return [one.on_device is not None for one in stored]


def test_two_are_on_the_device_at_most():
    inputs = HostInputs()
    inputs.begin()
    stored: list[object] = []
    for _ in range(4):
        stored.append(inputs.put(torch.zeros(2)))
        assert on_device(stored) == [False] * (len(stored) - 1) + [True]
    for index in range(3, -1, -1):
        inputs.take(stored[index])  # one is in use now, and the one below it is on its way
        assert on_device(stored) == [position == index - 1 for position in range(4)]


def test_a_pass_without_backward_is_not_mixed_up_with_the_next():
    inputs = HostInputs()
    inputs.begin()
    inputs.put(torch.zeros(2))
    inputs.begin()
    assert inputs.put(torch.ones(2)).below is None


@pytest.mark.parametrize("offload", [False, True])
def test_the_inputs_of_recomputed_blocks_are_let_go(offload):
    """Counted in the blocks themselves: the input of this one, that of the one before it, and copies."""
    torch.manual_seed(0)
    seen: list[weakref.ref[Tensor]] = []
    blocks = nn.ModuleList([Block(seen) for _ in range(NUM_BLOCKS)])
    apply_checkpointing(blocks, every=1, offload=offload)
    hidden = torch.randn(2, 4)
    for block in blocks:
        hidden = block(hidden)
    loss = hidden.sum()
    del hidden
    gc.collect()
    most_in_forward = max(block.most_alive for block in blocks)
    loss.backward()
    most = max(block.most_alive for block in blocks)
    if offload:
        # Beside the two: the input of the last block, which keeps its activations, and the first block's, the test's.
        assert most_in_forward <= 3
        assert most <= 4
    else:
        assert most >= NUM_BLOCKS


def test_a_copy_of_a_model_has_inputs_of_its_own():
    inputs = HostInputs()
    inputs.put(torch.zeros(2))
    twin = copy.deepcopy(inputs)
    assert twin.put(torch.zeros(2)).below is None
