"""What is settled before torch: a session begins at its checkpoint, and mistakes in the data come within a second."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.cli import runs
from simpletuner.config.load import load_run_config
from simpletuner.events import types as t
from simpletuner.events.journal import read
from simpletuner.events.run_directory import RunRecorder
from simpletuner.events.run_status import RunInfo, read_run
from simpletuner.problems import DatasetError, ExitCode
from simpletuner.train.checkpoint import save_checkpoint
from simpletuner.train.resume import Recipe
from simpletuner.train.start import settle_start

RECIPE = Recipe(
    seed=11,
    plan="plan",
    batch_size=1,
    gradient_accumulation_steps=1,
    world_size=1,
    optimizer="adamw",
    targets=("to_q",),
    rank=4,
    alpha=4.0,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """A configuration with one empty folder of images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    datasets = [{"id": "cats", "instance_data_dir": "images", "resolution": 64}]
    (tmp_path / "multidatabackend.json").write_text(json.dumps(datasets))
    options = {"model_flavour": "demo", "output_dir": "output", "max_train_steps": 30, "validation_disable": True}
    (tmp_path / "config.json").write_text(json.dumps(options))
    return tmp_path


def checkpoint(folder: Path, step: int) -> None:
    (folder / "output").mkdir(exist_ok=True)
    save_checkpoint(
        folder / "output",
        step=step,
        recipe=RECIPE,
        write=lambda building: None,
        optimizer_state={},
    )


def settle(folder: Path, *options: str):
    loaded = load_run_config(options, environ={}, cwd=folder)
    with RunRecorder.start("output", info=RunInfo(version="1", argv=()), effective_config="{}") as run:
        return settle_start(loaded, run=run)


@pytest.mark.parametrize(("language", "step"), [("en", "step 12"), ("es", "paso 12")])
def test_a_restart_that_fails_early_is_shown_at_its_checkpoint(folder, capsys, language, step):
    checkpoint(folder, 12)
    with pytest.raises(DatasetError):
        settle(folder)
    status = read_run(folder / "output")
    assert (status.state, status.snapshot.progress.step) == ("failed", 12)
    runs.run(["list"], language)
    assert capsys.readouterr().out.splitlines()[1].split()[3] == "12"
    runs.run(["show"], language)
    assert step in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("en", "Stopped before the next step. The same command goes on from checkpoint-12."),
        ("es", "Detenido antes del paso siguiente. El mismo comando sigue desde checkpoint-12."),
    ],
)
def test_a_restart_that_is_stopped_early_says_where_it_goes_on(folder, capsys, language, words):
    checkpoint(folder, 12)
    Image.new("RGB", (64, 64)).save(folder / "images" / "cat.png")
    loaded = load_run_config([], environ={}, cwd=folder)
    info = RunInfo(version="1", argv=())
    with suppress(KeyboardInterrupt), RunRecorder.start("output", info=info, effective_config="{}") as run:
        settle_start(loaded, run=run)
        raise KeyboardInterrupt
    runs.run(["logs"], language)
    assert words in capsys.readouterr().out
    assert read_run(folder / "output").snapshot.ending.exit_code == ExitCode.INTERRUPTED


def test_a_start_afresh_begins_before_the_first_step(folder):
    checkpoint(folder, 12)
    with pytest.raises(DatasetError):
        settle(folder, "--resume_from_checkpoint=none")
    assert read_run(folder / "output").snapshot.progress.step == 0
    assert not [r for r in read(folder / "output" / "events.jsonl") if isinstance(r.event, t.RunResumed)]


def test_a_checkpoint_brings_its_seed_where_none_is_given(folder):
    checkpoint(folder, 12)
    Image.new("RGB", (64, 64)).save(folder / "images" / "cat.png")
    start = settle(folder, "--seed=-1")
    assert (start.config.run.seed, start.checkpoint.step, start.total_steps) == (11, 12, 30)


def test_a_mistake_in_the_data_is_told_without_loading_torch(folder):
    code = (
        "import sys\nfrom simpletuner.cli.main import main\n"
        "status = main(['train'])\nassert 'torch' not in sys.modules\nsys.exit(status)"
    )
    begun = time.monotonic()
    environment = {**os.environ, "SIMPLETUNER_LANG": "en", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == ExitCode.DATASET, done.stderr
    assert "no images detected in dataset" in done.stderr
    assert time.monotonic() - begun < 10  # a second, on a machine with nothing else to do


def with_entries(folder: Path, *entries: dict[str, object], **cats: object) -> None:
    """Other entries, and other keys for the first one."""
    path = folder / "multidatabackend.json"
    first, *_ = json.loads(path.read_text())
    path.write_text(json.dumps([{**first, **cats}, *entries]))


MASKS = {"id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "masks"}
HELD_OUT = {"id": "held-out", "dataset_type": "eval", "instance_data_dir": "held", "resolution": 64}


@pytest.fixture
def pictures(folder) -> Path:
    """Three images, their masks, and six held-out ones."""
    for name, count in (("images", 3), ("masks", 6), ("held", 6)):
        (folder / name).mkdir(exist_ok=True)
        for number in range(count):
            Image.new("L", (64, 64), 255).save(folder / name / f"cat {number}.png")
    return folder


def test_held_out_images_are_no_part_of_what_is_trained(pictures):
    plain = settle(pictures)
    with_entries(pictures, HELD_OUT, MASKS, conditioning_data="masks")
    start = settle(pictures, "--num_eval_images=4")
    assert start.plan.fingerprint == plain.plan.fingerprint
    assert (start.total_steps, start.sampler.batches_per_epoch) == (plain.total_steps, plain.sampler.batches_per_epoch)
    assert [(one.name, len(one.samples)) for one in start.data.held_out.sets] == [("held-out", 4)]
    assert start.data.masks.keys() == {"cats"}
    assert not plain.data.held_out.sets
    assert not plain.data.masks


@pytest.mark.parametrize(
    ("options", "sets"),
    [
        ([], {"held-out": 4, "more": 4}),
        (["--eval_dataset_pooling"], {"pool": 4}),
        (["--eval_dataset_id=more", "--num_eval_images=2"], {"more": 2}),
        (["--eval_loss_disable"], {}),
    ],
)
def test_options_say_which_images_are_measured(pictures, options, sets):
    with_entries(pictures, HELD_OUT, {**HELD_OUT, "id": "more"})
    held_out = settle(pictures, *options).data.held_out
    assert {one.name: len(one.samples) for one in held_out.sets} == sets


def test_held_out_images_may_have_masks_of_their_own(pictures):
    with_entries(pictures, {**HELD_OUT, "conditioning_data": "masks"}, MASKS)
    start = settle(pictures, "--num_eval_images=6")
    assert set(start.data.masks["held-out"].by_image) == {f"cat {number}.png" for number in range(6)}


def test_mistakes_of_images_and_held_out_images_are_told_together(pictures):
    with_entries(pictures, {**HELD_OUT, "caption_strategy": "textfile"}, caption_strategy="textfile")
    with pytest.raises(DatasetError) as caught:
        settle(pictures)
    assert [(problem.code, problem.params["id"]) for problem in caught.value.problems] == [
        ("E-CAPTION-MISSING", "cats"),
        ("E-CAPTION-MISSING", "held-out"),
    ]


def test_a_missing_mask_ends_the_start(pictures):
    (pictures / "masks/cat 1.png").unlink()
    with_entries(pictures, MASKS, conditioning_data="masks")
    with pytest.raises(DatasetError) as caught:
        settle(pictures)
    (problem,) = caught.value.problems
    assert (problem.code, problem.params["files"]) == ("E-MASK-MISSING", "cat 1.png")


def write_images(folder: Path, sizes: dict[str, tuple[int, int]]) -> None:
    for name, size in sizes.items():
        Image.new("RGB", size).save(folder / "images" / f"{name}.png")


def change_dataset(folder: Path, **options: object) -> None:
    (entry,) = json.loads((folder / "multidatabackend.json").read_text())
    (folder / "multidatabackend.json").write_text(json.dumps([{**entry, **options}]))


def planned(folder: Path) -> t.DatasetPlanned:
    events = [record.event for record in read(folder / "output" / "events.jsonl")]
    return [event for event in events if isinstance(event, t.DatasetPlanned)][-1]


FEW = {"a": (64, 64), "b": (64, 64), "tall": (64, 128)}
TWO = "--train_batch_size=2"


def test_short_buckets_end_a_run_unless_it_says_what_becomes_of_them(folder):
    write_images(folder, FEW)
    with pytest.raises(DatasetError):
        settle(folder, TWO)
    start = settle(folder, TWO, "--allow_dataset_oversubscription=true")
    assert start.sampler.batches_per_epoch == 2
    assert [bucket.num_samples for bucket in planned(folder).filled] == [1]
    change_dataset(folder, repeats=0)  # what is written is kept
    with pytest.raises(DatasetError) as caught:
        settle(folder, TWO, "--allow_dataset_oversubscription=true")
    assert caught.value.problems[0].params["minimum_repeats"] == 1


def test_short_buckets_are_left_out_where_small_images_are(folder):
    write_images(folder, FEW)
    change_dataset(folder, minimum_image_size=32)
    start = settle(folder, TWO)
    assert [bucket.num_samples for bucket in planned(folder).pruned] == [1]
    assert start.plan.datasets[0].num_images == 2
    with pytest.raises(DatasetError):
        settle(folder, TWO, "--disable_bucket_pruning=true")


def test_packed_batches_need_no_full_buckets(folder):
    write_images(folder, FEW)
    start = settle(folder, TWO, "--batch_mixing=packed", "--gradient_accumulation_steps=2")
    assert start.sampler.batches_per_epoch == 2
    assert planned(folder).batch_mixing == "packed"


def test_the_length_of_a_run_follows_the_schedules_of_its_datasets(folder):
    write_images(folder, {str(number): (64, 64) for number in range(6)})
    entry = json.loads((folder / "multidatabackend.json").read_text())[0]
    later = {**entry, "id": "later", "start_epoch": 2, "repeats": 1}
    filters = {"id": "texts", "dataset_type": "text_embeds", "caption_filter_list": ["s/3/three/"]}
    (folder / "multidatabackend.json").write_text(json.dumps([entry, later, filters]))
    start = settle(folder, "--max_train_steps=0", "--num_train_epochs=3")
    assert start.total_steps == 6 + 2 * (6 + 12)
    assert [start.sampler.epoch_of(index) for index in (0, 5, 6, 23, 24)] == [0, 0, 1, 1, 2]
    assert "three" in start.plan.prompts()
