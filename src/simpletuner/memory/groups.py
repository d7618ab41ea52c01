"""Which frozen layers leave the device together, and what that takes and saves. Needs no torch.

A layer is known by its name in the model, "layers.3.attention.to_q": its block is what lies before and in its first
number, and its list, "layers", what lies before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

ALIGNMENT = 256
"""Every part of a group begins at a multiple of it, as a tensor of its own would: kernels may depend on it."""

NUM_SLOTS_AHEAD = 2
"""Groups on the device at a time if the next one is fetched while one is used."""


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """What streams, and in which pieces.

    blocks_per_group: consecutive blocks that travel together; None: every layer travels by itself.
    num_blocks: so many blocks of the longest list, evenly spread, and nothing else; None: all blocks of all lists.
    share: of the layers, evenly spread, in (0, 1].
    targets: only layers that one of these stands for: a full name, an ending at a dot or a pattern with `*`.
    """

    blocks_per_group: int | None = 1
    num_blocks: int | None = None
    share: float = 1.0
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """What a setting takes, in bytes of stored weights. Activations, adapters and small layers are not counted.

    group_bytes: of each group. resident_bytes: of the layers that could stream and do not.
    num_slots: groups that are on the device at a time.
    """

    group_bytes: tuple[int, ...]
    resident_bytes: int
    num_slots: int
    on_disk: bool

    @property
    def slot_bytes(self) -> int:
        """Of the largest group."""
        return max(self.group_bytes, default=0)

    @property
    def device_bytes(self) -> int:
        """What of these layers is on the device, at most."""
        return self.resident_bytes + self.num_slots * self.slot_bytes

    @property
    def ram_bytes(self) -> int:
        """What they take in main memory: all groups, or with the disk those that are on their way."""
        return self.num_slots * self.slot_bytes if self.on_disk else sum(self.group_bytes)

    @property
    def disk_bytes(self) -> int:
        return sum(self.group_bytes) if self.on_disk else 0


def choose_groups(names: Sequence[str], settings: GroupSettings) -> tuple[tuple[str, ...], ...]:
    """The groups of the layers `names`, which are in the model's order; layers without a block stay where they are."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        block = block_of(name)
        if block is not None and _is_target(name, settings.targets):
            blocks.setdefault(block, []).append(name)
    if settings.num_blocks is not None:
        blocks = _spread_blocks(blocks, settings.num_blocks)
    if settings.blocks_per_group is None:
        layers = [name for members in blocks.values() for name in members]
        return tuple((layers[index],) for index in spread(len(layers), max(1, round(settings.share * len(layers)))))
    return tuple(
        tuple(name for block in chunk for name in blocks[block])
        for chunk in _chunks(list(blocks), settings.blocks_per_group)
    )


def plan_stream(
    sizes: Mapping[str, Sequence[int]], groups: Sequence[Sequence[str]], *, ahead: bool, on_disk: bool
) -> StreamPlan:
    """What `groups` take.

    Args:
        sizes: layer -> bytes of each of its parts, for all layers that could stream.
        ahead: the next group is fetched while one is used.
    """
    streamed = {name for group in groups for name in group}
    return StreamPlan(
        group_bytes=tuple(sum(aligned(part) for name in group for part in sizes[name]) for group in groups),
        resident_bytes=sum(sum(parts) for name, parts in sizes.items() if name not in streamed),
        num_slots=min(len(groups), NUM_SLOTS_AHEAD if ahead else 1),
        on_disk=on_disk,
    )


def block_of(name: str) -> str | None:
    """ "layers.3.attention.to_q" -> "layers.3"; None for a layer outside of all lists."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    return None if index is None else ".".join(parts[: index + 1])


def spread(count: int, chosen: int) -> list[int]:
    """`chosen` of `count` indices at even distances, in order."""
    chosen = min(max(chosen, 0), count)
    return [(2 * i + 1) * count // (2 * chosen) for i in range(chosen)]


def aligned(size_bytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT


def _spread_blocks(blocks: Mapping[str, list[str]], count: int) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = {}
    for block in blocks:
        lists.setdefault(_list_of(block), []).append(block)
    longest = max(lists.values(), key=len, default=[])
    return {longest[index]: blocks[longest[index]] for index in spread(len(longest), count)}


def _chunks(blocks: Sequence[str], size: int) -> list[list[str]]:
    """Runs of at most `size` blocks of one list."""
    chunks: list[list[str]] = []
    for block in blocks:
        if chunks and len(chunks[-1]) < size and _list_of(chunks[-1][0]) == _list_of(block):
            chunks[-1].append(block)
        else:
            chunks.append([block])
    return chunks


def _list_of(block: str) -> str:
    return block.rpartition(".")[0]


def _is_target(name: str, targets: Sequence[str] | None) -> bool:
    if targets is None:
        return True
    return any(name == t or name.endswith("." + t) or ("*" in t and fnmatchcase(name, t)) for t in targets)
