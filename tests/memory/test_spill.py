"""Weights on disk come back as they were, and nothing that is not whole is taken for them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from simpletuner.events.oserrors import FileSystemError
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.memory.groups import ALIGNMENT
from simpletuner.memory.spill import SpillStore, is_spilled
from simpletuner.memory.store import RamStore, lay_out

ROOT = Path(__file__).parents[2]
COUNT = 6


def group_names(count: int = COUNT) -> list[list[str]]:
    return [[f"layers.{group}.a", f"layers.{group}.b"] for group in range(count)]


def tensors(group: int) -> dict[str, dict[str, torch.Tensor]]:
    """Every kind of part that a weight format has, in odd sizes."""
    generator = torch.Generator().manual_seed(group)
    numbers = torch.randn(7, 13, generator=generator)
    return {
        f"layers.{group}.a": {"values": numbers.bfloat16(), "offset": numbers[0, 0].clone()},
        f"layers.{group}.b": {
            "codes": (numbers * 50).to(torch.int8),
            "packed": (numbers * 50).abs().to(torch.uint8),
            "floats": numbers.to(torch.float8_e4m3fn),
            "scale": numbers[:, 0].clone(),
        },
    }


def spill(folder: Path, key: str = "key", count: int = COUNT) -> SpillStore:
    store = SpillStore(folder, key, group_names(count))
    if not store.is_ready:
        for group in range(count):
            store.put(group, tensors(group))
        store.finish()
    return store


def assert_holds(store, count: int = COUNT) -> None:
    for group in range(count):
        layout = store.layout(group)
        block = torch.full((layout.size_bytes,), 0xFF, dtype=torch.uint8)
        store.read(group, block)
        views = layout.views(block)
        for layer, parts in tensors(group).items():
            for name, tensor in parts.items():
                found = views[layer][name]
                assert found.dtype == tensor.dtype and found.shape == tensor.shape
                assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
                assert found.data_ptr() % 16 == block.data_ptr() % 16


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_part_is_aligned():
    layout = lay_out(tensors(0))
    parts = [part for layer in layout.layers.values() for part in layer.values()]
    assert all(part.start % ALIGNMENT == 0 for part in parts) and layout.size_bytes % ALIGNMENT == 0
    ends = [part.start + part.size_bytes for part in parts]
    assert all(end <= part.start for end, part in zip(ends, parts[1:], strict=False))


def test_both_stores_hold_what_was_put(tmp_path):
    ram = RamStore(COUNT, pinned=False)
    for group in reversed(range(COUNT)):  # in whatever order they come
        ram.put(group, tensors(group))
    ram.finish()
    assert_holds(ram)
    assert_holds(spill(tmp_path))


def test_a_later_run_reads_what_is_there(tmp_path):
    spill(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = spill(tmp_path)
    assert again.is_ready and is_spilled(tmp_path, "key", group_names())
    assert_holds(again)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert not is_spilled(tmp_path, "other", group_names())


@pytest.mark.parametrize(
    "change", ["short", "missing", "long", "index gone", "index cut", "version", "groups", "layer"]
)
def test_what_is_not_whole_is_made_anew(tmp_path, change):
    path = spill(tmp_path).path
    index, block = path / "index.json", path / "group-0002.bin"
    if change == "short":
        block.write_bytes(block.read_bytes()[:-1])
    elif change == "long":
        block.write_bytes(block.read_bytes() + b"x")
    elif change == "missing":
        block.unlink()
    elif change == "index gone":
        index.unlink()
    elif change == "index cut":
        index.write_text(index.read_text()[:-20])
    else:
        content = json.loads(index.read_text())
        if change == "version":
            content["version"] += 1
        elif change == "groups":
            content["groups"].pop()
        else:
            layers = content["groups"][0]["layers"]
            layers["other"] = layers.pop("layers.0.a")
        index.write_text(json.dumps(content))
    assert not is_spilled(tmp_path, "key", group_names())
    again = SpillStore(tmp_path, "key", group_names())
    assert not again.is_ready
    again = spill(tmp_path)
    assert_holds(again)


def test_bytes_that_have_changed_are_noticed_when_they_are_read(tmp_path):
    path = spill(tmp_path).path / "group-0003.bin"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileSystemError) as caught:
        assert_holds(spill(tmp_path))
    (problem,) = caught.value.problems
    assert problem.code == "E-SPILL-DAMAGED"
    for language in LANGUAGES:
        title, hint = render_problem(problem, language)
        assert str(path.parent) in title and hint


def test_a_full_disk_leaves_nothing_that_a_later_run_would_trust(tmp_path, monkeypatch):
    store = SpillStore(tmp_path, "key", group_names())
    store.put(0, tensors(0))
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(FileSystemError) as caught:
            store.put(1, tensors(1))
    assert [problem.code for problem in caught.value.problems] == ["E-DISK-FULL"]
    assert not is_spilled(tmp_path, "key", group_names())
    assert_holds(spill(tmp_path))


def test_two_runs_at_once_end_with_one_spill(tmp_path):
    stores = [SpillStore(tmp_path, "key", group_names()) for _ in range(2)]
    for group in range(COUNT):
        for store in stores:
            store.put(group, tensors(group))
    for store in stores:
        store.finish()
        assert_holds(store)
    assert files(tmp_path) == ["key"]


@pytest.mark.slow(seconds=32)
def test_killed_at_any_moment_it_leaves_nothing_half_written_that_is_trusted(tmp_path):
    """Twenty kills; after each the folder has no spill or a whole one, and the next run clears up and goes on."""
    count, rng = 12, random.Random(0)
    outcomes = set()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(20):
        arguments = [sys.executable, "-m", "tests.memory.spill_and_die", str(tmp_path), "key", str(count)]
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for line in process.stdout:  # it spills, or has found a whole spill
            if line.strip() == "0" or line.strip() == "done":
                break
        time.sleep(rng.uniform(0, 0.45))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        whole = is_spilled(tmp_path, "key", group_names(count))
        outcomes.add(whole)
        assert whole == (tmp_path / "key").exists()
        if whole:
            store = SpillStore(tmp_path, "key", group_names(count))
            assert_holds(store, count)
            for path in (tmp_path / "key").iterdir():
                path.unlink()
            (tmp_path / "key").rmdir()
    assert outcomes == {True, False}, "kills fell before and after the end"
    assert_holds(spill(tmp_path, count=count), count)
    assert files(tmp_path) == ["key"], "what dead runs had begun is gone"
