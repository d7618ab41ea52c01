"""What all tests share: nothing that a run learns about this machine goes to the user's own folder."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def _state_of_tests(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMPLETUNER_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        yield
