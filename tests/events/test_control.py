"""Commands as files: none lost, none twice, each with its answer."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from simpletuner.events import control
from simpletuner.events.control import Answer, answer, expire, read_answer, send, take, wait_for_answer
from simpletuner.events.oserrors import FileSystemError


def test_commands_are_taken_once_and_in_order(tmp_path):
    ids = [send(tmp_path, "checkpoint"), send(tmp_path, "validate"), send(tmp_path, "stop", save=False)]
    commands = take(tmp_path)
    assert [command.id for command in commands] == ids
    assert [(command.kind, command.save) for command in commands] == [
        ("checkpoint", True),
        ("validate", True),
        ("stop", False),
    ]
    assert take(tmp_path) == []


def test_no_control_folder_means_no_command(tmp_path):
    assert take(tmp_path) == []


def test_an_answer_reaches_its_sender_and_only_that_one(tmp_path):
    first, second = send(tmp_path, "checkpoint"), send(tmp_path, "checkpoint")
    result = Answer(ok=True, message="saved", step=7, path="checkpoint-7")
    answer(tmp_path, take(tmp_path)[0], result)
    assert wait_for_answer(tmp_path, first, timeout_s=0) == result
    assert wait_for_answer(tmp_path, second, timeout_s=0.01) is None
    assert {path.suffix for path in (tmp_path / "control").iterdir()} == {".done", ".taken"}


def test_the_sender_does_not_wait_for_the_dead(tmp_path):
    command_id = send(tmp_path, "stop")
    assert wait_for_answer(tmp_path, command_id, timeout_s=60, alive=lambda: False) is None


def test_an_answer_of_the_last_moment_counts(tmp_path):
    command_id = send(tmp_path, "stop")
    command = take(tmp_path)[0]

    def dies() -> bool:
        answer(tmp_path, command, Answer(ok=True, message="stopped"))
        return False

    assert wait_for_answer(tmp_path, command_id, timeout_s=60, alive=dies) == Answer(ok=True, message="stopped")


def test_the_next_run_answers_what_an_earlier_one_left(tmp_path):
    taken, untouched = send(tmp_path, "checkpoint"), ""
    take(tmp_path)
    untouched = send(tmp_path, "stop")
    expire(tmp_path)
    assert take(tmp_path) == []
    assert read_answer(tmp_path, taken) == read_answer(tmp_path, untouched) == Answer(ok=False, message="run-ended")


def test_numbers_go_on_after_the_answered_ones(tmp_path):
    first = send(tmp_path, "validate")
    answer(tmp_path, take(tmp_path)[0], Answer(ok=True, message="validated"))
    assert send(tmp_path, "validate")[:6] > first[:6]


def test_a_file_that_is_no_command_is_left_alone(tmp_path):
    command_id = send(tmp_path, "stop")
    (tmp_path / "control" / "000000-stop-0000.json").write_text('{"id": "0000')
    (tmp_path / "control" / "notes.json").write_text("{}")
    assert [command.id for command in take(tmp_path)] == [command_id]
    assert (tmp_path / "control" / "000000-stop-0000.json").exists()


def test_many_senders_at_once_lose_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from simpletuner.events.control import send\n"
        "for _ in range(20): print(send(Path(sys.argv[1]), 'checkpoint'))"
    )
    senders = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    taken: list[str] = []
    stop = threading.Event()

    def receive() -> None:
        while not stop.is_set():
            taken.extend(command.id for command in take(tmp_path))

    receiver = threading.Thread(target=receive)
    receiver.start()
    sent = [line for sender in senders for line in sender.communicate()[0].split()]
    stop.set()
    receiver.join()
    taken.extend(command.id for command in take(tmp_path))
    assert len(set(sent)) == 60
    assert sorted(taken) == sorted(sent)


def test_a_control_folder_that_cannot_be_made_is_a_problem(tmp_path):
    (tmp_path / "control").write_text("in the way")
    with pytest.raises(FileSystemError) as caught:
        send(tmp_path, "stop")
    assert caught.value.problems[0].code == "E-NOT-A-FOLDER"
    assert control.COMMAND_KINDS == ("stop", "checkpoint", "validate")
