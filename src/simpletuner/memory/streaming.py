"""Frozen weights that are on the device only while they are used.

The layers of a group are used one after the other, in forward, in backward and in the recomputation of checkpointing.
Autograd holds a layer and not its weight, so all that is needed is that a group is on the device when one of its layers
is used: `Streamer.use`. A ring of buffers ("slots") as large as the largest group holds the groups that are there; with
`ahead` the next group is copied into one slot while the device computes with another. Weights only ever travel to the
device: what is in a slot is overwritten, never brought back.

On CUDA the copies have a stream of their own. Two events keep the order: a slot is read when its copy is through, and
overwritten when everything that was asked for while it was in use is through. On a CPU a slot is a buffer beside the
store, and everything happens in turn.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from simpletuner.memory.groups import NUM_SLOTS_AHEAD
from simpletuner.memory.order import PassOrder
from simpletuner.memory.store import GroupStore, HostBytes, Parts, group_of_layer, meta_parts


class StreamedLayer(Protocol):
    """A frozen layer whose stored tensors can be put elsewhere; see `quant.linear.FrozenLinear`."""

    before_use: Callable[[], None] | None
    streamed_to: torch.device | None

    def parts(self) -> dict[str, Tensor]: ...

    def set_parts(self, parts: Parts) -> None: ...


@dataclass(kw_only=True)
class StreamCounts:
    """How often a group was turned to (`changes`), was on the device or on its way there by then (`hits`), and was
    copied (`copies`)."""

    changes: int = 0
    hits: int = 0
    copies: int = 0


class StreamBuilder:
    """Takes the layers of a model into a store, one by one as they are made, so that they are never all on the device.

    `groups` are names of layers. Layers in `ready` are in the store from an earlier run.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[str]],
        store: GroupStore,
        *,
        device: torch.device,
        ahead: bool,
        is_ready: bool = False,
    ) -> None:
        self._groups = groups
        self._store = store
        self._device = device
        self._ahead = ahead
        self._group_of = group_of_layer(groups)
        self._pending: dict[int, dict[str, Parts]] = {}
        self._layers: dict[str, StreamedLayer] = {}
        self.ready = frozenset(self._group_of) if is_ready else frozenset[str]()

    @property
    def names(self) -> frozenset[str]:
        """The layers that stream."""
        return frozenset(self._group_of)

    def parts_of(self, name: str) -> dict[str, Tensor]:
        """Meta tensors for a layer in `ready`."""
        return meta_parts(self._store.layout(self._group_of[name]).layers[name])

    def take(self, name: str, layer: StreamedLayer) -> None:
        """Put the layer's tensors into the store and leave it none."""
        group = self._group_of[name]
        parts = layer.parts()
        layer.streamed_to = self._device
        self._layers[name] = layer
        if name in self.ready:
            return
        # A view would keep what it is a view of.
        waiting = self._pending.setdefault(group, {})
        waiting[name] = {part: tensor.detach().to("cpu") for part, tensor in parts.items()}
        layer.set_parts({part: torch.empty_like(tensor, device="meta") for part, tensor in parts.items()})
        if len(waiting) == len(self._groups[group]):
            del self._pending[group]
            self._store.put(group, {member: waiting[member] for member in self._groups[group]})

    def stored(self) -> dict[str, Tensor]:
        """ "<layer>.<part>" -> the tensor in main memory, of all layers, once they were all taken."""
        return {
            f"{layer}.{name}": tensor
            for group in range(len(self._groups))
            if (block := self._store.block(group)) is not None
            for layer, parts in self._store.layout(group).views(block).items()
            for name, tensor in parts.items()
        }

    def attach(self, model: nn.Module) -> Streamer:
        """All layers were taken: from now on they stream. `model`'s passes are followed, to know what comes next."""
        assert not self._pending and self._layers.keys() == self._group_of.keys()
        self._store.finish()
        layers = [{name: self._layers[name] for name in members} for members in self._groups]
        streamer = Streamer(layers, self._store, device=self._device, ahead=self._ahead)
        for name, layer in self._layers.items():
            layer.before_use = partial(streamer.use, self._group_of[name])
        model.register_forward_pre_hook(lambda module, args: streamer.begin_pass())
        return streamer


class Streamer:
    """Brings groups of layers to the device when they are used.

    The layers hold the streamer; it holds them weakly, so it goes when they go.
    """

    def __init__(
        self, layers: Sequence[Mapping[str, StreamedLayer]], store: GroupStore, *, device: torch.device, ahead: bool
    ) -> None:
        self._layers = [{name: weakref.ref(layer) for name, layer in group.items()} for group in layers]
        self._store = store
        self._absent = [
            {name: meta_parts(parts) for name, parts in store.layout(group).layers.items()}
            for group in range(len(layers))
        ]
        self._order = PassOrder(len(layers))
        self._ahead = ahead and len(layers) > 1
        self._copier = _Copier(store, device, ahead=self._ahead)
        size_bytes = max(store.layout(group).size_bytes for group in range(len(layers)))
        self._slots = [
            _Slot(size_bytes, device, needs_staging=store.block(0) is None)
            for _ in range(NUM_SLOTS_AHEAD if self._ahead else 1)
        ]
        for slot in self._slots:
            self._copier.claim(slot)
        self._current: _Slot | None = None
        self._begins = False  # a pass has begun and used nothing yet
        self.counts = StreamCounts()

    @property
    def resident(self) -> frozenset[int]:
        """The groups that are on the device, or on their way."""
        return frozenset(slot.group for slot in self._slots if slot.group is not None)

    @property
    def slot_bytes(self) -> int:
        """What the slots take on the device."""
        return sum(slot.buffer.nbytes for slot in self._slots)

    def begin_pass(self) -> None:
        """The model is called. Passes with and without backward have orders of their own."""
        self._order.begin(torch.is_grad_enabled())
        self._begins = True

    def use(self, group: int) -> None:
        """Have the group on the device: what is asked of the device next finds its weights there."""
        current = self._current
        if current is not None and current.group == group:
            if self._begins:
                self._fetch_ahead(current, group)
            return
        if current is not None:
            self._copier.note_left(current)
        self.counts.changes += 1
        slot = next((slot for slot in self._slots if slot.group == group), None)
        if slot is not None:
            self.counts.hits += 1
        else:
            # The one that is not current holds what was expected; with one slot there is no choice.
            slot = next((s for s in self._slots if s is not current), self._slots[0])
            self._begin_copy(slot, group)
        self._current = None
        try:
            self._copier.finish(slot)
        except BaseException:
            slot.group = None
            raise
        self._show(slot)
        self._current = slot
        self._fetch_ahead(slot, group)

    def _fetch_ahead(self, current: _Slot, group: int) -> None:
        """Begin to copy what is expected after `group`, which is in `current`, into the other slot."""
        self._begins = False
        following = self._order.follow(group) if self._ahead else None
        if following is not None and following not in self.resident:
            self._begin_copy(next(s for s in self._slots if s is not current), following)

    def _begin_copy(self, slot: _Slot, group: int) -> None:
        if slot.group is not None:
            self._copier.settle(slot)
            self._hide(slot)
        slot.group = group
        self.counts.copies += 1
        try:
            self._copier.begin(slot, group)
        except BaseException:
            slot.group = None
            raise

    def _show(self, slot: _Slot) -> None:
        """Let the layers of the slot's group find their tensors in it."""
        assert slot.group is not None
        views = slot.views.get(slot.group)
        if views is None:
            views = slot.views[slot.group] = self._store.layout(slot.group).views(slot.buffer)
        self._set(slot.group, views)

    def _hide(self, slot: _Slot) -> None:
        """Let nobody find tensors in a slot that will be overwritten."""
        assert slot.group is not None
        self._set(slot.group, self._absent[slot.group])

    def _set(self, group: int, parts: Mapping[str, Parts]) -> None:
        for name, reference in self._layers[group].items():
            layer = reference()
            if layer is not None:
                layer.set_parts(parts[name])


class _Slot:
    """Memory on the device for one group at a time.

    staging: pinned main memory, if blocks are read from a disk for a GPU. filling: the thread's work on it.
    copied: the copy to the device is through. left: what used the slot is through.
    """

    def __init__(self, size_bytes: int, device: torch.device, *, needs_staging: bool) -> None:
        self.buffer = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        is_cuda = device.type == "cuda"
        self.staging = HostBytes(size_bytes, pinned=True) if is_cuda and needs_staging else None
        self.copied = torch.cuda.Event() if is_cuda else None
        self.left = torch.cuda.Event() if is_cuda else None
        if self.left is not None:  # whoever had this memory before
            self.left.record(torch.cuda.current_stream(device))
        self.group: int | None = None
        self.filling: Future[None] | None = None
        self.views: dict[int, Mapping[str, Parts]] = {}


class _Copier:
    """Copies blocks into slots: on a CUDA stream of its own and, if they are read from a disk, in a thread, if `ahead`;
    else where and when it is asked to."""

    def __init__(self, store: GroupStore, device: torch.device, *, ahead: bool) -> None:
        self._store = store
        self._device = device
        self._stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        reads = ahead and store.block(0) is None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offload") if reads else None

    def claim(self, slot: _Slot) -> None:
        """The slot's memory may be taken for something else only when the last copy into it is through."""
        if self._stream is not None:
            slot.buffer.record_stream(self._stream)

    def begin(self, slot: _Slot, group: int) -> None:
        """Copy the group into the slot, from now on or at once."""
        if self._thread is not None:
            slot.filling = self._thread.submit(self._copy, slot, group)
        else:
            self._copy(slot, group)

    def settle(self, slot: _Slot) -> None:
        """Wait until the thread is done with the slot, whatever came of it: nobody waits for these bytes any more."""
        if slot.filling is not None:
            slot.filling.exception()
            slot.filling = None

    def finish(self, slot: _Slot) -> None:
        """Let the device wait for the copy, and this thread for the reader."""
        if slot.filling is not None:
            filling, slot.filling = slot.filling, None
            filling.result()
        if slot.copied is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.copied)

    def note_left(self, slot: _Slot) -> None:
        """The slot may be overwritten when what was asked of the device so far is through."""
        if slot.left is not None:
            slot.left.record(torch.cuda.current_stream(self._device))

    def _copy(self, slot: _Slot, group: int) -> None:
        target = slot.buffer[: self._store.layout(group).size_bytes]
        block = self._store.block(group)
        if slot.copied is None or slot.left is None:
            if block is not None:
                target.copy_(block)
            else:
                self._store.read(group, target)
            return
        if block is None:
            assert slot.staging is not None
            slot.copied.synchronize()  # the last copy out of the staging memory
            block = slot.staging.tensor[: len(target)]
            self._store.read(group, block)
        with self._own_stream():
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(slot.left)
            target.copy_(block, non_blocking=True)
            slot.copied.record(stream)

    def _own_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
