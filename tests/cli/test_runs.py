"""`simpletuner runs`, on runs of other processes."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from simpletuner.cli.runs import COMMANDS, run
from simpletuner.events.files import write_atomic
from simpletuner.events.find import Place, find_runs
from simpletuner.events.run_directory import RunRecorder
from simpletuner.events.run_status import RunInfo, read_run, snapshot_to_text
from simpletuner.events.types import RunPlanned, StepFinished
from simpletuner.i18n import render_problem
from simpletuner.problems import ConfigError, SimpletunerError

CHILD = Path(__file__).parent.parent / "events" / "child_run.py"


@dataclass(frozen=True)
class Said:
    """What a call printed and returned."""

    code: int
    out: str
    err: str


def call(*argv: str, language: str = "en") -> Said:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(argv, language)
    return Said(int(code), out.getvalue(), err.getvalue())


def refused(*argv: str, language: str = "en") -> tuple[str, str, int]:
    """(code, title, exit code) of the problem that a call ends with."""
    with pytest.raises(SimpletunerError) as caught:
        call(*argv, language=language)
    title, hint = render_problem(caught.value.problems[0], language)
    assert hint
    return caught.value.problems[0].code, title, int(caught.value.exit_code)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def live() -> Iterator[Path]:
    """A run at work in output/cat, started by another process."""
    path = Path("output/cat").absolute()
    process = subprocess.Popen(
        [sys.executable, str(CHILD), str(path), "steps=100000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 20
    while not (path / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    yield path
    process.kill()
    process.wait()


def a_run(path: str, *, steps: int = 3, **step_fields: float) -> Path:
    """A run that is done."""
    info = RunInfo(version="1", argv=())
    with RunRecorder.start(path, info=info, effective_config="{}\n") as recorder:
        recorder.emit(RunPlanned(**PLAN, total_steps=steps))
        for step in range(1, steps + 1):
            recorder.emit(StepFinished(**STEP, **step_fields, step=step, total=steps))
        recorder.finish(output="weights.safetensors")
    return Path(path)


PLAN = {
    "model": "z_image demo",
    "adapter": "LoRA rank 16",
    "precision": "bf16",
    "device": "cpu",
    "device_name": "CPU",
    "num_epochs": 1,
    "num_datasets": 1,
    "num_images": 1,
    "num_buckets": 1,
    "effective_batch_size": 1,
}
STEP = {"epoch": 1, "loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-4, "step_seconds": 0.25, "samples": 1}


def test_list_shows_the_live_run_first_in_an_aligned_table(live):
    a_run("output/dog")
    lines = call("list").out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["●", "running", "cat"], ["✓", "done", "dog"]]
    assert re.search(r"3/3  0\.500 ", lines[2])
    assert lines[2].endswith(str(Path("output/dog")))
    assert {line.index("output") for line in lines[1:]} == {lines[0].index("folder")}
    spanish = call("list", language="es").out
    assert "en marcha" in spanish
    assert "terminada" in spanish


def test_list_as_json_is_the_snapshot():
    a_run("output/dog")
    (entry,) = json.loads(call("list", "--json").out)
    assert entry["state"] == "done"
    assert entry["snapshot"] == json.loads(Path("output/dog/run.json").read_text())


def test_list_looks_where_it_is_told():
    a_run("elsewhere/deep/er/dog")
    assert "dog" not in call("list").out
    assert "dog" in call("list", "elsewhere").out
    assert "dog" in call("list", "--root", "elsewhere").out
    assert call("list").err.startswith("No runs here.")
    assert call("list", language="es").err.startswith("Aquí no hay ejecuciones.")


def test_the_callers_output_dir_is_searched_too(tmp_path):
    a_run("a/b/c/d/dog")
    out = io.StringIO()
    with redirect_stdout(out):
        run(["list"], "en", output_dirs=[Path("a/b/c/d/dog")])
    assert "dog" in out.getvalue()


def test_show_tells_the_facts(live):
    a_run("output/dog")
    shown = call("show", "dog").out
    assert shown.splitlines()[0] == "✓ dog · done · step 3/3"
    facts = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in shown.splitlines()[1:])
    assert facts["loss"] == "0.500"
    assert facts["speed"] == "0.250 s/it"
    assert facts["weights"] == str(Path("output/dog/weights.safetensors"))
    assert facts["ended"].endswith("exit code 0")
    assert "process" not in facts
    assert "proceso" in call("show", language="es").out  # without a name: the one at work


def test_show_tells_the_loss_of_regularisation_apart():
    a_run("output/dog", regularisation_loss=0.25)
    assert re.search(r"regularisation +0\.250", call("show", "dog").out)
    a_run("output/cow")
    assert "regularisation" not in call("show", "cow").out


def test_show_takes_an_id_a_name_or_a_folder():
    a_run("output/dog")
    a_run("output/cat")
    run_id = read_run(Path("output/dog")).snapshot.id
    for reference in (run_id, "dog", "output/dog"):
        assert "dog · done" in call("show", reference).out
    assert "cat · done" in call("show").out  # the newest
    assert json.loads(call("show", "dog", "--json").out)["snapshot"]["id"] == run_id


def test_a_lost_run_is_called_lost(live):
    snapshot = replace(read_run(live).snapshot, pid_start="another process")
    a_run("output/dog")
    write_atomic(Path("output/dog/run.json"), snapshot_to_text(snapshot))
    assert "? dog · lost" in call("show", "dog").out
    assert "the process is gone" in call("show", "dog").out
    assert "el proceso ya no existe" in call("show", "dog", language="es").out


def test_logs_are_told_in_the_readers_language():
    a_run("output/dog")
    assert "INFO    Done: step 3" in call("logs").out
    assert "INFO    Terminado: paso 3" in call("logs", language="es").out
    assert len(call("logs", "-n", "2").out.splitlines()) == 2
    events = [json.loads(line)["event"] for line in call("logs", "--json").out.splitlines()]
    assert events == ["run.started", "run.planned", *["step.finished"] * 3, "run.finished"]


def test_logs_follow_a_run_of_another_process_to_its_end(live):
    said: list[Said] = []

    def follow() -> None:
        said.append(call_captured_by_process("logs", "-f"))

    reader = threading.Thread(target=follow)
    reader.start()
    time.sleep(0.4)
    assert call("stop").code == 0
    reader.join(timeout=20)
    lines = said[0].out.splitlines()
    assert "Stopped at step" in lines[-1]
    assert len(lines) == len(set(lines))


def call_captured_by_process(*argv: str) -> Said:
    """In a process of its own, because redirected streams are shared by all threads."""
    code = "import sys; from simpletuner.cli.runs import run; sys.exit(run(sys.argv[1:], 'en'))"
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, encoding="utf-8", check=False
    )
    return Said(done.returncode, done.stdout, done.stderr)


def test_commands_reach_the_run_and_bring_its_answer(live):
    checkpoint = call("checkpoint")
    assert checkpoint.code == 0
    assert re.fullmatch(r"Saved step (\d+): \S+checkpoint-\1\n", checkpoint.out)
    assert checkpoint.err == "Asked cat for a checkpoint after the present step.\n"
    assert re.fullmatch(r"Validado el paso \d+: \S+sheet\.png\n", call("validate", "cat", language="es").out)
    answer = json.loads(call("checkpoint", "--json").out)
    assert (answer["ok"], answer["message"]) == (True, "saved")
    stop = call("stop", str(live))
    assert stop.err == "Asked cat to finish the present step, save and end.\n"
    assert re.fullmatch(r"Stopped at step (\d+), saved in \S+cat/checkpoint-\1\n", stop.out)
    assert read_run(live).snapshot.ending.exit_code == 75


def test_stop_without_saving(live):
    said = call("stop", "--no-save", language="es")
    assert said.err == "Pedido a cat que termine tras el paso actual sin guardar.\n"
    assert re.match(r"Detenida en el paso \d+ sin guardar\.", said.out)
    assert read_run(live).snapshot.ending.exit_code == 130


@pytest.mark.parametrize(("language", "words"), [("en", "there was nothing to save"), ("es", "no había nada que")])
def test_stop_before_the_first_step_says_that_nothing_was_to_be_saved(tmp_path, language, words):
    path = tmp_path / "output" / "cat"
    process = subprocess.Popen([sys.executable, str(CHILD), str(path), "mode=load"], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 20
    while not (path / "ready").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    try:
        assert words in call("stop", str(path), language=language).out
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells")
def test_a_suspended_run_is_shown_as_such_and_answers_when_it_goes_on(live):
    pid = read_run(live).snapshot.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for_state(live, "suspended")
        assert call("list").out.splitlines()[1].split()[:3] == ["‖", "suspended", "cat"]
        assert "suspendida" in call("list", language="es").out
        assert read_run(live).is_live
        said = call("stop", "--no-wait")
        assert f"kill -CONT {pid}" in said.err
        assert "suspendida" in call("checkpoint", "--no-wait", language="es").err
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for_state(live, "stopped")
    assert read_run(live).snapshot.ending.exit_code == 75


def wait_for_state(path: Path, state: str) -> None:
    end = time.monotonic() + 20
    while read_run(path).state != state:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_stop_by_force_ends_the_process(live):
    assert re.fullmatch(r"Ended cat \(process \d+\)\..*\n", call("stop", "--force").out)
    assert read_run(live).state == "lost"


def test_force_needs_a_process_that_is_certainly_the_right_one(live):
    snapshot = read_run(live).snapshot
    other = replace(snapshot, info=replace(snapshot.info, host="another host"), pid_start=None)
    a_run("elsewhere/dog")
    write_atomic(Path("elsewhere/dog/run.json"), snapshot_to_text(other))
    code, title, _ = refused("stop", "--force", "elsewhere/dog")
    assert (code, "another host" in title) == ("E-RUN-ELSEWHERE", True)
    assert read_run(live).is_live


def test_not_waiting_leaves_the_command_there(live):
    said = call("checkpoint", "--no-wait")
    assert (said.code, said.out) == (0, "")


def test_no_answer_in_time(live):
    snapshot = read_run(live).snapshot
    a_run("elsewhere/dog")  # nobody reads its control folder, though its process number is alive
    write_atomic(Path("elsewhere/dog/run.json"), snapshot_to_text(snapshot))
    code, title, exit_code = refused("checkpoint", "elsewhere/dog", "--timeout", "0.1")
    assert (code, exit_code) == ("E-RUN-NO-ANSWER", 1)
    assert "has not answered yet" in title


def test_a_run_that_ends_instead_of_answering(live):
    pid = read_run(live).snapshot.pid
    os.kill(pid, signal.SIGSTOP)  # so that the run does not see the command
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    code, _, exit_code = refused("validate")
    assert (code, exit_code) == ("E-RUN-ENDED", 1)


@pytest.mark.parametrize("command", ["stop", "checkpoint", "validate"])
def test_a_finished_run_cannot_be_steered(command):
    a_run("output/dog")
    code, title, exit_code = refused(command, language="es")
    assert (code, exit_code) == ("E-RUN-NOT-LIVE", 1)
    assert title.startswith("Aquí no hay ninguna ejecución en marcha")


def test_no_run_at_all(tmp_path):
    code, title, exit_code = refused("show")
    assert (code, exit_code) == ("E-RUN-NONE", 2)
    assert str(tmp_path) in title


def test_a_folder_without_a_run(tmp_path):
    code, title, exit_code = refused("show", str(tmp_path))
    assert (code, title, exit_code) == ("E-RUN-NOT-FOUND", f"There is no run in {tmp_path}.", 2)


def test_an_unknown_name_is_answered_with_the_known_ones():
    a_run("output/dog")
    code, title, exit_code = refused("show", "dgo")
    assert (code, title, exit_code) == ("E-RUN-UNKNOWN", "There is no run called dgo.", 2)


def test_of_two_runs_with_one_name_neither_is_guessed():
    a_run("output/a/dog")
    a_run("output/b/dog")
    code, title, exit_code = refused("show", "dog")
    assert (code, exit_code) == ("E-RUN-AMBIGUOUS", 2)
    assert title.count("dog") == 2


@pytest.mark.parametrize(
    ("argv", "code", "title"),
    [
        (["lst"], "E-RUNS-COMMAND", "`simpletuner runs lst` does not exist."),
        (["list", "--root", "nowhere"], "E-RUNS-ROOT", "There is no folder nowhere."),
        (["list", "nowhere"], "E-RUNS-ROOT", "There is no folder nowhere."),
        (["show", "--fast"], "E-RUNS-OPTION", "`simpletuner runs show` has no option --fast."),
        (
            ["logs", "-n"],
            "E-RUNS-USAGE",
            "The command line was not understood: argument -n/--lines: expected one argument",
        ),
    ],
)
def test_a_wrong_command_line(argv, code, title):
    assert refused(*argv) == (code, title, 2)
    with pytest.raises(ConfigError):
        run(argv, "es")


@pytest.mark.parametrize("language", ["en", "es"])
@pytest.mark.parametrize("argv", [[], ["--help"], ["stop", "-h"]])
def test_help_names_every_command(argv, language):
    said = call(*argv, language=language)
    assert said.code == 0
    assert all(f"\n  {command} " in said.out for command in COMMANDS)
    assert max(map(len, said.out.splitlines())) <= 120


def test_a_run_json_of_another_program_is_no_run(tmp_path):
    Path("output/other").mkdir(parents=True)
    Path("output/other/run.json").write_text('{"name": "x"}')
    a_run("output/dog")
    assert [status.path.name for status in find_runs([Place(path=tmp_path)])] == ["dog"]


def test_the_search_passes_over_what_a_run_holds_and_stops_in_time(tmp_path):
    a_run("output/dog")
    for hidden in ("output/dog/checkpoint-3/x", "checkpoint-3", ".venv/x", "a/b/c/d/too-deep"):
        a_run(hidden)
    assert [status.path.name for status in find_runs([Place(path=tmp_path)])] == ["dog"]
