"""Tests of live memory run twice: as host memory, and as an accelerator's, whose part torch plays on the CPU."""

import pytest

from deltawire.live import accelerator


@pytest.fixture(params=["host", "accelerator"])
def held_on(request, monkeypatch):
    """What holds the model."""
    if request.param == "accelerator":
        monkeypatch.setattr(accelerator, "ON_HOST", frozenset())
    return request.param


@pytest.fixture
def on_accelerator(monkeypatch):
    """The model is held by an accelerator."""
    monkeypatch.setattr(accelerator, "ON_HOST", frozenset())
