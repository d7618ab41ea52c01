"""Which layers travel together, what that takes, and what is expected next."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.memory.groups import GroupSettings, aligned, block_of, choose_groups, plan_stream, spread
from simpletuner.memory.order import PassOrder

LAYERS = ("attention.to_q", "attention.to_out.0", "feed_forward.w1")
NAMES = [
    "cap_embedder.linear",
    *(f"noise_refiner.{i}.{layer}" for i in range(2) for layer in LAYERS),
    *(f"layers.{i}.{layer}" for i in range(5) for layer in LAYERS),
]
BLOCKS = [block_of(name) for name in NAMES[1::3]]
settings = st.builds(
    GroupSettings,
    blocks_per_group=st.none() | st.integers(1, 9),
    num_blocks=st.none() | st.integers(1, 9),
    share=st.floats(0.05, 1.0),
)


@given(settings)
def test_groups_are_disjoint_and_in_order(chosen):
    groups = choose_groups(NAMES, chosen)
    flat = [name for group in groups for name in group]
    assert flat == [name for name in NAMES if name in set(flat)]
    assert len(flat) == len(set(flat)) and all(groups)


@given(settings)
def test_a_plan_counts_every_byte_once(chosen):
    sizes = {name: (1000 * i, 4) for i, name in enumerate(NAMES, 1)}
    groups = choose_groups(NAMES, chosen)
    for ahead in (False, True):
        plan = plan_stream(sizes, groups, ahead=ahead, on_disk=False)
        streamed = {name for group in groups for name in group}
        assert plan.resident_bytes == sum(sum(sizes[name]) for name in NAMES if name not in streamed)
        assert plan.ram_bytes == sum(aligned(part) for name in streamed for part in sizes[name])
        assert plan.device_bytes == plan.resident_bytes + plan.num_slots * max(plan.group_bytes)
        assert plan.num_slots == min(len(groups), 2 if ahead else 1) and plan.disk_bytes == 0
        on_disk = plan_stream(sizes, groups, ahead=ahead, on_disk=True)
        assert on_disk.disk_bytes == plan.ram_bytes and on_disk.ram_bytes == plan.num_slots * plan.slot_bytes


def test_blocks_and_leaves():
    assert [group[0] for group in choose_groups(NAMES, GroupSettings())] == NAMES[1::3]
    assert choose_groups(NAMES, GroupSettings(blocks_per_group=None)) == tuple((name,) for name in NAMES[1:])


@pytest.mark.parametrize(("size", "lengths"), [(1, [3] * 7), (2, [6, 6, 6, 3]), (4, [6, 12, 3]), (9, [6, 15])])
def test_no_group_holds_blocks_of_two_lists(size, lengths):
    assert [len(group) for group in choose_groups(NAMES, GroupSettings(blocks_per_group=size))] == lengths


@pytest.mark.parametrize(("count", "blocks"), [(1, [2]), (2, [1, 3]), (5, [0, 1, 2, 3, 4]), (29, [0, 1, 2, 3, 4])])
def test_some_blocks_are_main_blocks_spread_evenly(count, blocks):
    groups = choose_groups(NAMES, GroupSettings(num_blocks=count))
    assert [block_of(group[0]) for group in groups] == [f"layers.{i}" for i in blocks]


def test_targets_and_share():
    by = {"blocks_per_group": None}
    assert len(choose_groups(NAMES, GroupSettings(share=0.5, **by))) == 10  # of 21
    assert {g[0] for g in choose_groups(NAMES, GroupSettings(targets=("feed_forward.w1",), **by))} == set(NAMES[3::3])
    assert len(choose_groups(NAMES, GroupSettings(targets=("layers.*.to_q", "layers.1.attention.to_out.0"), **by))) == 6
    assert choose_groups(NAMES, GroupSettings(targets=("to_x",), **by)) == ()


@given(st.integers(0, 50), st.integers(0, 60))
def test_a_spread_is_even(count, chosen):
    indices = spread(count, chosen)
    assert len(indices) == min(count, chosen) and sorted(set(indices)) == indices
    assert all(0 <= index < count for index in indices)
    steps = {b - a for a, b in pairwise(indices)}
    assert not steps or max(steps) - min(steps) <= 1


passes = st.lists(st.integers(0, 9), min_size=1, max_size=30).map(
    lambda groups: [g for i, g in enumerate(groups) if i == 0 or g != groups[i - 1]]
)


@given(st.dictionaries(st.booleans(), passes, min_size=1), st.lists(st.booleans(), max_size=6))
def test_a_pass_that_was_seen_is_foretold(orders, kinds):
    known = PassOrder(10)
    seen = set()
    for kind in (kind for kind in [*orders, *kinds] if kind in orders):
        known.begin(kind)
        foretold = [known.follow(group) for group in orders[kind]]
        if kind in seen:
            assert foretold[:-1] == orders[kind][1:]
            assert foretold[-1] == orders[kind][0]  # of the next pass like it
        seen.add(kind)


@given(passes, passes)
def test_a_pass_that_changes_is_learned_anew(first, second):
    known = PassOrder(10)
    for order in (first, second, second):
        known.begin(True)
        foretold = [known.follow(group) for group in order]
    assert foretold[:-1] == second[1:]


def test_the_plan_needs_no_torch():
    code = "import sys, simpletuner.memory.groups\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
