"""Every refusal of the operating system has its sentence, in both languages."""

from __future__ import annotations

import errno
import os

import pytest

from simpletuner.events.oserrors import FileSystemError, os_errors_as_problems, problem_from_oserror
from simpletuner.i18n import render_problem

TITLES = {
    errno.ENOSPC: ("The disk is full: out/x could not be written.", "El disco está lleno: no se pudo escribir out/x."),
    errno.EFBIG: (
        "out/x would be larger than its disk or your account allows.",
        "out/x sería mayor de lo que permiten su disco o tu cuenta.",
    ),
    errno.EROFS: ("out/x is on a read-only disk.", "out/x está en un disco de solo lectura."),
    errno.EACCES: ("You have no permission for out/x.", "No tienes permiso para out/x."),
    errno.ENOENT: ("out/x does not exist and cannot be created.", "out/x no existe y no se puede crear."),
    errno.ENOTDIR: (
        "out/x cannot be used as a folder: there is a file in its way.",
        "out/x no sirve como carpeta: hay un archivo en su camino.",
    ),
    errno.EISDIR: ("out/x is a folder where a file is needed.", "out/x es una carpeta donde hace falta un archivo."),
    errno.ENAMETOOLONG: (
        "The path is longer than the system allows: out/x",
        "La ruta es más larga de lo que permite el sistema: out/x",
    ),
    errno.EMFILE: (
        "Too many files are open; out/x could not be opened.",
        "Hay demasiados archivos abiertos; no se pudo abrir out/x.",
    ),
    errno.EIO: (
        f"out/x could not be read or written: {os.strerror(errno.EIO)}.",
        f"No se pudo leer o escribir out/x: {os.strerror(errno.EIO)}.",
    ),
}


@pytest.mark.parametrize("number", TITLES, ids=lambda number: errno.errorcode[number])
def test_each_error_says_what_and_how_to_mend_it(number):
    problem = problem_from_oserror(OSError(number, os.strerror(number)), "out/x")
    for language, expected in zip(("en", "es"), TITLES[number], strict=True):
        title, hint = render_problem(problem, language)
        assert title == expected
        assert hint


@pytest.mark.parametrize(
    ("number", "same_as"),
    [
        (errno.EDQUOT, errno.ENOSPC),
        (errno.EPERM, errno.EACCES),
        (errno.ENFILE, errno.EMFILE),
        (errno.EEXIST, errno.ENOTDIR),
    ],
)
def test_errors_that_mean_the_same_say_the_same(number, same_as):
    assert problem_from_oserror(OSError(number, ""), "x").code == problem_from_oserror(OSError(same_as, ""), "x").code


@pytest.mark.parametrize(("number", "code"), [(112, "E-DISK-FULL"), (19, "E-READ-ONLY"), (5, "E-NO-PERMISSION")])
def test_errors_of_windows(number, code):
    error = OSError(errno.EACCES, "")
    error.winerror = number
    assert problem_from_oserror(error, "x").code == code


def test_an_error_without_a_number_is_told_by_its_text():
    problem = problem_from_oserror(OSError("strange"), "x")
    assert (problem.code, problem.params["reason"]) == ("E-INPUT-OUTPUT", "strange")


def test_a_block_turns_them_into_one_exception(tmp_path):
    with pytest.raises(FileSystemError) as caught, os_errors_as_problems(tmp_path / "none"):
        (tmp_path / "none").read_text()
    assert caught.value.problems[0].code == "E-PATH-NOT-FOUND"
    assert isinstance(caught.value.__cause__, FileNotFoundError)
