"""The cache of refined captions changes when things are computed, never what."""

from __future__ import annotations

import torch

from simpletuner.train.context import ContextCache


class Refiner:
    def __init__(self) -> None:
        self.calls: list[int] = []
        self.weight = torch.ones(4, requires_grad=True)

    def __call__(self, prompts):
        self.calls.append(len(prompts))
        return [prompt * self.weight for prompt in prompts]


def cache(refiner, **options):
    return ContextCache(
        refiner,
        lambda prompt: torch.full((len(prompt), 4), float(len(prompt))),
        device=torch.device("cpu"),
        **{"keep": True, **options},
    )


def test_each_prompt_is_refined_once_and_alone():
    refiner = Refiner()
    contexts = cache(refiner)
    first = contexts.get(["a", "bb", "a"])
    again = contexts.get(["bb"])
    assert refiner.calls == [1, 1]
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], again[0])
    assert not first[0].requires_grad


def test_a_small_budget_drops_the_oldest_and_computes_it_again():
    refiner = Refiner()
    contexts = cache(refiner, budget_bytes=3 * 16)
    whole = [context.clone() for context in contexts.get(["a", "bb", "ccc"])]
    again = contexts.get(["a", "bb", "ccc"])
    assert len(refiner.calls) == 6
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))


def test_a_trained_refiner_is_never_cached_and_gets_gradients():
    refiner = Refiner()
    contexts = cache(refiner, keep=False)
    contexts.get(["a", "bb"])[1].sum().backward()
    contexts.get(["a", "bb"])
    assert refiner.calls == [2, 2]
    assert refiner.weight.grad is not None
