"""What the console says: the same story in both languages, each message once, results on stdout."""

from __future__ import annotations

import io
import json
import os
import re
import select
import sys
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from simpletuner.events import types as t
from simpletuner.events.console import choose_format, console_sink, print_text
from simpletuner.events.journal import Record, record_to_json
from simpletuner.events.run_status import read_run
from simpletuner.events.text import Narrator, format_line, problem_lines
from simpletuner.i18n import catalog
from simpletuner.problems import Fix, Problem, Severity

PLAIN = {
    "en": """\
INFO    SimpleTuner 0.1.0 · config/config.json · run cat
INFO    images: 26/26, 0.3 s
INFO    cats: 24 images, 48 samples per epoch, 1 bucket
WARNING cats: 2 images left out: smaller than minimum_image_size
INFO      model      z_image turbo · LoRA rank 16
INFO      data       1 dataset · 24 images · 1 bucket · effective batch 1
INFO      precision  bf16 · gradient checkpointing
INFO      device     RTX 4090 (cuda:0) · 24 GB (23 GB free)
INFO      plan       40 steps (1 epoch) · validation every 20 · checkpoint every 20
INFO      output     /out/cat
WARNING seed = 42 instead of -1: why not
WARNING E-READ-ONLY  a.json:3
WARNING   /mnt/x is on a read-only disk.
WARNING   Choose an output_dir on a disk that can be written.
INFO    LoRA rank 16, alpha 16: 1.23 M parameters in 210 modules (to_q, to_k)
INFO    latents: 24/24 images, 55 s
INFO    validation of the base model: 2 images in 2.0 s · validation_images/sheet.png
INFO    train step=1/40 loss=0.5000 lr=1.0e-04 grad=1.25 s_it=3
INFO    train step=10/40 loss=0.5000 lr=1.0e-04 grad=1.25 s_it=3 eta=1m30s
INFO    train step=20/40 loss=0.5000 lr=1.0e-04 grad=1.25 s_it=3 eta=1m
INFO    checkpoint 20: checkpoint-20 (162 MB)
INFO    validation 20: 2 images in 2.0 s · validation_images/sheet.png
INFO    train step=30/40 loss=0.5000 lr=1.0e-04 grad=1.25 s_it=3 eta=30s
INFO    train step=40/40 loss=0.5000 lr=1.0e-04 grad=1.25 s_it=3
INFO    weights: pytorch_lora_weights.safetensors (12 MB)
INFO    Done: step 40, 2 m 05 s
""",
    "es": """\
INFO    SimpleTuner 0.1.0 · config/config.json · ejecución cat
INFO    imágenes: 26/26, 0,3 s
INFO    cats: 24 imágenes, 48 muestras por época, 1 bucket
WARNING cats: 2 imágenes descartadas: más pequeñas que minimum_image_size
INFO      modelo       z_image turbo · LoRA rank 16
INFO      datos        1 dataset · 24 imágenes · 1 bucket · lote efectivo 1
INFO      precisión    bf16 · gradient checkpointing
INFO      dispositivo  RTX 4090 (cuda:0) · 24 GB (23 GB libres)
INFO      plan         40 pasos (1 época) · validación cada 20 · checkpoint cada 20
INFO      salida       /out/cat
WARNING seed = 42 en lugar de -1: why not
WARNING E-READ-ONLY  a.json:3
WARNING   /mnt/x está en un disco de solo lectura.
WARNING   Elige un output_dir en un disco en el que se pueda escribir.
INFO    LoRA rango 16, alfa 16: 1,23 M parámetros en 210 módulos (to_q, to_k)
INFO    latentes: 24/24 imágenes, 55 s
INFO    validación del modelo base: 2 imágenes en 2,0 s · validation_images/sheet.png
INFO    train step=1/40 loss=0.5000 lr=1.0e-04 grad=1.25 s_it=3
INFO    train step=10/40 loss=0.5000 lr=1.0e-04 grad=1.25 s_it=3 eta=1m30s
INFO    train step=20/40 loss=0.5000 lr=1.0e-04 grad=1.25 s_it=3 eta=1m
INFO    checkpoint 20: checkpoint-20 (162 MB)
INFO    validación 20: 2 imágenes en 2,0 s · validation_images/sheet.png
INFO    train step=30/40 loss=0.5000 lr=1.0e-04 grad=1.25 s_it=3 eta=30s
INFO    train step=40/40 loss=0.5000 lr=1.0e-04 grad=1.25 s_it=3
INFO    pesos: pytorch_lora_weights.safetensors (12 MB)
INFO    Terminado: paso 40, 2 m 05 s
""",
}
RESULTS = {
    "en": """\
weights  /out/cat/pytorch_lora_weights.safetensors
images   /out/cat/validation_images/sheet.png
log      /out/cat/log.txt
""",
    "es": """\
pesos     /out/cat/pytorch_lora_weights.safetensors
imágenes  /out/cat/validation_images/sheet.png
registro  /out/cat/log.txt
""",
}


def show(records: list[Record], look: str, language: str = "en") -> tuple[str, str]:
    """(stdout, stderr) of a console that saw the records."""
    out, err = Utf8(), Utf8()
    sink = console_sink(look, language=language, out=out, err=err)
    for record in records:
        sink.write(record)
    sink.close()
    return out.getvalue(), err.getvalue()


class Utf8(io.StringIO):
    encoding = "utf-8"


@pytest.mark.parametrize("language", ["en", "es"])
def test_plain_lines(story, language):
    out, err = show(story, "plain", language)
    assert all(re.match(r"2026-03-12T10:58:\d\dZ ", line) for line in err.splitlines())
    assert "".join(f"{line[21:]}\n" for line in err.splitlines()) == PLAIN[language]
    assert out.replace("\\", "/") == RESULTS[language]


@pytest.mark.parametrize("look", ["plain", "rich"])
@pytest.mark.parametrize("language", ["en", "es"])
def test_every_message_appears_once(story, look, language):
    flat = " ".join(" ".join(screen_after(show(story, look, language)[1])).split())
    of_phases = ("24/24", "26/26")  # in the live console these are a part of one row
    for line in PLAIN[language].splitlines():
        message = " ".join(line[8:].split("·")[0].split())
        if "train step" not in message and (look == "plain" or not any(figure in message for figure in of_phases)):
            assert flat.count(message) == 1, message


def test_the_live_console_leaves_what_happened_and_takes_its_bars_away(story):
    out, err = show(story, "rich")
    lines = screen_after(err)
    assert "✓ images 26/26 0.3 s   ✓ latents 24/24 55 s" in lines
    assert "⚠ seed = 42 instead of -1: why not" in lines
    assert next(line for line in lines if "checkpoint 20" in line).endswith("◆ checkpoint 20: checkpoint-20 (162 MB)")
    assert lines[-1] == "✓ Done: step 40, 2 m 05 s"
    assert not any("━" in line for line in lines)
    assert err.rfind("\x1b[?25h") > err.rfind("\x1b[?25l")  # the cursor is back
    assert [line.strip() for line in out.splitlines()] == RESULTS["en"].splitlines()


def test_json_lines_are_the_journal(story):
    out, err = show(story, "json")
    assert [json.loads(line) for line in err.splitlines()] == [
        json.loads(json.dumps(record_to_json(record))) for record in story
    ]
    assert json.loads(out) == {
        "state": "done",
        "weights": str(Path("/out/cat/pytorch_lora_weights.safetensors")),
        "images": str(Path("/out/cat/validation_images/sheet.png")),
        "log": str(Path("/out/cat/log.txt")),
    }


@pytest.mark.parametrize(
    ("language", "exit_code", "step", "said"),
    [
        ("en", 75, 3, "Stopped at step 3; everything is saved. The same command goes on from here."),
        ("es", 75, 3, "Detenido en el paso 3; todo está guardado. El mismo comando sigue desde aquí."),
        ("en", 130, 3, "Stopped at step 3 without saving. The same command goes on from the last checkpoint."),
        ("es", 130, 3, "Detenido en el paso 3 sin guardar. El mismo comando sigue desde el último checkpoint."),
        ("en", 130, 0, "Stopped before the first step. What was cached stays for the next start."),
        ("es", 130, 0, "Detenido antes del primer paso. Lo que está en caché queda para el próximo arranque."),
    ],
)
def test_a_stopped_run_says_how_to_go_on_and_has_no_result(story, language, exit_code, step, said):
    ending = t.RunFinished(state="stopped", exit_code=exit_code, step=step)
    out, err = show([*story[:1], replace(story[-1], event=ending)], "plain", language)
    assert err.splitlines()[-1][29:] == said
    assert out == ""


@pytest.mark.parametrize(
    ("language", "level", "source", "said"),
    [
        ("en", 1, "keyboard", "Finishing this step and saving. (Ctrl-C again: leave without saving)"),
        ("es", 1, "keyboard", "Terminando este paso y guardando. (Ctrl-C otra vez: salir sin guardar)"),
        ("en", 1, "command", "Finishing this step and saving."),
        ("en", 2, "keyboard", "Leaving without saving. (Ctrl-C again: end at once)"),
        ("es", 2, "keyboard", "Saliendo sin guardar. (Ctrl-C otra vez: terminar de inmediato)"),
        ("en", 3, "keyboard", "Leaving at once."),
        ("es", 3, "keyboard", "Saliendo de inmediato."),
    ],
)
def test_a_stop_says_what_will_happen(story, language, level, source, said):
    record = replace(story[0], event=t.RunStopping(level=level, source=source))
    assert show([record], "plain", language)[1][29:] == said + "\n"


def test_errors_are_left_to_the_command_that_ends_with_them(story):
    error = t.ProblemReported(problem=Problem(code="E-DISK-FULL", params={"path": "/x"}))
    trace = t.LogLine(level="error", source="traceback", message="Traceback ...\n  File x")
    ending = t.RunFinished(state="failed", exit_code=3, reason="E-DISK-FULL", step=7)
    told = [replace(story[0], event=event) for event in (error, trace, ending)]
    for look in ("plain", "rich"):
        assert without_ansi(show(told, look)[1]).strip().endswith("Failed at step 7: E-DISK-FULL")
        assert "Traceback" not in show(told, look)[1]
    lines = [line.text for record in told for line in Narrator("en").tell(record)]  # but the log has all of it
    assert "The disk is full: /x could not be written." in [line.strip() for line in lines]
    assert "  File x" in lines


@pytest.mark.parametrize("language", ["en", "es"])
def test_a_crash_has_a_sentence(language):
    problem = Problem(code="E-UNEXPECTED", params={"kind": "KeyError", "message": "'x'"})
    title = {"en": "An unexpected error", "es": "Un error inesperado"}[language]
    assert problem_lines(problem, language)[1] == f"{title}: KeyError: 'x'"


def test_targets_are_shown_by_their_last_names(story):
    targets = ("layers.*.attention.to_q", "layers.*.attention.to_out.0", "context_refiner.*.attention.to_q", "w1")
    event = t.AdapterCreated(num_params=1, num_modules=4, rank=1, alpha=1.0, targets=targets)
    assert Narrator("en").tell(replace(story[0], event=event))[0].text.endswith("(to_q, to_out.0, w1)")


def test_a_problem_offers_its_fixes():
    fixes = (Fix(key="lora_rank", value=16), Fix(key="simpletuner", value="train --resume none"))
    lines = problem_lines(Problem(code="E-READ-ONLY", params={"path": "x"}, fixes=fixes), "es")
    assert lines[-2:] == ["arreglo: lora_rank=16", "arreglo: simpletuner train --resume none"]


@pytest.mark.parametrize(
    "problem",
    [
        Problem(code="E-OF-TOMORROW", severity=Severity.WARNING, params={"a": 1}),
        Problem(code="E-DISK-FULL", severity=Severity.WARNING),  # its parameter is missing
    ],
)
def test_a_problem_of_another_version_is_shown_as_well_as_can_be(problem):
    assert problem_lines(problem, "es")[0] == problem.code


def test_long_silence_is_broken_every_thirty_seconds(story):
    narrator = Narrator("en")
    phase = t.RunPhase(key="model", elapsed_s=31.0)
    assert narrator.tell(replace(story[0])) != []
    at = story[0].time
    for seconds, spoke in ((1, False), (29, False), (31, True), (45, False), (62, True)):
        record = Record(seq=1, time=at + timedelta(seconds=seconds), event=phase)
        assert bool(narrator.tell(record)) == spoke
    assert [line.text for line in narrator.still_working(at.timestamp() + 95)] == ["model: 31 s"]
    narrator.tell(replace(story[0], event=t.ValidationStarted(step=0, num_images=8)))
    assert [line.text for line in narrator.still_working(at.timestamp() + 200)] == ["validating 0/8"]


def test_slow_steps_have_a_line_each(story):
    narrator = Narrator("en")
    steps = [record for record in story if isinstance(record.event, t.StepFinished)]
    slow = [replace(record, time=story[0].time + timedelta(seconds=40 * i)) for i, record in enumerate(steps)]
    assert sum(len(narrator.tell(record)) for record in slow) == len(steps)


@pytest.mark.parametrize(
    ("requested", "terminal", "environ", "look"),
    [
        ("auto", True, {}, "rich"),
        ("auto", False, {}, "plain"),
        ("auto", True, {"NO_COLOR": "1"}, "plain"),
        ("auto", True, {"CI": "true"}, "plain"),
        ("auto", True, {"CI": "true", "FORCE_COLOR": "1"}, "rich"),
        ("auto", False, {"FORCE_COLOR": "1"}, "plain"),
        ("auto", True, {"TERM": "dumb"}, "plain"),
        ("plain", True, {}, "plain"),
        ("json", True, {}, "json"),
        ("rich", False, {"CI": "1"}, "rich"),
    ],
)
def test_which_look(requested, terminal, environ, look):
    assert choose_format(requested, is_terminal=terminal, environ=environ) == look


def test_a_terminal_that_lacks_a_sign_or_has_gone_is_no_error(tmp_path):
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii", errors="strict")
    print_text(stream, "época ✓\n")
    assert buffer.getvalue() == b"?poca ?\n"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", closefd=True) as gone:
        print_text(gone, "x")
        os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())


def test_log_lines_have_time_and_level(story):
    line = Narrator("en").tell(story[0])[0]
    expected = "2026-03-12T10:58:03Z INFO    SimpleTuner 0.1.0 · config/config.json · run cat"
    assert format_line(line, story[0].time.timestamp()) == expected


def test_both_languages_have_the_same_texts():
    for area in ("events", "runs"):
        texts = {language: catalog_of(language, area) for language in ("en", "es")}
        assert texts["en"].keys() == texts["es"].keys()
        for key, english in texts["en"].items():
            braces = [Counter(re.findall(r"\{(\w+)\}", text)) for text in (english, texts["es"][key])]
            assert braces[0] == braces[1], key


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("language", "said"), [("en", "Finishing this step"), ("es", "Terminando este paso")])
def test_at_a_terminal_ctrl_c_is_answered_and_the_run_saved(tmp_path, language, said):
    import pty

    child = Path(__file__).with_name("child_run.py")
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(COLUMNS="100", LINES="30", TERM="xterm-256color")
        os.execv(
            sys.executable,
            [sys.executable, str(child), str(tmp_path), "look=rich", f"lang={language}", "steps=50", "step=0.4"],
        )
    screen = read_until(terminal, "lr 1e-4")
    os.write(terminal, b"\x03")
    screen += read_until(terminal, None)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    os.close(terminal)
    text = without_ansi(screen)
    assert text.count(said) == 1
    assert "━" in text
    assert screen.rfind("\x1b[?25h") > screen.rfind("\x1b[?25l")
    assert read_run(tmp_path).state == "stopped"


def read_until(terminal: int, needle: str | None) -> str:
    """What the terminal shows until `needle` appears; None: until the other side is closed."""
    seen, end = b"", time.monotonic() + 60
    while time.monotonic() < end and (needle is None or needle not in seen.decode("utf-8", "replace")):
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                chunk = os.read(terminal, 65536)
            except OSError:  # Linux says so when the child has left
                break
            if not chunk:
                break
            seen += chunk
    return seen.decode("utf-8", "replace")


def screen_after(output: str) -> list[str]:
    """The lines that a terminal shows in the end. Knows the few controls that the live console uses."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1])
        elif part == "\r" or part.startswith("\x1b"):
            assert part == "\r" or part[-1] in "mhl", part
        else:
            lines[row] += part  # rows are always written from their beginning, after being erased
    return [line.rstrip() for line in lines if line.strip()]


def without_ansi(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def catalog_of(language: str, area: str) -> dict[str, str]:
    known = catalog(language)
    path = Path(sys.modules["simpletuner"].__file__).parent / "locales" / language / f"{area}.json"
    texts = json.loads(path.read_text(encoding="utf-8"))
    assert all(known[key] == text for key, text in texts.items())
    return texts


def test_the_loss_of_regularisation_has_a_figure_of_its_own(story):
    steps = [record for record in story if isinstance(record.event, t.StepFinished)]
    told = [replace(record, event=replace(record.event, regularisation_loss=0.25)) for record in steps]
    narrator = Narrator("en")
    lines = [line.text for record in told for line in narrator.tell(record)]
    assert lines
    assert all("loss=0.5000 reg=0.2500 lr=" in line for line in lines)


@pytest.mark.parametrize("is_averaged", [False, True])
def test_the_loss_of_held_out_images_is_a_line_of_its_own(story, is_averaged):
    losses = tuple(t.HeldOutLoss(dataset=name, loss=loss, num_images=4) for name, loss in (("a", 0.5), ("b", 0.25)))
    event = t.EvaluationFinished(
        step=3, loss=0.375, losses=losses, sigmas=(0.5,), seconds=1.25, is_averaged=is_averaged
    )
    lines = Narrator("es").tell(replace(story[0], event=event))
    assert [line.text for line in lines] == [f"eval{'-ema' * is_averaged} step=3 a=0.5000 b=0.2500 s=1.25"]


@pytest.mark.parametrize(("language", "row"), [("en", "validation"), ("es", "validación")])
def test_the_banner_counts_guidance_in_both_ways(story, language, row):
    plan = next(record for record in story if isinstance(record.event, t.RunPlanned))
    sampled = {"validation_num_inference_steps": 8, "validation_guidance": 1.5, "validation_sampling_shift": 3.0}
    narrator = Narrator(language)
    lines = narrator.tell(replace(plan, event=replace(plan.event, **sampled)))
    told = {line.label.strip(): line.text for line in lines}
    assert told[row].endswith("guidance 1.5 (CFG 2.5) · shift 3")
    assert len({len(line.label) for line in lines}) == 1
