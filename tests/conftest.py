"""What all tests share: nothing that a run learns about this machine goes to the user's own folder; the longest begin
first, so that no process waits long for another at the end."""

from __future__ import annotations

import pytest
from hypothesis import settings

USUAL_SLOW_S = 10.0


settings.register_profile("no clock", deadline=None)  # a busy machine is no failure
settings.load_profile("no clock")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Sort by how long tests take, `slow(seconds=...)`. Quick ones of a module stay together, with its fixtures."""
    for item in items:
        if item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
    items.sort(key=_seconds, reverse=True)


def _seconds(item):
    marker = item.get_closest_marker("slow")
    return 0.0 if marker is None else marker.kwargs.get("seconds", USUAL_SLOW_S)


@pytest.fixture(autouse=True, scope="session")
def _state_of_tests(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMPLETUNER_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        yield
