"""Who waits for whom, where no GPU is at hand to wait: streams that only note what is asked of them."""

from contextlib import contextmanager

import pytest
import torch

from deltawire.publish import streams

CUDA = torch.device("cuda", 0)


class Streams:
    """The trainer's stream and ours, and what was asked of them."""

    def __init__(self):
        self.notes, self.current = [], "trainer"

    def named(self, name):
        stream = type("Stream", (), {"name": name})()
        stream.wait_stream = lambda other: self.notes.append(f"{name} waits for {other.name}")
        return stream

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def seen(monkeypatch):
    seen = Streams()
    monkeypatch.setattr(streams, "_stream_on", lambda device: seen.named("ours"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: seen.named(seen.current))
    monkeypatch.setattr(torch.cuda, "stream", seen.on)
    return seen


def test_ours_waits_for_the_trainer_and_the_trainer_for_our_last_read(seen):
    with streams.beside_trainer(CUDA):
        seen.notes.append(f"{seen.current} reads")
    assert seen.notes == ["ours waits for trainer", "ours reads", "trainer waits for ours"]


def test_the_trainer_waits_after_an_error_too(seen):
    with pytest.raises(torch.OutOfMemoryError), streams.beside_trainer(CUDA):
        raise torch.OutOfMemoryError
    assert seen.notes == ["ours waits for trainer", "trainer waits for ours"]
    assert seen.current == "trainer"


def test_memory_of_our_own_is_written_without_waiting(seen):
    with streams.own_stream(CUDA):
        seen.notes.append(f"{seen.current} writes")
    assert seen.notes == ["ours writes"]


def test_what_cannot_be_pinned_lands_in_plain_memory(monkeypatch):
    real = torch.empty

    def no_pages(*sizes, pin_memory=False, **how):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return real(*sizes, **how)

    monkeypatch.setattr(torch, "empty", no_pages)
    assert streams.landing(5, torch.int16, CUDA).numel() == 5
