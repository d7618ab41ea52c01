"""When each dataset takes part in a run: the shape of every epoch, from starts, ends and shares. Standard library only.

All positions are *global* micro-batches: over all ranks, counted from 0 over the whole run. An epoch is a whole of
which each micro-batch is a part: while datasets with together P batches per epoch take part, one batch is 1 / P of it.
So an epoch in which a dataset joins or leaves is as long as its stretches before and after, each in its share.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from simpletuner.data.spec import Sampling, Schedule


@dataclass(frozen=True, kw_only=True)
class Member:
    """A dataset as the timeline sees it. `num_batches`: of one round, see `sampler`; `probability` is above 0."""

    schedule: Schedule
    num_batches: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of an epoch during which the same datasets take part: how many batches each of them gives."""

    counts: tuple[int, ...]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each dataset's slots begin, and the end: 0, counts[0], counts[0] + counts[1], ..."""
        found = [0]
        for count in self.counts:
            found.append(found[-1] + count)
        return tuple(found)

    @property
    def num_batches(self) -> int:
        """Of all datasets."""
        return self.starts[-1]


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Epochs of one shape that follow each other; `num_epochs` None: without end.

    begin: the first micro-batch. drawn: batches that each dataset has given before it. is_cut_off: it is one epoch, in
    the middle of which no dataset is left.
    """

    first_epoch: int
    num_epochs: int | None
    begin: int
    parts: tuple[Part, ...]
    drawn: tuple[int, ...]
    is_cut_off: bool = False

    @cached_property
    def epoch_batches(self) -> int:
        """Micro-batches of one epoch."""
        return sum(part.num_batches for part in self.parts)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Batches that each dataset gives in one epoch."""
        return tuple(sum(column) for column in zip(*(part.counts for part in self.parts), strict=True))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a micro-batch is: `position` within part `number` of `epoch`, which is `part`.

    drawn: batches that each dataset has given before that part.
    """

    epoch: int
    number: int
    part: Part
    position: int
    drawn: tuple[int, ...]


class Timeline:
    """The epochs of a run. It ends where no dataset takes part, if there is such a place."""

    def __init__(self, members: Sequence[Member], *, batches_per_update: int, sampling: Sampling) -> None:
        """Args: batches_per_update: micro-batches of one optimizer update over all ranks."""
        self._stretches = tuple(_stretches(_Shares(members, batches_per_update, sampling)))
        self._begins = [stretch.begin for stretch in self._stretches]

    @property
    def end(self) -> int | None:
        """The first micro-batch for which there is no dataset; None: there always is one."""
        if not self._stretches:
            return 0
        last = self._stretches[-1]
        return None if last.num_epochs is None else last.begin + last.num_epochs * last.epoch_batches

    def place(self, index: int) -> Place:
        """Where micro-batch `index` is. Raises IndexError: the timeline has ended before it."""
        stretch, epochs_in, position = self._epoch_at(index)
        drawn = [before + epochs_in * each for before, each in zip(stretch.drawn, stretch.counts, strict=True)]
        number = 0
        while position >= stretch.parts[number].num_batches:
            position -= stretch.parts[number].num_batches
            drawn = [before + each for before, each in zip(drawn, stretch.parts[number].counts, strict=True)]
            number += 1
        return Place(
            epoch=stretch.first_epoch + epochs_in,
            number=number,
            part=stretch.parts[number],
            position=position,
            drawn=tuple(drawn),
        )

    def epoch_of(self, index: int) -> int:
        """The epoch, from 0, of micro-batch `index`. Raises IndexError: the timeline has ended before it."""
        stretch, epochs_in, _ = self._epoch_at(index)
        return stretch.first_epoch + epochs_in

    def begin_of(self, epoch: int) -> int | None:
        """The first micro-batch of `epoch`, from 0, or the end there; None: an earlier epoch is not whole."""
        for stretch in reversed(self._stretches):
            if epoch >= stretch.first_epoch:
                epochs_in = epoch - stretch.first_epoch
                last = 0 if stretch.is_cut_off else stretch.num_epochs
                return stretch.begin + epochs_in * stretch.epoch_batches if last is None or epochs_in <= last else None
        return None

    def counts_of(self, epoch: int) -> tuple[int, ...]:
        """Batches that each dataset gives in an epoch that the timeline has."""
        which = bisect_right([stretch.first_epoch for stretch in self._stretches], epoch) - 1
        return self._stretches[which].counts

    def takes_part(self, member: int, *, before: int) -> bool:
        """Whether a dataset is one of those before micro-batch `before`."""
        for stretch in self._stretches:
            begin = stretch.begin
            for part in stretch.parts:
                if begin < before and part.counts[member] > 0:
                    return True
                begin += part.num_batches
        return False

    def _epoch_at(self, index: int) -> tuple[Stretch, int, int]:
        """(stretch, epochs since its first, position in the epoch)."""
        end = self.end
        if end is not None and index >= end:
            raise IndexError(f"no dataset takes part in micro-batch {index}")
        stretch = self._stretches[bisect_right(self._begins, index) - 1]
        return (stretch, *divmod(index - stretch.begin, stretch.epoch_batches))


class _Shares:
    """Who takes part where, and with how many batches per epoch."""

    def __init__(self, members: Sequence[Member], batches_per_update: int, sampling: Sampling) -> None:
        self.members = members
        self._sampling = sampling
        schedules = [member.schedule for member in members]
        self._epochs = [(s.start_epoch - 1, s.end_epoch) for s in schedules]
        self._steps = [
            (max(s.start_step - 1, 0) * batches_per_update, _times(s.end_step, batches_per_update)) for s in schedules
        ]
        self._limits = [_times(s.disable_after_epoch_step, batches_per_update) for s in schedules]

    def next_epoch(self, epoch: int) -> int | None:
        """The next epoch that is the first, or the first no more, of some dataset."""
        return min(
            (edge for edges in self._epochs for edge in edges if edge is not None and edge > epoch), default=None
        )

    def next_step(self, index: int) -> int | None:
        """The next micro-batch at which a dataset starts or has ended."""
        return min((edge for edges in self._steps for edge in edges if edge is not None and edge > index), default=None)

    def next_limit(self, position: int) -> int | None:
        """The next position within an epoch at which a dataset leaves until the next one."""
        return min((limit for limit in self._limits if limit is not None and limit > position), default=None)

    def present(self, epoch: int, index: int) -> list[int]:
        """The datasets whose start has come and whose end has not."""
        return [
            which
            for which, (epochs, steps) in enumerate(zip(self._epochs, self._steps, strict=True))
            if _is_within(epoch, epochs) and _is_within(index, steps)
        ]

    def active(self, present: Sequence[int], position: int) -> list[int]:
        """Those that also go on to this position of the epoch."""
        return [which for which in present if (limit := self._limits[which]) is None or position < limit]

    def of_whole_epoch(self, active: Sequence[int]) -> dict[int, int]:
        """Batches per epoch of each of `active` while just these take part: what the most probable has in one round,
        the others in proportion. auto-weighting: to length times probability; uniform: to probability alone."""
        members = {which: self.members[which] for which in active}
        highest = max(member.probability for member in members.values())
        longest = max(member.num_batches for member in members.values())
        lengths = {w: longest if self._sampling == "uniform" else m.num_batches for w, m in members.items()}
        return {w: max(round(lengths[w] * m.probability / highest), 1) for w, m in members.items()}


def _stretches(shares: _Shares) -> Iterator[Stretch]:
    epoch, begin, drawn = 0, 0, (0,) * len(shares.members)
    while True:
        parts, is_cut_off = _shape(shares, epoch, begin)
        if not parts:
            return
        num_epochs = 1 if is_cut_off else _num_alike(shares, epoch, begin, sum(part.num_batches for part in parts))
        found = Stretch(
            first_epoch=epoch,
            num_epochs=num_epochs,
            begin=begin,
            parts=parts,
            drawn=drawn,
            is_cut_off=is_cut_off,
        )
        yield found
        if num_epochs is None or is_cut_off:
            return
        epoch += num_epochs
        begin += num_epochs * found.epoch_batches
        drawn = tuple(before + num_epochs * each for before, each in zip(drawn, found.counts, strict=True))


def _shape(shares: _Shares, epoch: int, begin: int) -> tuple[tuple[Part, ...], bool]:
    """The parts of the epoch that begins at micro-batch `begin`, and whether datasets ran out within it."""
    parts: list[Part] = []
    done, index = Fraction(0), begin
    while done < 1:
        present = shares.present(epoch, index)
        active = shares.active(present, index - begin)
        if not active:  # those that only pause until the next epoch end this one
            return tuple(parts), not present
        whole = shares.of_whole_epoch(active)
        total = sum(whole.values())
        limit = shares.next_limit(index - begin)
        ends = [shares.next_step(index), None if limit is None else begin + limit]
        length = min(-((done - 1) * total // 1), *(end - index for end in ends if end is not None), total)
        counts = _apportion(list(whole.values()), length)
        by_member = dict(zip(whole, counts, strict=True))
        parts.append(Part(counts=tuple(by_member.get(which, 0) for which in range(len(shares.members)))))
        done += Fraction(length, total)
        index += length
    return tuple(parts), False


def _num_alike(shares: _Shares, epoch: int, begin: int, length: int) -> int | None:
    """How many epochs from this one on have its shape; None: all."""
    next_epoch, next_step = shares.next_epoch(epoch), shares.next_step(begin)
    found = [] if next_epoch is None else [next_epoch - epoch]
    if next_step is not None:
        found.append(max((next_step - begin) // length, 1))
    return min(found, default=None)


def _apportion(whole: Sequence[int], length: int) -> list[int]:
    """`length` batches in the proportions of `whole`, by largest remainders; each at least once if there is room."""
    total = sum(whole)
    counts = [length * each // total for each in whole]
    by_remainder = sorted(range(len(whole)), key=lambda which: (-(length * whole[which] % total), which))
    for which in by_remainder[: length - sum(counts)]:
        counts[which] += 1
    while length >= len(whole) and min(counts) == 0:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def _is_within(place: int, edges: tuple[int, int | None]) -> bool:
    start, end = edges
    return start <= place and (end is None or place < end)


def _times(number: int | None, factor: int) -> int | None:
    return None if number is None else number * factor
