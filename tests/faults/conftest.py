"""One world of tiny runs for all faults, what an undisturbed run makes of it."""

import pytest
import tiny


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return tiny.World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    """The folder of a run that nothing disturbed, and when each of its phases began, in seconds before its end."""
    runs = tmp_path_factory.mktemp("whole")
    code, printed = world.fork(runs / "warm").wait()
    assert code == 0, printed
    return runs / "warm"
