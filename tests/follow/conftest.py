"""The run that the tests of this folder follow."""

import pytest
from small import SmallRun


@pytest.fixture
def run():
    with SmallRun() as run:
        yield run
