"""The shell around the program: setting up the environment, and what git leaves alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with a pyproject.toml and an environment whose Python writes down what it was asked to do."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$*" >>"{tmp_path}/asked"\n')
    python.chmod(0o755)
    return tmp_path


def ensure_venv(root: Path, extras: str) -> None:
    code = '. scripts/venv.sh; ensure_venv "$1" "$2"'
    subprocess.run(["bash", "-euc", code, "bash", str(root), extras], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("", ""), ("cuda", "[cuda]"), ("[cuda]", "[cuda]"), ("cuda, peft", "[cuda,peft]"), ("[dev]", "[dev]")],
)
def test_extras_are_written_with_or_without_brackets(clone, written, meant):
    ensure_venv(clone, written)
    (asked,) = (clone / "asked").read_text().splitlines()
    assert asked.endswith(f"--editable {clone}{meant}")


def test_another_spelling_of_the_same_extras_installs_nothing_again(clone):
    for spelling in ("cuda", "[cuda]", " cuda "):
        ensure_venv(clone, spelling)
    assert len((clone / "asked").read_text().splitlines()) == 1


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_passes_over_configurations_of_ones_own_and_keeps_the_templates(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    ours = ["config/config.json.example", "src/simpletuner/examples/demo/config.json"]
    theirs = ["config/my-subject/config.json", "config/my-subject/deep/multidatabackend.json", "config/config.json"]
    for name in ours + theirs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    status = ["git", "-C", str(tmp_path), "ls-files", "--others", "--exclude-standard"]
    listed = subprocess.run(status, check=True, capture_output=True, text=True).stdout.split()
    assert set(listed) == {".gitignore", *ours}
