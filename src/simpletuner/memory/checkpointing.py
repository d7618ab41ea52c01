"""Gradient checkpointing: forget a block's activations after forward and compute them again in backward.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (https://arxiv.org/abs/1604.06174). The recomputation
is an autograd function of our own, because `torch.utils.checkpoint` calls back into Python for every tensor that a
block saves: on a small model that is a tenth of a step. Values and gradients are bit for bit those without
checkpointing.

A recomputed block may keep the outputs of some of its linear layers (`products`), which are then not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from simpletuner.memory.inputs import HostInputs, OnHost
from simpletuner.memory.products import KeptOutput

Forward = Callable[..., Tensor]


class Policy(Protocol):
    """Which blocks of a forward pass are recomputed."""

    def begin(self, forward: Forward, args: tuple[Any, ...], outputs: Sequence[KeptOutput]) -> None:
        """A pass that will be differentiated begins: the first block is about to run as `forward(*args)`. `outputs`:
        of the layers that were named."""

    def recomputes(self, index: int) -> bool:
        """Whether the block is recomputed in this pass."""

    def keeps_products(self, index: int) -> bool:
        """Whether it then keeps the outputs of the layers that were named."""

    def end(self) -> None:
        """Backward has left the first block, which was recomputed."""


def apply_checkpointing(
    blocks: nn.ModuleList,
    *,
    every: int,
    products: Sequence[str] = (),
    offload: bool = False,
    preserve_rng_state: bool = False,
    ends_pass: bool = True,
) -> int:
    """Recompute every `every`-th block during backward, starting with the first. Returns how many.

    With 1, every block is recomputed: the least memory, at the price of one more forward. With n, one block in n is,
    and the others keep their activations: faster, for cards with memory to spare. The last block is never recomputed.
    Its backward comes right after its forward, so its activations are there at the peak either way; unless
    `ends_pass` is false, since much comes after these blocks.

    Args:
        blocks: run one after the other, each called with positional arguments and returning one tensor. `forward` is
            replaced on the instances; names of modules and parameters stay as they are.
        products: names, inside a block, of the linear layers whose outputs a recomputed block keeps.
        offload: what a recomputed block is given first, the activation, waits for backward in main memory.
        preserve_rng_state: needed if a block draws random numbers (dropout); costs a copy of the generators' states.
    """
    assert every >= 1
    chosen = range(0, len(blocks) - ends_pass, every)
    _wrap(blocks, chosen, _Always(), products, HostInputs() if offload else None, preserve_rng_state)
    return len(chosen)


def apply_policy(
    blocks: nn.ModuleList,
    policy: Policy,
    *,
    products: Sequence[str] = (),
    offload: bool = False,
    preserve_rng_state: bool = False,
) -> None:
    """Recompute those blocks that `policy` chooses, anew in each pass; the rest as `apply_checkpointing`."""
    _wrap(blocks, range(len(blocks)), policy, products, HostInputs() if offload else None, preserve_rng_state)


class _Always:
    def begin(self, forward: Forward, args: tuple[Any, ...], outputs: Sequence[KeptOutput]) -> None:
        pass

    def recomputes(self, index: int) -> bool:
        return True

    def keeps_products(self, index: int) -> bool:
        return True

    def end(self) -> None:
        pass


def _wrap(
    blocks: nn.ModuleList,
    chosen: range,
    policy: Policy,
    products: Sequence[str],
    inputs: HostInputs | None,
    preserve_rng_state: bool,
) -> None:
    for index in chosen:
        block = blocks[index]
        outputs = []
        for name in products:
            layer = block.get_submodule(name)
            layer.forward = KeptOutput(layer)
            outputs.append(layer.forward)
        block.forward = partial(_checkpointed, block, index, block.forward, policy, outputs, inputs, preserve_rng_state)


def _checkpointed(
    block: nn.Module,
    index: int,
    forward: Forward,
    policy: Policy,
    outputs: Sequence[KeptOutput],
    inputs: HostInputs | None,
    preserve_rng_state: bool,
    *args: Any,
) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args)
    # Autograd gives a function's gradients to its arguments, so the parameters that are trained must be among them.
    # They are looked up in each call: adapters and sharding change them after this function was put in place.
    trained = list(_trained_parameters(block))
    slots = [index for index, arg in enumerate(args) if isinstance(arg, Tensor)]
    tensors = [args[index] for index in slots]
    if not trained and not any(t.requires_grad for t in tensors):
        return forward(*args)
    if index == 0:
        if inputs is not None:
            inputs.begin()
        policy.begin(forward, args, outputs)
    if not policy.recomputes(index):
        return forward(*args)

    def run(*values: Tensor) -> Tensor:
        filled = list(args)
        for index, value in zip(slots, values, strict=True):
            filled[index] = value
        return forward(*filled)

    # `run` outlives this call: it must not hold the activations that enter the block twice.
    args = tuple(None if isinstance(arg, Tensor) else arg for arg in args)
    surroundings = _Surroundings(tensors, preserve_rng_state)
    kept = outputs if policy.keeps_products(index) else ()
    call = _Call(run, surroundings, len(tensors), kept, inputs, policy.end if index == 0 else None)
    out: Tensor = _Recompute.apply(call, *tensors, *trained)
    return out


class _Call:
    """One call of a recomputed block: `run` takes its `num_tensors` tensors; `done` is told when backward is."""

    def __init__(
        self,
        run: Forward,
        surroundings: _Surroundings,
        num_tensors: int,
        outputs: Sequence[KeptOutput],
        inputs: HostInputs | None,
        done: Callable[[], None] | None,
    ) -> None:
        self.run, self.surroundings, self.num_tensors = run, surroundings, num_tensors
        self.outputs, self.inputs, self.done = outputs, inputs, done
        self.num_products: list[int] = []  # of each of the layers
        self.first: OnHost | None = None  # the first tensor, if it waits elsewhere
        self.first_needs_gradient = False

    def first_run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What the block gives, and the products that are kept."""
        with ExitStack() as within:
            within.enter_context(self.surroundings.autocast())
            noted = [within.enter_context(output.noting()) for output in self.outputs]
            out = self.run(*tensors)
        self.num_products = [len(products) for products in noted]
        return out, [product for products in noted for product in products]

    def run_again(self, tensors: Sequence[Tensor], products: Sequence[Tensor]) -> Tensor:
        """What the block gives, with a graph."""
        rest = iter(products)
        with ExitStack() as within:
            for output, count in zip(self.outputs, self.num_products, strict=True):
                within.enter_context(output.giving(list(islice(rest, count))))
            for surrounding in (torch.enable_grad(), self.surroundings.autocast(), self.surroundings.random_state()):
                within.enter_context(surrounding)
            return self.run(*tensors)


class _Recompute(torch.autograd.Function):
    """`call.run(*tensors)`, of which only the tensors and `call`'s products are kept for backward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> Tensor:
        tensors, ctx.trained = inputs[: call.num_tensors], inputs[call.num_tensors :]
        ctx.call = call
        out, products = call.first_run(tensors)
        if call.inputs is not None:
            call.first, call.first_needs_gradient = call.inputs.put(tensors[0]), tensors[0].requires_grad
            tensors = tensors[1:]
        ctx.save_for_backward(*products, *tensors)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        count = sum(call.num_products)
        products, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        tensors = [t.detach().requires_grad_(t.requires_grad) for t in saved]
        if call.first is not None and call.inputs is not None:
            tensors.insert(0, call.inputs.take(call.first).requires_grad_(call.first_needs_gradient))
        out = call.run_again(tensors, products)
        with torch.enable_grad():
            seed = _Seed.apply(out, gradient)
        inputs = (*tensors, *ctx.trained)
        gradients: list[Tensor | None] = [None] * len(inputs)
        wanted = [index for index, value in enumerate(inputs) if value.requires_grad]
        # An adapter that is switched off leaves its parameters, or everything, out of the graph.
        if out.requires_grad:
            found = torch.autograd.grad(seed, [inputs[i] for i in wanted], allow_unused=True)
            for index, value in zip(wanted, found, strict=True):
                gradients[index] = value
        if call.done is not None:
            call.done()
        return (None, *gradients)


class _Seed(torch.autograd.Function):
    """A scalar whose gradient with respect to `out` is `gradient`.

    Handing `gradient` to `torch.autograd.grad` means the same, but torch then imports sympy to compare the shapes:
    half a second and 40 MB of a run that has no symbolic shape.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient, None


class _Surroundings:
    """What else decides a block's output: the autocast state and, if asked for, the random state."""

    def __init__(self, tensors: list[Tensor], preserve_rng_state: bool) -> None:
        self.device = tensors[0].device
        kind = self.device.type
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.rng_state = torch.get_rng_state() if preserve_rng_state else None
        on_device = preserve_rng_state and kind != "cpu"
        self.device_rng_state: Tensor | None = self._module().get_rng_state(self.device) if on_device else None

    def autocast(self) -> torch.autocast | nullcontext[None]:
        """Autocast as at the call. Its cache of cast weights stays off: what forward casts without a graph must not
        be served to the recomputation, which needs one."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=False)

    @contextmanager
    def random_state(self) -> Iterator[None]:
        """Random numbers as at the call; afterwards the generators go on where they were."""
        if self.rng_state is None:
            yield
            return
        devices = [] if self.device_rng_state is None else [self.device]
        with torch.random.fork_rng(devices=devices, device_type=self.device.type if devices else "cuda"):
            torch.set_rng_state(self.rng_state)
            if self.device_rng_state is not None:
                self._module().set_rng_state(self.device_rng_state, self.device)
            yield

    def _module(self) -> Any:
        return torch.get_device_module(self.device)


def _trained_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """As `module.parameters()`, filtered; several times faster, which counts in a function called for every block."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad:
            yield parameter
    for child in module._modules.values():
        if child is not None:
            yield from _trained_parameters(child)
