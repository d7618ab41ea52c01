from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.config.load import LoadedConfig, load_run_config


@pytest.fixture
def load_example(tmp_path):
    """A packaged example with other words of the command line, read where neither images nor model are."""

    def load(name: str, *words: str) -> LoadedConfig:
        found = ("--example", name, *words)
        return load_run_config(found, environ={}, cwd=Path(tmp_path), must_run=False, check_folders=False)

    return load
