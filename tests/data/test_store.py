"""The tensor store gives back what was put, or nothing."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.data.store import TensorStore
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import DatasetError, ExitCode, SimpletunerError

Told = Callable[[SimpletunerError], list[str]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(count: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"key{seed}-{i}": torch.randn(3, 4, i + 1, generator=generator).to(dtype) for i in range(count)}


def fill(directory: Path, entries: dict[str, Tensor], **options: int) -> TensorStore:
    store = TensorStore(directory)
    with store.writer(**options) as writer:
        for key, tensor in entries.items():
            writer.put(key, tensor)
    return store


def holds(store: TensorStore, entries: dict[str, Tensor]) -> bool:
    return all(
        key in store and store.get(key).dtype == tensor.dtype and torch.equal(store.get(key), tensor)
        for key, tensor in entries.items()
    )


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_put_is_got_bit_for_bit_now_and_later(tmp_path: Path, dtype: torch.dtype) -> None:
    entries = tensors(5, dtype=dtype) | {
        "scalar": torch.tensor(1.5, dtype=dtype),
        "empty": torch.empty(0, 7, dtype=dtype),
        "special": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]).to(dtype),
        "strided": torch.arange(12.0).reshape(3, 4).t().to(dtype),
    }
    for store in (fill(tmp_path, entries), TensorStore(tmp_path)):
        assert len(store) == len(entries)
        for key, tensor in entries.items():
            got = store.get(key)
            assert got.dtype == tensor.dtype
            assert got.shape == tensor.shape
            assert torch.equal(got.view(torch.uint8) if got.dim() else got, _bytes_like(tensor, got))
    assert not store.contains("other")
    with pytest.raises(KeyError):
        store.get("other")


def _bytes_like(tensor: Tensor, got: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if got.dim() else tensor


def test_what_is_got_may_be_written_to(tmp_path: Path) -> None:
    store = fill(tmp_path, {"a": torch.ones(3)})
    store.get("a").zero_()
    assert torch.equal(store.get("a"), torch.ones(3))


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    entries = tensors(4, dtype=torch.bfloat16)
    fill(tmp_path, entries)
    (shard,) = shards(tmp_path)
    loaded = load_file(shard)
    assert loaded.keys() == entries.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in entries.items())


def test_groups_close_when_full_or_old(tmp_path: Path) -> None:
    fill(tmp_path / "entries", tensors(10), group_entries=4)
    assert len(shards(tmp_path / "entries")) == 3
    fill(tmp_path / "bytes", {str(i): torch.zeros(256) for i in range(6)}, group_bytes=2048)
    assert len(shards(tmp_path / "bytes")) == 3
    fill(tmp_path / "age", tensors(3), group_s=0)
    assert len(shards(tmp_path / "age")) == 3


def test_an_entry_is_readable_as_soon_as_its_group_is_written(tmp_path: Path) -> None:
    store = TensorStore(tmp_path)
    with store.writer(group_entries=2) as writer:
        writer.put("a", torch.ones(2))
        assert "a" not in store
        writer.put("b", torch.ones(2))
        assert "a" in store
        assert "a" in TensorStore(tmp_path)


def test_an_entry_never_changes(tmp_path: Path) -> None:
    fill(tmp_path, {"a": torch.ones(2)})
    fill(tmp_path, {"a": torch.zeros(2)})
    assert torch.equal(TensorStore(tmp_path).get("a"), torch.ones(2))
    assert len(shards(tmp_path)) == 1


def test_finished_work_is_kept_when_the_block_fails(tmp_path: Path) -> None:
    def interrupted() -> None:
        with TensorStore(tmp_path).writer() as writer:
            writer.put("a", torch.ones(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "a" in TensorStore(tmp_path)


@settings(max_examples=30)
@given(st.data())
def test_no_part_of_a_file_is_trusted(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """What a killed writer or a bad disk can leave: a prefix, or a file with a changed byte."""
    directory = tmp_path_factory.mktemp("store")
    entries = tensors(3)
    fill(directory, entries)
    (shard,) = shards(directory)
    whole = shard.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        shard.write_bytes(whole[:at])
    else:
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    store = TensorStore(directory)
    store.discard_damaged(entries)
    assert all(torch.equal(store.get(key), entries[key]) for key in entries if key in store)
    assert holds(fill(directory, entries), entries)
    assert holds(TensorStore(directory), entries)


def test_one_damaged_file_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    entries = tensors(6)
    fill(tmp_path, entries, group_entries=2)
    victim = shards(tmp_path)[1]
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x99")
    store = TensorStore(tmp_path)
    assert store.discard_damaged(entries) == 2
    assert sum(key in store for key in entries) == 4
    assert not victim.exists()


def test_damage_during_the_run_is_told(tmp_path: Path, told: Told) -> None:
    store = fill(tmp_path, {"a": torch.ones(2)})
    (shard,) = shards(tmp_path)
    shard.unlink()
    with pytest.raises(DatasetError) as caught:
        store.get("a")
    assert told(caught.value) == ["E-CACHE-DAMAGED"]
    for language in LANGUAGES:
        assert str(shard) in render_problem(caught.value.problems[0], language)[0]


def test_foreign_and_temporary_files_are_ignored_and_old_leftovers_removed(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("mine")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    young, old = tmp_path / "young.tmp", tmp_path / "old.tmp"
    young.write_bytes(b"x")
    old.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    store = fill(tmp_path, {"a": torch.ones(2)})
    assert len(store) == len(TensorStore(tmp_path)) == 1
    assert young.exists()
    assert not old.exists()
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_is_one_problem_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told, code: int
) -> None:
    fill(tmp_path, {"before": torch.ones(2)})

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SimpletunerError) as caught:
            fill(tmp_path, {"after": torch.ones(2)})
    assert told(caught.value) == ["E-CACHE-DISK-FULL"]
    assert caught.value.exit_code is ExitCode.ENVIRONMENT
    for language in LANGUAGES:
        assert str(tmp_path) in render_problem(caught.value.problems[0], language)[0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    store = fill(tmp_path, {"after": torch.ones(2)})
    assert "before" in store
    assert "after" in store


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path, told: Told) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError) as caught, TensorStore(tmp_path / "file" / "cache").writer():
        pass
    assert told(caught.value) == ["E-CACHE-NOT-WRITABLE"]


def test_several_runs_may_fill_one_directory_at_once(tmp_path: Path) -> None:
    shared, own = tensors(20, seed=0), [tensors(20, seed=seed) for seed in (1, 2, 3)]
    threads = [
        threading.Thread(target=fill, args=(tmp_path, shared | entries), kwargs={"group_entries": 3}) for entries in own
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = TensorStore(tmp_path)
    assert len(store) == 80
    assert all(holds(store, entries) for entries in [shared, *own])
