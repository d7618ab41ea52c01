"""What comes next in a pass over the model: learned once, since every pass of a kind uses the layers in one order."""

from __future__ import annotations


class PassOrder:
    """Follows the groups as they are used and foretells the next one.

    A pass goes from one `begin` to the next; what belongs to its backward, recomputation included, belongs to it.
    Passes of a kind are alike, so one that was followed to its end tells all later ones. Where a pass leaves the known
    order, the rest of the order is learned anew.
    """

    def __init__(self, num_groups: int) -> None:
        self._num_groups = num_groups
        self._orders: dict[object, list[int]] = {}
        self._finished: set[object] = set()
        self._kind: object = None
        self._order = self._orders.setdefault(None, [])
        self._position = -1

    def begin(self, kind: object) -> None:
        """A pass of that kind begins, and the one before is over."""
        del self._order[self._position + 1 :]
        self._finished.add(self._kind)
        self._kind, self._order, self._position = kind, self._orders.setdefault(kind, []), -1

    def follow(self, group: int) -> int | None:
        """`group` is used now, and was not just before; returns the one that is used next, as far as is known."""
        order = self._order
        self._position += 1
        if self._position == len(order):
            self._finished.discard(self._kind)
            order.append(group)
        elif order[self._position] != group:
            self._finished.discard(self._kind)
            order[self._position :] = [group]
        following = self._position + 1
        if following < len(order):
            return order[following]
        return order[0] if self._kind in self._finished else self._guess()

    def _guess(self) -> int | None:
        """In an unknown pass: on in the direction in which it goes."""
        order, position = self._order, self._position
        step = -1 if position > 0 and order[position] < order[position - 1] else 1
        following = order[position] + step
        return following if 0 <= following < self._num_groups else None
