"""The live area: never wider than the terminal, and honest about how far it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simpletuner.events import layout
from simpletuner.events import types as t
from simpletuner.events.text import phase_pace, phase_text
from simpletuner.events.view import RunView

STEP = t.StepFinished(
    step=842,
    total=2000,
    epoch=13,
    loss=0.3214,
    grad_norm=0.81,
    learning_rate=1e-4,
    step_seconds=3.41,
    samples=1,
    peak_memory_bytes=18_300_000_000,
)
PHASE = t.RunPhase(key="latents", done=64, total=128, unit="images", detail="a/long/path/to/some/image_0001.png")
WIDTHS = st.integers(1, 200)
LANGUAGES = st.sampled_from(["en", "es"])
GLYPHS = st.sampled_from([layout.UNICODE, layout.ASCII])


def a_view(*, validating: bool = False, stopping: bool = False) -> RunView:
    view = RunView()
    for number in range(1, 21):
        view.apply(replace(STEP, step=822 + number))
    if validating:
        view.apply(t.ValidationStarted(step=840, num_images=8))
        for _ in range(3):
            view.apply(t.ValidationImage(**IMAGE))
    if stopping:
        view.apply(t.RunStopping(level=1, source="keyboard"))
    return view


IMAGE = {
    "prompt_id": "p",
    "prompt": "x",
    "step": 840,
    "seed": 1,
    "width_px": 64,
    "height_px": 64,
    "guidance": 0.0,
    "path": "x.png",
    "seconds": 1.0,
}


def flat(row: layout.Row) -> str:
    return "".join(part for part, _ in row)


@given(WIDTHS, LANGUAGES, GLYPHS, st.booleans(), st.booleans())
def test_no_row_is_wider_than_the_terminal(width, language, glyphs, validating, stopping):
    view = a_view(validating=validating, stopping=stopping)
    rows = layout.training_rows(view, width, language, glyphs)
    rows.append(layout.phase_row(PHASE, 55.0, width, language, glyphs))
    rows.append(layout.phase_row(replace(PHASE, total=None), 55.0, width, language, glyphs))
    rows += layout.finished_rows([replace(PHASE, elapsed_s=2.0, finished=True)] * 7, width, language, glyphs)
    if validating:
        rows.append(layout.validation_row(view, 5.0, width, language, glyphs))
    assert all(layout.row_width(row) <= width for row in rows)


@pytest.mark.parametrize(("language", "told"), [("en", ["4.00/s", "15 s left"]), ("es", ["4,00/s", "quedan 15 s"])])
def test_a_phase_tells_its_pace_without_what_a_cache_had(language, told):
    phase = replace(PHASE, done=1068, before=1028, total=1128)
    assert phase_pace(phase, 10.0, language) == told
    assert all(figure in flat(layout.phase_row(phase, 10.0, 110, language, layout.UNICODE)) for figure in told)
    assert phase_pace(replace(phase, before=1068), 10.0, language) == []  # nothing was made yet
    assert phase_pace(phase, 1.0, language) == []  # too early to say
    assert phase_pace(replace(phase, total=None), 10.0, language) == []
    assert phase_pace(replace(phase, done=1128), 10.0, language)[1:] == []  # nothing is left


@pytest.mark.parametrize(
    ("language", "some", "none"), [("en", "new: 3", "nothing new"), ("es", "nuevo: 3", "nada nuevo")]
)
def test_a_finished_phase_tells_what_was_new(language, some, none):
    phase = replace(PHASE, done=128, before=125, finished=True)
    for before, told in ((125, some), (128, none)):
        found = replace(phase, before=before)
        assert told in phase_text(found, language)
        assert told in flat(layout.finished_rows([found], 110, language, layout.UNICODE)[0])
    for plain in (replace(phase, before=0), replace(phase, unit="bytes")):
        assert some.split(":")[0] not in phase_text(plain, language)


@given(st.floats(0, 1), st.integers(0, 60), GLYPHS)
def test_a_bar_fills_its_cells_in_proportion(fraction, width, glyphs):
    (done, _), (rest, _) = layout.bar(fraction, width, glyphs)
    assert len(done) + len(rest) == width
    assert abs(len(done) - fraction * width) <= 1


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_bar_never_goes_back(a, b):
    if a <= b:
        assert len(layout.bar(a, 40, layout.UNICODE)[0][0]) <= len(layout.bar(b, 40, layout.UNICODE)[0][0])


def test_a_hundred_percent_is_the_end_only():
    assert layout.percent(0.9999, "en") == " 99%"
    assert layout.percent(1.0, "es") == "100 %"


@pytest.mark.parametrize(
    ("language", "head", "health"),
    [
        (
            "en",
            " 842/2000    42%   1 h 10 m left",
            "loss 0.321   3.41 s/it   lr 1e-4   grad 0.810   0.293 it/s   epoch 13",
        ),
        (
            "es",
            " 842/2000    42 %   quedan 1 h 10 m",
            "loss 0,321   3,41 s/it   lr 1e-4   grad 0,810   0,293 it/s   época 13",
        ),
    ],
)
def test_the_training_rows(language, head, health):
    rows = layout.training_rows(a_view(), 100, language, layout.UNICODE)
    assert flat(rows[0]).endswith(head)
    assert health in flat(rows[1])


def test_while_validating_there_is_no_time_left_but_a_count():
    assert flat(layout.training_rows(a_view(validating=True), 100, "en", layout.UNICODE)[0]).endswith("validating 3/8")


def test_while_stopping_the_label_says_so():
    row = layout.training_rows(a_view(stopping=True), 100, "es", layout.UNICODE)[0]
    assert flat(row).startswith("  Deteniendo")
    assert "quedan" not in flat(row)


def test_the_less_important_figures_go_first():
    narrow = flat(layout.training_rows(a_view(), 40, "en", layout.UNICODE)[1])
    assert "loss" in narrow
    assert "epoch" not in narrow


def test_messages_break_between_words_and_keep_their_indent():
    message = "one two three four five six seven eight nine ten /a/path/that/is/longer/than/the/row"
    rows = layout.wrapped([("! ", "warning")], message, "plain", 30)
    lines = [flat(row) for row in rows]
    assert lines[0].startswith("! one")
    assert all(line.startswith("  ") for line in lines[1:])
    assert " ".join(" ".join(lines)[2:].split()) == message


def test_phases_without_news_are_not_listed():
    trivial = t.RunPhase(key="download", unit="bytes", elapsed_s=0.001, finished=True)
    assert layout.finished_rows([trivial], 80, "en", layout.UNICODE) == []


def test_a_loss_of_regularisation_stays_beside_the_loss():
    view = RunView()
    for event in (replace(STEP, regularisation_loss=0.0625), replace(STEP, regularisation_loss=None)):
        view.apply(event)
        assert view.regularisation_loss == 0.0625
