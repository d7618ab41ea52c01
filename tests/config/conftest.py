"""A project folder in a temporary directory, and the loader on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config import LoadedConfig, load_run_config
from simpletuner.problems import ConfigError, Problem

IMAGES = [{"id": "subject", "instance_data_dir": "datasets/subject"}]


@dataclass(frozen=True, kw_only=True)
class Project:
    """`load` reads the configuration as `simpletuner train` in `folder` would; whether the folders of the datasets
    are there is left to the tests that ask for it."""

    folder: Path
    environ: dict[str, str] = field(default_factory=dict)

    def write(self, name: str, content: object) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2), encoding="utf-8")
        return path

    def load(
        self,
        *argv: str,
        must_run: bool = True,
        check_folders: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> LoadedConfig:
        environ = self.environ if environ is None else environ
        return load_run_config(argv, environ=environ, cwd=self.folder, must_run=must_run, check_folders=check_folders)

    def problems(self, *argv: str, environ: Mapping[str, str] | None = None) -> tuple[Problem, ...]:
        """Everything that was found wrong or worth saying."""
        try:
            return self.load(*argv, environ=environ).warnings
        except ConfigError as error:
            return error.problems

    def codes(self, *argv: str, environ: Mapping[str, str] | None = None) -> list[str]:
        return [problem.code for problem in self.problems(*argv, environ=environ)]

    def problem(self, code: str, *argv: str, environ: Mapping[str, str] | None = None) -> Problem:
        found = [problem for problem in self.problems(*argv, environ=environ) if problem.code == code]
        assert len(found) == 1, f"{code} in {self.codes(*argv, environ=environ)}"
        return found[0]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A folder with a minimal valid config/config.json and config/multidatabackend.json."""
    found = Project(folder=tmp_path)
    found.write("config/config.json", {"validation_disable": True})
    found.write("config/multidatabackend.json", IMAGES)
    return found


@pytest.fixture
def with_config(project: Project) -> Callable[..., Project]:
    """The project with other options in config/config.json."""

    def write(options: Mapping[str, Any] | str | None = None, /, **more: Any) -> Project:
        content = options if isinstance(options, str) else {"validation_disable": True, **(options or {}), **more}
        project.write("config/config.json", content)
        return project

    return write


@pytest.fixture
def with_datasets(project: Project) -> Callable[..., Project]:
    """The project with other datasets; keywords are added to the first image dataset."""

    def write(entries: Sequence[Any] | str | None = None, /, **more: Any) -> Project:
        content = entries if entries is not None else [{**IMAGES[0], **more}]
        project.write("config/multidatabackend.json", content)
        return project

    return write
