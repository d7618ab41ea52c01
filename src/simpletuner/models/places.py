"""What a user's string names: a folder or file here, or a repository of the hub, or one file in it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from simpletuner.models.files import GGUF_SUFFIX
from simpletuner.models.hub import RepoRef
from simpletuner.problems import Fix, ModelError, Problem

WEIGHTS_SUFFIX = ".safetensors"
_SINGLE_SUFFIXES = (WEIGHTS_SUFFIX, GGUF_SUFFIX)
OTHER_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")  # of weights that are not read

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_REPO = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?P<file>(?:/[^/\\]+)*\.(?:safetensors|gguf))?")
_NUM_NEAR = 3


@dataclass(frozen=True, kw_only=True)
class Place:
    """One of three: `path`; or `repo`; or `repo` and `file`, a file's name within it. `option` gave it."""

    text: str
    option: str
    path: Path | None = None
    repo: RepoRef | None = None
    file: str | None = None

    @property
    def is_single_file(self) -> bool:
        return self.file is not None or (self.path is not None and self.path.is_file())


def find_place(text: str, *, option: str, revision: str | None = None) -> Place:
    """Read the value of `option`. What exists here comes first, then "owner/name" and "owner/name/file.safetensors".

    Raises:
        ModelError: E-MODEL-FORMAT, a file of another kind than safetensors and GGUF; E-MODEL-PATH or E-MODEL-PATH-NEAR,
            nothing is there, without or with names in that folder that look alike.
    """
    path = Path(text).expanduser()
    if path.is_file() and path.suffix.lower() not in _SINGLE_SUFFIXES:
        raise ModelError(Problem(code="E-MODEL-FORMAT", params={"path": path}, path=f"/{option}"))
    if path.exists():
        return Place(text=text, option=option, path=path)
    match = _REPO.fullmatch(text)
    if match is None or match["repo"].endswith(_SINGLE_SUFFIXES):
        raise _nothing_there(path, option)
    file = match["file"]
    repo = RepoRef(name=match["repo"], revision=revision, option=option)
    return Place(text=text, option=option, repo=repo, file=file.lstrip("/") if file else None)


def public_name(text: str) -> str:
    """What a file that is given away may say of a model: a repository as it is, of a path only the last name."""
    path = Path(text).expanduser()
    if not path.exists() and _REPO.fullmatch(text):
        return text
    return Path(os.path.abspath(path)).name  # noqa: PTH100 (".." is to go, links are to stay)


def _nothing_there(path: Path, option: str) -> ModelError:
    existing = next((parent for parent in path.absolute().parents if parent.is_dir()), Path.cwd())
    first_missing = path.absolute().relative_to(existing).parts[0]
    names = {entry.name.lower(): entry.name for entry in existing.iterdir()}
    near = [names[name] for name in get_close_matches(first_missing.lower(), names, n=_NUM_NEAR, cutoff=0.5)]
    params = {"path": path, "missing": first_missing, "folder": existing, "near": ", ".join(near)}
    code = "E-MODEL-PATH-NEAR" if near else "E-MODEL-PATH"
    fixes = [Fix(key=option, value=str(existing / name)) for name in near]
    return ModelError(Problem(code=code, params=params, path=f"/{option}", fixes=fixes))
