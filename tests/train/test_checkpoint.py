"""Checkpoints: complete or absent, chosen and deleted in the right order."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, replace

import pytest
import torch

from simpletuner.adapters import files
from simpletuner.adapters.files import LORA_FILE_NAME, LoraInfo, load_lora, save_lora
from simpletuner.data.records import PlanParts
from simpletuner.events.oserrors import FileSystemError
from simpletuner.i18n import LANGUAGES, render_problem
from simpletuner.problems import ConfigError, Severity
from simpletuner.train import checkpoint as checkpoints
from simpletuner.train.checkpoint import (
    delete_old_checkpoints,
    load_average,
    load_optimizer_state,
    save_checkpoint,
)
from simpletuner.train.resume import Recipe, choose_checkpoint, find_checkpoints, recipe_problems, remove_unfinished

RECIPE = Recipe(
    seed=1,
    plan="plan",
    batch_size=2,
    gradient_accumulation_steps=1,
    world_size=1,
    optimizer="adamw",
    targets=("to_q",),
    rank=4,
    alpha=4.0,
)


def save(folder, step, *, value=1.0, average=None):
    adapter = {
        "layers.0.to_q.lora_A.weight": torch.full((4, 8), value),
        "layers.0.to_q.lora_B.weight": torch.ones(8, 4),
    }
    state = {"state": {0: {"exp_avg": torch.full((4, 8), value)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    info = LoraInfo(rank=4, alpha=4.0)

    def write(building):
        save_lora(building / LORA_FILE_NAME, adapter, info)

    return save_checkpoint(folder, step=step, recipe=RECIPE, write=write, optimizer_state=state, average=average)


def load_adapter(checkpoint):
    return load_lora(checkpoint.path / LORA_FILE_NAME).tensors


def test_what_explains_a_plan_is_saved_and_checkpoints_without_it_are_read(tmp_path):
    path = save(tmp_path, 7).path / "training_state.json"
    state = json.loads(path.read_text())
    state["recipe"]["parts"] = asdict(PARTS)
    path.write_text(json.dumps(state))
    assert choose_checkpoint(tmp_path, "latest").recipe.parts == PARTS
    del state["recipe"]["parts"]
    path.write_text(json.dumps(state))
    assert choose_checkpoint(tmp_path, "latest").recipe == RECIPE


def test_what_was_saved_is_read_back_exactly(tmp_path):
    save(tmp_path, 7, value=torch.pi)
    checkpoint = choose_checkpoint(tmp_path, "latest")
    assert (checkpoint.step, checkpoint.recipe) == (7, RECIPE)
    assert torch.equal(load_adapter(checkpoint)["layers.0.to_q.lora_A.weight"], torch.full((4, 8), torch.pi))
    state = load_optimizer_state(checkpoint)
    assert torch.equal(state["state"][0]["exp_avg"], torch.full((4, 8), torch.pi))
    assert state["param_groups"] == [{"lr": 0.1, "params": [0]}]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 7, value=1.0)
    save(tmp_path, 7, value=2.0)
    (checkpoint,) = find_checkpoints(tmp_path)
    assert load_adapter(checkpoint)["layers.0.to_q.lora_A.weight"].unique().item() == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


@pytest.mark.parametrize("file", [LORA_FILE_NAME, "optimizer.pt", "training_state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_never_chosen(tmp_path, file, damage):
    save(tmp_path, 1)
    broken = save(tmp_path, 2).path / file
    broken.unlink() if damage == "missing" else broken.write_bytes(broken.read_bytes()[:-9])
    assert choose_checkpoint(tmp_path, "latest").step == 1


def test_checkpoints_sort_by_number_and_only_the_newest_stay(tmp_path):
    for step in (2, 10, 9):
        save(tmp_path, step)
    assert [c.step for c in find_checkpoints(tmp_path)] == [2, 9, 10]
    assert [c.step for c in delete_old_checkpoints(tmp_path, keep=0)] == []
    assert [c.step for c in delete_old_checkpoints(tmp_path, keep=2)] == [2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


@pytest.mark.parametrize("fails_at", ["_write", "_flush"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, fails_at):
    save(tmp_path, 3, value=1.0)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files if fails_at == "_write" else checkpoints, fails_at, full)
    with pytest.raises(FileSystemError) as caught:
        save(tmp_path, 3, value=2.0)
    assert caught.value.problems[0].code == "E-DISK-FULL"
    (checkpoint,) = find_checkpoints(tmp_path)
    assert load_adapter(checkpoint)["layers.0.to_q.lora_A.weight"].unique().item() == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_what_a_killed_save_left_is_removed_and_nothing_else(tmp_path):
    save(tmp_path, 3)
    (tmp_path / ".checkpoint-4-abc").mkdir()
    (tmp_path / ".checkpoint-4-abc" / "optimizer.pt").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_checkpoint_is_found_by_word_name_and_path(tmp_path):
    save(tmp_path, 5)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert choose_checkpoint(tmp_path, "checkpoint-5").step == 5
    assert choose_checkpoint(elsewhere, str(tmp_path / "checkpoint-5")).step == 5
    assert choose_checkpoint(tmp_path, "none") is None
    assert choose_checkpoint(tmp_path, "") is None
    assert choose_checkpoint(elsewhere, "latest") is None


@pytest.mark.parametrize(("steps", "code"), [([5], "E-CHECKPOINT-NOT-FOUND"), ([], "E-CHECKPOINT-NONE")])
@pytest.mark.parametrize("language", LANGUAGES)
def test_an_unknown_checkpoint_is_refused_with_what_there_is(tmp_path, steps, code, language):
    for step in steps:
        save(tmp_path, step)
    with pytest.raises(ConfigError) as caught:
        choose_checkpoint(tmp_path, "checkpoint-6")
    (problem,) = caught.value.problems
    assert problem.code == code
    title, hint = render_problem(problem, language)
    assert "checkpoint-6" in title
    assert all(f"checkpoint-{step}" in title for step in steps)
    assert "latest" in hint


def test_other_options_warn_or_refuse(tmp_path):
    checkpoint = save(tmp_path, 5)
    assert recipe_problems(checkpoint, RECIPE) == []
    changed = Recipe(**{**vars(RECIPE), "rank": 8, "batch_size": 3})
    problems = {problem.params["what"]: problem for problem in recipe_problems(checkpoint, changed)}
    assert problems.keys() == {"lora_rank", "train_batch_size"}
    assert (problems["lora_rank"].severity, problems["train_batch_size"].severity) == (Severity.ERROR, Severity.WARNING)
    assert "lora_rank era 4 y ahora es 8" in render_problem(problems["lora_rank"], "es")[0]
    assert "another train_batch_size (2, now 3)" in render_problem(problems["train_batch_size"], "en")[0]


def test_other_noise_levels_warn_by_the_options_name(tmp_path):
    before = {"flow_schedule_shift": 3.0, "flow_custom_timesteps": None, "loss_type": "l2"}
    checkpoint = replace(save(tmp_path, 5), recipe=replace(RECIPE, options=before))
    now = replace(RECIPE, options={**before, "flow_schedule_shift": 1.0, "flow_custom_timesteps": "500", "new": 1})
    problems = recipe_problems(checkpoint, now)
    assert [problem.code for problem in problems] == ["W-CHECKPOINT-DIFFERS"] * 2
    assert "flow_schedule_shift (3.0, now 1.0)" in render_problem(problems[0], "en")[0]
    assert "flow_custom_timesteps (-, ahora 500)" in render_problem(problems[1], "es")[0]
    assert recipe_problems(save(tmp_path, 6), now) == [], "an earlier version did not say"


def test_an_average_is_saved_as_it_goes_on(tmp_path):
    state = {"num_steps": 7, "average": [torch.rand(4, 8), torch.rand(8, 4)]}
    plain = save(tmp_path, 5)
    assert load_average(plain) is None
    averaged = save(tmp_path, 6, average=state)
    found = load_average(averaged)
    assert found["num_steps"] == 7
    assert all(torch.equal(a, b) for a, b in zip(found["average"], state["average"], strict=True))
    assert set(json.loads((averaged.path / "training_state.json").read_text())["files"]) == {
        LORA_FILE_NAME,
        "ema.pt",
        "optimizer.pt",
    }


def test_weights_of_another_kind_are_refused_by_what_they_are(tmp_path):
    (problem,) = recipe_problems(save(tmp_path, 5), replace(RECIPE, adapter='lycoris {"algo": "lokr"}'))
    assert problem.severity is Severity.ERROR
    for language in LANGUAGES:
        said = render_problem(problem, language)[0]
        assert "lora_type" in said and 'lycoris {"algo": "lokr"}' in said


PARTS = PlanParts(num_images=24, images="i", captions="c", crops="g", datasets="d")


@pytest.mark.parametrize(
    ("before", "now", "codes", "words"),
    [
        (PARTS, replace(PARTS, images="x", captions="x", crops="x", num_images=25), ["IMAGES"], ["24", "25"]),
        (PARTS, replace(PARTS, captions="x"), ["CAPTIONS"], []),
        (PARTS, replace(PARTS, crops="x", datasets="x"), ["CROPS", "DATASETS"], []),
        (None, PARTS, ["DATA"], []),  # a checkpoint of an earlier version
    ],
)
def test_other_data_is_told_in_words(tmp_path, before, now, codes, words):
    checkpoint = replace(save(tmp_path, 5), recipe=replace(RECIPE, parts=before))
    problems = recipe_problems(checkpoint, replace(RECIPE, plan="0123abcd", parts=now))
    assert [problem.code for problem in problems] == [f"W-CHECKPOINT-{code}" for code in codes]
    for language in LANGUAGES:
        title = render_problem(problems[0], language)[0]
        assert all(word in title for word in ["checkpoint-5", *words])
        assert "0123abcd" not in title
    assert recipe_problems(checkpoint, replace(RECIPE, parts=now)) == []  # the same plan, whatever explains it


def test_the_state_file_is_plain_json(tmp_path):
    state = json.loads((save(tmp_path, 5).path / "training_state.json").read_text())
    assert state["step"] == 5
    assert set(state["files"]) == {LORA_FILE_NAME, "optimizer.pt"}
