"""The journal: complete lines only, one number each, whatever the crash."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.events.journal import Journal, follow, format_time, parse_time, read, utc_now
from simpletuner.events.oserrors import FileSystemError
from simpletuner.events.types import LogLine

UTF8_MESSAGE = "paso 1: \u00a1ma\u00f1ana! \u2028 \U0001f40d"


def note(text: str) -> LogLine:
    return LogLine(source="test", message=text)


def written(path: Path, count: int) -> bytes:
    journal = Journal(path)
    for index in range(count):
        journal.append(note(f"{UTF8_MESSAGE} {index}"))
    journal.close()
    return path.read_bytes()


def test_what_is_appended_is_read_back_in_order(tmp_path):
    path = tmp_path / "events.jsonl"
    journal = Journal(path)
    records = [journal.append(note(str(index))) for index in range(5)]
    assert list(read(path)) == records  # without closing: a killed process has told all it told
    assert [record.seq for record in records] == [1, 2, 3, 4, 5]
    assert list(read(path, after=3)) == records[3:]
    journal.close()


def test_a_journal_that_does_not_exist_is_empty(tmp_path):
    assert list(read(tmp_path / "none.jsonl")) == []


def test_a_file_cut_anywhere_keeps_every_whole_line_and_goes_on_with_the_next_number(tmp_path):
    path = tmp_path / "events.jsonl"
    whole = written(path, 3)
    starts = [0, *(index + 1 for index, byte in enumerate(whole) if byte == ord("\n"))]
    for cut in range(starts[2] - 1, len(whole) + 1):
        path.write_bytes(whole[:cut])
        # A line that only lacks its end is whole; it is closed, not thrown away.
        complete = sum(1 for start in starts[1:] if cut >= start - 1)
        readable = sum(1 for start in starts[1:] if cut >= start)
        assert len(list(read(path))) == readable
        journal = Journal(path)
        record = journal.append(note("after the crash"))
        journal.close()
        assert record.seq == complete + 1
        assert [r.seq for r in read(path)] == list(range(1, complete + 2))


@pytest.mark.parametrize("garbage", [b"\0" * 5000, b"{}\n", b"not json\n", b'{"seq":1}\n', b"\xff\xfe\n", b"\n"])
def test_lines_that_are_no_records_are_passed_over(tmp_path, garbage):
    path = tmp_path / "events.jsonl"
    path.write_bytes(written(path, 2) + garbage)
    journal = Journal(path)
    journal.append(note("next"))
    journal.close()
    assert [record.seq for record in read(path)] == [1, 2, 3]


def test_a_tail_longer_than_one_block_is_repaired(tmp_path):
    path = tmp_path / "events.jsonl"
    written(path, 3)
    with path.open("ab") as stream:
        stream.write(b'{"seq":4,"text":"' + b"x" * 300_000)
    journal = Journal(path)
    assert journal.append(note("next")).seq == 4
    journal.close()
    assert path.stat().st_size < 5000


def test_follow_delivers_every_record_once_while_a_writer_writes(tmp_path):
    path = tmp_path / "events.jsonl"
    done = threading.Event()

    def write() -> None:
        journal = Journal(path)
        for index in range(300):
            journal.append(note(UTF8_MESSAGE * (index % 7)))
        journal.close()
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = [record.seq for record in follow(path, poll_s=0.001, finished=done.is_set)]
    thread.join()
    assert seen == list(range(1, 301))


def test_follow_does_not_show_a_line_before_its_end(tmp_path):
    path = tmp_path / "events.jsonl"
    whole = written(path, 2)
    path.write_bytes(whole[:-1])
    assert [record.seq for record in follow(path, finished=lambda: True)] == [1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_problem_with_a_path(tmp_path):
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(FileSystemError) as caught:
        Journal(path).append(note("x"))
    assert caught.value.problems[0].code == "E-DISK-FULL"
    assert caught.value.problems[0].params["path"] == str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_line_that_does_not_fit_leaves_the_journal_as_it_was(tmp_path):
    path = tmp_path / "events.jsonl"
    code = """
import resource, sys
from pathlib import Path
from simpletuner.events.journal import Journal
from simpletuner.events.types import LogLine
from simpletuner.problems import SimpletunerError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
journal = Journal(Path(sys.argv[1]))
try:
    while True:
        journal.append(LogLine(source="test", message="x" * 300))
except SimpletunerError as error:
    print(error.problems[0].code)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "E-FILE-TOO-LARGE"
    assert path.read_bytes().endswith(b"\n")
    assert [record.seq for record in read(path)] == [1, 2]


@given(st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(9000, 1, 1), timezones=st.just(timezone.utc)))  # noqa: DTZ001
def test_times_survive_to_the_millisecond(moment):
    moment = moment.replace(microsecond=moment.microsecond // 1000 * 1000)
    assert parse_time(format_time(moment)) == moment


def test_now_has_no_more_than_milliseconds():
    assert parse_time(format_time(now := utc_now())) == now


def test_the_file_is_readable_for_others(tmp_path):
    path = tmp_path / "events.jsonl"
    written(path, 1)
    if os.name == "posix":
        assert path.stat().st_mode & 0o400
