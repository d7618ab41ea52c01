"""The cache of prompt embeddings: each text once, bit for bit, never another encoder's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.data.prompts import PromptGroup, PromptSource, PromptStore, cache_prompts
from simpletuner.data.store import TensorStore
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import DatasetError, SimpletunerError

Told = Callable[[SimpletunerError], list[str]]
PROMPTS = ["a cat", "", "a dog", "a cat", "ñandú 猫", "x" * 300]


def cache_groups(groups: list[PromptGroup], encoder: Any, on_progress: Any = lambda done, total: None) -> PromptStore:
    return cache_prompts(groups, PromptSource(id=encoder.id, open=encoder.open), on_progress=on_progress)


def cache(
    prompts: list[str], encoder: Any, directory: Path | None, *, batch_size: int = 2, **options: Any
) -> PromptStore:
    return cache_groups([PromptGroup(prompts=prompts, directory=directory, batch_size=batch_size)], encoder, **options)


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


def test_embeddings_in_memory_are_those_of_the_disk_and_leave_nothing(tmp_path: Path, text_encoder: Any) -> None:
    kept = cache(PROMPTS, text_encoder, tmp_path / "kept")
    calls = list(text_encoder.batches)
    text_encoder.batches.clear()
    (tmp_path / "here").mkdir()
    passing = cache(PROMPTS, text_encoder, None)
    assert text_encoder.batches == calls
    for prompt in PROMPTS:
        got = passing.get(prompt)
        assert torch.equal(got, kept.get(prompt))
        got.zero_()
        assert torch.equal(passing.get(prompt), kept.get(prompt)), "what is handed out is a copy"
    text_encoder.batches.clear()
    cache(PROMPTS, text_encoder, None)
    assert text_encoder.batches == calls, "every start encodes anew"


def test_groups_have_a_cache_and_calls_of_their_own(tmp_path: Path, text_encoder: Any) -> None:
    one, two = (tmp_path / name for name in ("one", "two"))
    groups = [
        PromptGroup(prompts=["a", "b", "c"], directory=one, batch_size=2),
        PromptGroup(prompts=["b", "dd"], directory=two, batch_size=1, write_batch_size=1),
    ]
    progress: list[tuple[int, int]] = []
    store = cache_groups(groups, text_encoder, on_progress=lambda done, total: progress.append((done, total)))
    assert text_encoder.batches == [("a", "b"), ("c",), ("b",), ("dd",)]
    assert text_encoder.opened == 1
    assert (progress[0], progress[-1]) == ((0, 5), (5, 5))
    assert (len(TensorStore(one)), len(TensorStore(two))) == (3, 2)
    assert len(list(two.glob("*.safetensors"))) == 2
    for prompt in ("a", "b", "c", "dd"):
        assert torch.equal(store.get(prompt), text_encoder.encode([prompt])[0])


def test_another_group_changes_nothing_of_the_first(tmp_path: Path, text_encoder: Any) -> None:
    """So held-out images do not change, by whom a caption shares a call with, what a run learns from."""
    first = PromptGroup(prompts=["a", "bb"], directory=tmp_path, batch_size=4)
    cache_groups([first, PromptGroup(prompts=["c", "bb"], directory=tmp_path, batch_size=4)], text_encoder)
    assert text_encoder.batches == [("a", "bb"), ("c", "bb")]
    assert len(TensorStore(tmp_path)) == 3
    text_encoder.batches.clear()
    cache_groups([first], text_encoder)
    assert text_encoder.batches == []
