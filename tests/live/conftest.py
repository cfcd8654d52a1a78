"""Tests of live memory run twice: as host memory, and as an accelerator's. Without a GPU torch plays its part on the
CPU."""

import pytest
import small
import torch

from deltawire.live import accelerator


@pytest.fixture(params=["host", "accelerator"])
def held_on(request):
    """What holds the model."""
    if request.param == "accelerator":
        request.getfixturevalue("on_accelerator")
    return request.param


@pytest.fixture
def on_accelerator(monkeypatch):
    """The model is held by an accelerator; its device."""
    if torch.cuda.is_available():
        monkeypatch.setattr(small, "DEVICE", torch.device("cuda", 0))
    else:
        monkeypatch.setattr(accelerator, "ON_HOST", frozenset())
    return small.DEVICE
