"""The cache of prompt embeddings: each text once, bit for bit, never another encoder's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.data.prompts import PromptSource, PromptStore, cache_prompts
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import DatasetError, SimpletunerError

Told = Callable[[SimpletunerError], list[str]]
PROMPTS = ["a cat", "", "a dog", "a cat", "ñandú 猫", "x" * 300]


def cache(prompts: list[str], encoder: Any, directory: Path, **options: Any) -> PromptStore:
    settings = {"batch_size": 2, "on_progress": lambda done, total: None, **options}
    return cache_prompts(prompts, PromptSource(id=encoder.id, open=encoder.open), directory=directory, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_come_back_unpadded_in_their_own_precision(
    tmp_path: Path, text_encoder: Any, dtype: torch.dtype
) -> None:
    encoder = replace(text_encoder, dtype=dtype)
    store = cache(PROMPTS, encoder, tmp_path)
    for prompt in PROMPTS:
        (expected,) = encoder.encode([prompt])
        got = store.get(prompt)
        assert got.dtype == dtype
        assert torch.equal(got, expected)


def test_a_text_is_encoded_once_and_a_warm_run_loads_nothing(tmp_path: Path, text_encoder: Any) -> None:
    cold_progress: list[tuple[int, int]] = []
    cache(PROMPTS, text_encoder, tmp_path, on_progress=lambda done, total: cold_progress.append((done, total)))
    assert sorted(prompt for batch in text_encoder.batches for prompt in batch) == sorted(set(PROMPTS))
    assert cold_progress == [(0, 5), (2, 5), (4, 5), (5, 5)]
    warm_progress: list[tuple[int, int]] = []
    cache(PROMPTS[::-1], text_encoder, tmp_path, on_progress=lambda done, total: warm_progress.append((done, total)))
    assert warm_progress == [(5, 5)]
    assert text_encoder.opened == 1


def test_a_new_text_or_encoder_is_never_served_stale(tmp_path: Path, text_encoder: Any) -> None:
    cache(["a", "b"], text_encoder, tmp_path)
    store = cache(["a", "b", "c"], text_encoder, tmp_path)
    assert torch.equal(store.get("c"), text_encoder.encode(["c"])[0])
    other = replace(text_encoder, id="letters 2", dtype=torch.float32, opened=0)
    assert cache(["a", "b"], other, tmp_path).get("a").dtype == torch.float32
    assert other.opened == 1
    assert store.get("a").dtype == torch.bfloat16


def test_who_shares_a_call_does_not_depend_on_what_is_missing(tmp_path: Path, text_encoder: Any) -> None:
    prompts = [f"prompt {number}" for number in range(8)]
    cache(prompts, text_encoder, tmp_path / "straight", batch_size=3)
    straight = list(text_encoder.batches)
    text_encoder.batches.clear()
    cache(prompts[3:5], text_encoder, tmp_path / "partly")
    text_encoder.batches.clear()
    cache(prompts, text_encoder, tmp_path / "partly", batch_size=3)
    assert text_encoder.batches == straight


def test_a_prompt_that_was_not_cached_is_a_key_error(tmp_path: Path, text_encoder: Any) -> None:
    with pytest.raises(KeyError):
        cache(["a"], text_encoder, tmp_path).get("b")


def test_an_embedding_that_is_not_finite_is_told(tmp_path: Path, text_encoder: Any, told: Told) -> None:
    encoder = replace(text_encoder)
    encoder.encode = lambda prompts: [torch.full((2, 4), float("nan")) for _ in prompts]
    with pytest.raises(DatasetError) as caught:
        cache(["a cat"], encoder, tmp_path)
    assert told(caught.value) == ["E-PROMPT-NOT-FINITE"]
    for language in LANGUAGES:
        assert '"a cat"' in render_problem(caught.value.problems[0], language)[0]
