"""The run directory: true states, one writer, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from simpletuner.events import control
from simpletuner.events import types as t
from simpletuner.events.begin import RunIsLiveError
from simpletuner.events.files import exclusive_lock, write_atomic
from simpletuner.events.journal import Record, read
from simpletuner.events.oserrors import FileSystemError
from simpletuner.events.paths import RunDirectory
from simpletuner.events.run_directory import RunRecorder
from simpletuner.events.run_status import (
    HEARTBEAT_TIMEOUT_S,
    RunInfo,
    RunNotFoundError,
    derive_state,
    read_run,
    snapshot_to_text,
)
from simpletuner.problems import DatasetError, ExitCode, Problem

INFO = RunInfo(version="1.2.3", argv=("simpletuner", "train"), versions={"torch": "2.13"})


def start(path: Path, **options) -> RunRecorder:
    return RunRecorder.start(path, info=INFO, effective_config='{"lora_rank": 16}\n', **options)


def names(path: Path) -> list[str]:
    return [record.event.name for record in read(RunDirectory(path).events_jsonl)]


class Remember:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.closed = 0

    def write(self, record: Record) -> None:
        self.records.append(record)

    def tick(self) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


class Broken(Remember):
    def write(self, record: Record) -> None:
        raise RuntimeError("no terminal")


def test_a_run_from_start_to_end(tmp_path):
    path, sink = tmp_path / "new" / "run", Remember()
    with start(path, sinks=[sink]) as run:
        assert read_run(path).state == "starting"
        with run.phase("latents", total=3, unit="images") as phase:
            for _ in range(3):
                phase.advance()
        run.emit(step_event(1, 2))
        assert read_run(path).state == "running"
        run.emit(step_event(2, 2))
        run.finish(output="weights.safetensors")
    status = read_run(path)
    assert status.state == "done"
    assert status.snapshot.info == INFO
    assert status.snapshot.progress.step == status.snapshot.progress.total_steps == 2
    assert (status.snapshot.ending.exit_code, status.snapshot.ending.output) == (0, "weights.safetensors")
    expected = ["run.started", "run.phase", "run.phase", "step.finished", "step.finished", "run.finished"]
    assert names(path) == expected
    assert sink.records == list(read(RunDirectory(path).events_jsonl))
    assert sink.closed == 1
    assert json.loads((path / "config.json").read_text()) == {"lora_rank": 16}
    files = {"run.json", "config.json", "events.jsonl", "log.txt", "heartbeat", "control"}
    assert {entry.name for entry in path.iterdir()} == files


def test_the_log_has_a_dated_line_for_what_people_want_to_know(tmp_path):
    with start(tmp_path) as run:
        run.emit(t.CheckpointSaved(step=5, path="checkpoint-5", bytes=162_000_000, seconds=0.1))
        run.log("a library says this", level="warning", source="torch")
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line[21:] for line in lines] == [
        f"INFO    SimpleTuner 1.2.3 · run {tmp_path.name}",
        "INFO    checkpoint 5: checkpoint-5 (162 MB)",
        "WARNING torch: a library says this",
        lines[3][21:],
    ]
    assert lines[3][21:].startswith("INFO    Done: step 0, ")


def test_phases_tell_the_start_the_end_and_at_most_two_in_a_second(tmp_path):
    with start(tmp_path) as run, run.phase("scan", total=10_000) as phase:
        for _ in range(10_000):
            phase.advance(detail="x.png")
    phases = [record.event for record in read(tmp_path / "events.jsonl") if isinstance(record.event, t.RunPhase)]
    assert (phases[0].done, phases[0].finished) == (0, False)
    assert (phases[-1].done, phases[-1].finished, phases[-1].detail) == (10_000, True, None)
    assert len(phases) <= 2 + phases[-1].elapsed_s / 0.5


def test_frequent_cache_progress_is_thinned_out_but_ends_complete(tmp_path):
    with start(tmp_path) as run:
        for done in range(1, 1001):
            run.emit(t.CacheProgress(dataset="a", cache="latents", done=done, total=1000))
    seen = [r.event.done for r in read(tmp_path / "events.jsonl") if isinstance(r.event, t.CacheProgress)]
    assert seen[0] == 1
    assert seen[-1] == 1000
    assert len(seen) < 20


@pytest.mark.parametrize(
    ("error", "state", "exit_code", "reason"),
    [
        (DatasetError(Problem(code="E-NO-IMAGES")), "failed", ExitCode.DATASET, "E-NO-IMAGES"),
        (ZeroDivisionError("by zero"), "failed", ExitCode.FAILED, "E-UNEXPECTED"),
        (KeyboardInterrupt(), "stopped", ExitCode.INTERRUPTED, "interrupted"),
    ],
)
def test_an_exception_is_the_ending_and_goes_on(tmp_path, error, state, exit_code, reason):
    with pytest.raises(type(error)), start(tmp_path):
        raise error
    ending = read_run(tmp_path).snapshot.ending
    assert (ending.state, ending.exit_code, ending.reason) == (state, exit_code, reason)
    assert names(tmp_path)[-1] == "run.finished"


def test_a_crash_leaves_its_traceback_in_the_log_and_a_problem_in_the_journal(tmp_path):
    with pytest.raises(ZeroDivisionError), start(tmp_path):
        raise ZeroDivisionError("by zero")
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback (most recent call last)" in log
    assert "An unexpected error: ZeroDivisionError: by zero" in log
    reported = [r.event for r in read(tmp_path / "events.jsonl") if isinstance(r.event, t.ProblemReported)]
    assert [event.problem.code for event in reported] == ["E-UNEXPECTED"]


def test_nothing_is_recorded_after_the_end(tmp_path):
    with start(tmp_path) as run:
        run.finish(state="stopped", exit_code=ExitCode.STOPPED)
        run.emit(step_event(1, 2))
        run.finish()
    assert names(tmp_path) == ["run.started", "run.finished"]
    assert read_run(tmp_path).state == "stopped"


def test_a_sink_that_fails_is_left_out_and_the_run_goes_on(tmp_path):
    sink = Remember()
    with start(tmp_path, sinks=[Broken(), sink]) as run:
        run.emit(step_event(1, 1))
    assert [record.event.name for record in sink.records].count("step.finished") == 1
    notes = [r.event for r in read(tmp_path / "events.jsonl") if isinstance(r.event, t.LogLine)]
    assert [note.message for note in notes] == ["Broken failed and is off now: RuntimeError('no terminal')"]


def test_a_killed_run_is_lost_and_the_next_session_goes_on(children, tmp_path):
    process = children.start(tmp_path)
    before = read_run(tmp_path)
    assert before.is_live
    process.kill()
    process.wait()
    assert read_run(tmp_path).state == "lost"
    last = list(read(tmp_path / "events.jsonl"))[-1].seq
    with start(tmp_path) as run:
        after = read_run(tmp_path).snapshot
        assert (run.run_id, after.session, after.created) == (before.snapshot.id, 2, before.snapshot.created)
    assert [r.seq for r in read(tmp_path / "events.jsonl")] == list(range(1, last + 3))


def test_a_directory_with_a_live_run_is_refused_and_untouched(children, tmp_path):
    process = children.start(tmp_path, "mode=load")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(RunIsLiveError) as caught:
        start(tmp_path)
    assert caught.value.problems[0].code == "E-RUN-LIVE"
    assert caught.value.problems[0].params["pid"] == process.pid
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_of_several_that_start_at_once_only_one_gets_the_directory(children, tmp_path):
    path = tmp_path / "run"
    processes = [children.start(path, "step=0.5", wait=False) for _ in range(3)]
    end = time.monotonic() + 60
    while sum(process.poll() is None for process in processes) > 1:
        assert time.monotonic() < end
        time.sleep(0.05)
    refused = [process.communicate()[1].split()[-1] for process in processes if process.poll() is not None]
    assert len(refused) == 2
    assert set(refused) <= {"E-RUN-LIVE", "E-RUN-STARTING"}
    assert names(path).count("run.started") == 1


def test_a_start_that_is_under_way_elsewhere_is_waited_for(tmp_path):
    with exclusive_lock(tmp_path / "heartbeat") as mine:
        assert mine
        with exclusive_lock(tmp_path / "heartbeat") as second:
            assert not second
        with pytest.raises(RunIsLiveError) as caught:
            start(tmp_path)
    assert caught.value.problems[0].code == "E-RUN-STARTING"


def test_commands_are_answered_by_what_happens(children, tmp_path):
    process = children.start(tmp_path)
    ids = {kind: control.send(tmp_path, kind) for kind in ("checkpoint", "validate")}
    answers = {kind: control.wait_for_answer(tmp_path, ids[kind], timeout_s=20) for kind in ids}
    assert (answers["checkpoint"].message, answers["validate"].message) == ("saved", "validated")
    assert answers["checkpoint"].path == f"checkpoint-{answers['checkpoint'].step}"
    stopped = control.wait_for_answer(tmp_path, control.send(tmp_path, "stop"), timeout_s=20)
    assert stopped.ok
    process.communicate(timeout=20)
    assert process.returncode == 75


def test_a_stop_for_an_earlier_run_does_not_stop_the_next_one(children, tmp_path):
    with start(tmp_path):
        pass
    old = control.send(tmp_path, "stop")
    process = children.start(tmp_path, "steps=30", "step=0.03")
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert control.read_answer(tmp_path, old).message == "run-ended"


def test_states_follow_from_process_and_heartbeat(tmp_path):
    with start(tmp_path):
        pass
    snapshot = read_run(tmp_path).snapshot
    live = replace(snapshot, ending=None, state="running")
    elsewhere = replace(live, info=replace(INFO, host="another host"))
    young, old = 1.0, HEARTBEAT_TIMEOUT_S + 1
    assert derive_state(live, old) == "running"  # here the process itself is the proof
    assert derive_state(replace(live, pid_start="earlier"), young) == "lost"
    assert derive_state(elsewhere, young) == "running"
    assert derive_state(elsewhere, old) == derive_state(elsewhere, None) == "lost"
    assert derive_state(replace(live, pid_start=None), young) == "running"
    assert derive_state(replace(live, pid_start=None), old) == "lost"
    assert derive_state(replace(live, pid=None, state="queued"), None) == "queued"
    assert derive_state(snapshot, None) == "done"


@pytest.mark.slow
def test_the_heartbeat_beats(children, tmp_path):
    children.start(tmp_path, "mode=load")
    first = (tmp_path / "heartbeat").stat().st_mtime_ns
    end = time.monotonic() + 20
    while (tmp_path / "heartbeat").stat().st_mtime_ns == first:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": "of another program"}'])
def test_a_run_json_of_somebody_else_is_not_a_run(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunNotFoundError) as caught:
        read_run(tmp_path)
    assert caught.value.problems[0].code == "E-RUN-UNREADABLE"
    with start(tmp_path):  # and does not stand in the way
        assert read_run(tmp_path).snapshot.session == 1


def test_no_run_json_is_no_run(tmp_path):
    with pytest.raises(RunNotFoundError) as caught:
        read_run(tmp_path / "nothing")
    assert caught.value.problems[0].code == "E-RUN-NOT-FOUND"


def test_a_file_in_the_way_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(FileSystemError) as caught:
            start(path)
        assert caught.value.problems[0].code == "E-NOT-A-FOLDER"
        assert caught.value.problems[0].params["path"] == str(path)
        assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission_is_named_and_untouched(tmp_path):
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("permissions do not bind this user")
        for path in (tmp_path, tmp_path / "run"):
            with pytest.raises(FileSystemError) as caught:
                start(path)
            assert caught.value.problems[0].code == "E-NO-PERMISSION"
            assert caught.value.problems[0].params["path"] == str(path)
        assert list(tmp_path.iterdir()) == []
    finally:
        tmp_path.chmod(0o700)


def test_a_start_that_fails_removes_what_it_created(tmp_path):
    path = tmp_path / "a" / "b"
    with pytest.raises(UnicodeEncodeError):
        RunRecorder.start(path, info=INFO, effective_config=Unwritable("{}"))
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_keeps_what_was_there(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UnicodeEncodeError):
        RunRecorder.start(tmp_path, info=INFO, effective_config=Unwritable("{}"))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with start(tmp_path):
        pass


def test_an_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, Unwritable("new"))
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_readers_see_whole_snapshots_while_the_writer_replaces_them(children, tmp_path):
    process = children.start(tmp_path, "step=0", "steps=1000")
    while process.poll() is None:
        assert read_run(tmp_path).snapshot.info.version == "0"
    assert process.returncode == 0


def test_the_snapshot_is_readable_json(tmp_path):
    with start(tmp_path):
        snapshot = read_run(tmp_path).snapshot
    assert json.loads(snapshot_to_text(snapshot))["info"]["versions"] == {"torch": "2.13"}


@pytest.mark.skipif(not shutil.which("unshare"), reason="mounts a small disk")
def test_a_full_disk_ends_the_run_with_its_reason_and_whole_files(tmp_path):
    code = """
import os, sys
from pathlib import Path
from simpletuner.events.journal import read
from simpletuner.events.run_directory import RunRecorder
from simpletuner.events.run_status import RunInfo, read_run
from simpletuner.events.types import LogLine
from simpletuner.problems import SimpletunerError
out = Path(sys.argv[1]) / "run"
try:
    with RunRecorder.start(out, info=RunInfo(version="1", argv=()), effective_config="{}") as run:
        while True:
            run.log("x" * 500)
except SimpletunerError as error:
    print(error.problems[0].code, read_run(out).snapshot.ending.reason, read_run(out).state)
print(all(line.endswith(b"}\\n") for line in (out / "events.jsonl").open("rb")))
print([name for name in os.listdir(out) if name.endswith(".tmp")])
"""
    script = f'mount -t tmpfs -o size=128k none "{tmp_path}" && "{sys.executable}" -c "$0" "{tmp_path}"'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, code], capture_output=True, text=True, check=False)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("may not mount a disk here")
    assert done.stdout.splitlines() == ["E-DISK-FULL E-DISK-FULL failed", "True", "[]"], done.stderr


class Unwritable(str):
    """A text that fails at the moment of writing."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        if errors == "surrogatepass" and sys._getframe(1).f_code.co_name == "write_atomic":
            raise UnicodeEncodeError("utf-8", "", 0, 1, "refused")
        return super().encode(encoding, errors)


def step_event(step: int, total: int) -> t.StepFinished:
    return t.StepFinished(
        step=step, total=total, epoch=1, loss=0.5, grad_norm=1.0, learning_rate=1e-4, step_seconds=0.1, samples=1
    )
