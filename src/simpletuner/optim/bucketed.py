"""The frame of our own optimizers: many small tensors are updated as a few long rows.

A LoRA has hundreds of tensors of some ten thousand elements. Updating them one by one spends the time on calls, so
the states of neighbours lie end to end in one row ("bucket") and the arithmetic runs on rows, in float32.
"""

from __future__ import annotations

import inspect
import operator
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor, nn

from simpletuner.optim.rounding import Dither, lattice_of, stochastic_round_

# Elements in a row: small enough for a CPU's cache, large enough to fill an accelerator.
_MAX_BUCKET_CPU = 1 << 16
_MAX_BUCKET_DEVICE = 1 << 22

VALUES = "param"
"""What the parameters themselves are called where a name stands for a row."""


def rest_of(name: str) -> str:
    """The name of the state that holds what rounding cut off `name`."""
    return f"{name}_rest"


class Scratch:
    """float32 rows in which the buckets of a CPU are updated one after the other: there, new memory and new views for
    each of many small tensors take longer than the arithmetic."""

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}

    def row(self, name: str, count: int) -> Tensor:
        """[count], with whatever was left in it."""
        row = self._rows.get(name)
        if row is None or len(row) < count:
            row = self._rows[name] = torch.empty(count)
        return row[:count]


@dataclass(kw_only=True)
class Bucket:
    """Parameters of one group that share device, dtype and step count, with their states laid end to end."""

    params: tuple[nn.Parameter, ...]
    hyper: Mapping[str, Any]  # the parameter group: "lr" and the optimizer's own settings
    step: int  # updates so far
    rows: dict[str, Tensor]  # state name -> [sum of the parameters' sizes]
    scratch: Scratch | None = None
    _cuts: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    def operands(self) -> tuple[list[Tensor], list[Tensor]]:
        """Values and gradients in float32, in the buckets' order: the tensors themselves where they are float32, else
        one row each, [N]. Update the values in place and hand them to `store_values_`."""
        grads = [cast("Tensor", p.grad) for p in self.params]
        if all(t.dtype == torch.float32 and t.is_contiguous() for t in (*self.params, *grads)):
            return list(self.params), grads
        values, gradients = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (self.params, grads))
        return [self._with_rest(VALUES, values)], [gradients.float()]

    def store_values_(self, values: Sequence[Tensor], dither: Dither | None) -> None:
        """Write the values of `operands` back, rounded as by `store_state_` if the parameters are bfloat16."""
        if values[0] is self.params[0]:
            return
        (row,) = values
        if self.params[0].dtype == torch.bfloat16:
            row = self._rounded(VALUES, row, dither)
        torch._foreach_copy_(list(self.params), pieces(row, self.params))

    def state(self, name: str) -> Tensor:
        """A state in float32, [N], with what rounding cut off if that was kept."""
        return self._with_rest(name, self.rows[name])

    def store_state_(self, name: str, values: Tensor, dither: Dither | None) -> None:
        """Keep float32 `values` [N] for the next step. A bfloat16 state is rounded stochastically by `dither`, without
        one to the nearest; what that cuts off is kept where there is a row for it."""
        row = self.rows[name]
        row.copy_(self._rounded(name, values, dither) if row.dtype == torch.bfloat16 else values)

    def pieces(self, row: Tensor, values: Sequence[Tensor]) -> list[Tensor]:
        """Cut a row of `state` into views with the shapes of the `values` of `operands`."""
        if self.scratch is None:
            return pieces(row, values)
        key = (row.data_ptr(), len(values))
        cut = self._cuts.get(key)
        if cut is None:
            cut = self._cuts[key] = pieces(row, values)
        return cut

    def _with_rest(self, name: str, row: Tensor) -> Tensor:
        rest = self.rows.get(rest_of(name))
        if self.scratch is not None and row.dtype != torch.float32:
            values = self.scratch.row(name, len(row)).copy_(row)
        else:
            values = row.float()
        return values if rest is None else values.add_(rest)

    def _rounded(self, name: str, values: Tensor, dither: Dither | None) -> Tensor:
        if dither is not None:
            return stochastic_round_(values, dither)
        nearest = values.bfloat16()
        if rest_of(name) in self.rows:
            self.rows[rest_of(name)].copy_(values - nearest.float())
        return nearest


def pieces(row: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Cut a row [N] into views with the shapes of `tensors`."""
    parts = row.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


class BucketedOptimizer(torch.optim.Optimizer):
    """An optimizer whose update is written once, for a bucket.

    State per parameter: "step" (int, updates so far) and one tensor of the parameter's shape for each of
    `state_names`. The tensors are views into the buckets' rows.
    """

    STATE_NAMES: ClassVar[tuple[str, ...]]

    # torch guards these four against torch.compile, and the guard imports the compiler when it is first called: 1.3 s
    # and 75 MB in a run that compiles nothing.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    _load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)

    def __init__(self, params: Iterable[nn.Parameter], defaults: dict[str, Any], *, seed: int) -> None:
        self.seed = seed
        self._buckets: list[Bucket] = []
        self._lone: dict[int, Bucket] = {}  # of `step_run`, by the place of their first parameter
        self._places: dict[nn.Parameter, int] = {}
        self._lattices: dict[torch.device, Tensor] = {}
        self._scratch = Scratch()
        super().__init__(params, defaults)

    def state_names(self, param: nn.Parameter) -> tuple[str, ...]:
        """The states of `param`."""
        return self.STATE_NAMES

    @abstractmethod
    def state_dtype(self, param: nn.Parameter) -> torch.dtype:
        """The dtype in which the states of `param` are kept."""

    @abstractmethod
    def update_(self, bucket: Bucket, dither: Dither) -> None:
        """Do update number `bucket.step` (counted from 1) of the bucket's parameters and states."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, once. Returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for bucket in self._current_buckets():
            self._update_(bucket)
        return loss

    def runs_of(self, params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """How `step` would bucket these, if they were the ones with gradients; in the optimizer's order."""
        chosen = {id(param) for param in params}
        return [
            run
            for group in self.param_groups
            for run in self._runs([param for param in group["params"] if id(param) in chosen])
        ]

    @torch.no_grad()
    def step_run(self, params: Sequence[nn.Parameter]) -> None:
        """Update the parameters of one run alone, as `step` would."""
        place = self._place(params[0])
        bucket = self._lone.get(place)
        if bucket is None or len(bucket.params) != len(params) or any(map(operator.is_not, bucket.params, params)):
            (group,) = (group for group in self.param_groups if any(params[0] is p for p in group["params"]))
            bucket = self._lone[place] = self._bucket(tuple(params), group)
        self._update_(bucket)

    def _update_(self, bucket: Bucket) -> None:
        """The chance in it depends on where its first parameter is, not on which others have gradients."""
        bucket.step += 1
        lattice, place = self._lattice(bucket.params), self._place(bucket.params[0])
        self.update_(bucket, Dither(lattice, seed=self.seed, step=bucket.step, index=place))
        for param in bucket.params:
            self.state[param]["step"] = bucket.step

    def _place(self, param: nn.Parameter) -> int:
        """Number of the parameter among all."""
        if param not in self._places:
            everything = (p for group in self.param_groups for p in group["params"])
            self._places = {p: index for index, p in enumerate(everything)}
        return self._places[param]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer`. That one casts states to the parameter's dtype, which widens ours; they are
        given their own dtype back, without loss."""
        self._load_state_dict(state_dict)
        self._buckets, self._lone = [], {}

    def _current_buckets(self) -> list[Bucket]:
        """The buckets of the parameters that have gradients now; the last step's, if they are the same."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        bucketed = [p for bucket in self._buckets for p in bucket.params]
        if len(params) != len(bucketed) or any(a is not b for a, b in zip(params, bucketed, strict=True)):
            self._buckets = [bucket for group in self.param_groups for bucket in self._new_buckets(group)]
        return self._buckets

    def _lattice(self, params: Sequence[Tensor]) -> Tensor:
        """The dither's lattice on their device; one serves all buckets."""
        device, numel = params[0].device, sum(p.numel() for p in params)
        lattice = self._lattices.get(device)
        if lattice is None or len(lattice) < numel:
            lattice = self._lattices[device] = lattice_of(numel, device)
        return lattice

    def _new_buckets(self, group: dict[str, Any]) -> Iterator[Bucket]:
        for members in self._runs([p for p in group["params"] if p.grad is not None]):
            yield self._bucket(tuple(members), group)

    def _runs(self, params: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        keys: list[Hashable] = [
            (p.device, p.dtype, self.state[p].get("step", 0) if p in self.state else 0) for p in params
        ]
        return _runs(params, keys)

    def _bucket(self, params: tuple[nn.Parameter, ...], group: dict[str, Any]) -> Bucket:
        """Move the states of `params` into new rows; what has no state yet starts at zero."""
        states = [cast("dict[str, Any]", self.state[p]) for p in params]
        rows = {}
        for name in self.state_names(params[0]):
            olds = [s.get(name) for s in states]
            dtype = self.state_dtype(params[0])
            parts = [torch.zeros_like(p) if old is None else old for p, old in zip(params, olds, strict=True)]
            rows[name] = torch.cat([part.reshape(-1).to(dtype) for part in parts])
            for state, view in zip(states, pieces(rows[name], params), strict=True):
                state[name] = view
        step = states[0].get("step", 0)
        scratch = self._scratch if params[0].device.type == "cpu" else None
        return Bucket(params=params, hyper=group, step=step, rows=rows, scratch=scratch)


def is_long(param: Tensor) -> bool:
    """Whether it is a run of its own, whatever its neighbours are."""
    return param.numel() > (_MAX_BUCKET_CPU if param.device.type == "cpu" else _MAX_BUCKET_DEVICE)


def _runs(params: Sequence[nn.Parameter], keys: Sequence[Hashable]) -> Iterator[list[nn.Parameter]]:
    """Cut into runs of neighbours with one key and at most the bucket's size; a larger tensor is a run of its own."""
    run: list[nn.Parameter] = []
    numel = 0
    for index, param in enumerate(params):
        limit = _MAX_BUCKET_CPU if param.device.type == "cpu" else _MAX_BUCKET_DEVICE
        if run and (keys[index] != keys[index - 1] or numel + param.numel() > limit):
            yield run
            run, numel = [], 0
        run.append(param)
        numel += param.numel()
    if run:
        yield run
