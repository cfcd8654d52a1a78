"""Beside the model an accelerator gives us one block of memory: what does not fit goes through it in pieces."""

from contextlib import contextmanager

import pytest
import small
import torch
from small import Fused, Shard, SmallRun, make_weights
from stub_engine import StubEngine
from test_worker import attached, commit, fail_in_the_middle, mismatched, status, version_of, worker_of

import deltawire as dw
from deltawire.errors import EngineUnsupported
from deltawire.follow.follower import Follower
from deltawire.live import accelerator, arena, changes
from deltawire.live.accelerator import Accelerator, Accelerators
from deltawire.live.arena import DEFAULT, VARIABLE, Arena, bytes_for, most_in, wanted_size
from deltawire.live.boxes import LiveBox
from deltawire.live.digests import Place, digests_of
from deltawire.live.memory import Memory
from deltawire.live.writes import Fill, ScatterTogether
from deltawire.vllm.client import EngineClient

CPU = torch.device("cpu")
TINY = arena.LEAST
"""bytes; a thirtieth of the model"""
ENOUGH = 1 << 20


@pytest.fixture
def run(on_accelerator, monkeypatch):
    """A run of a model of 32 KiB, which accelerators hold."""
    monkeypatch.setattr(small, "COLUMNS", 1000)
    with SmallRun() as run:
        yield run


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setenv(VARIABLE, str(TINY))


def staged(worker, run, version):
    """The writes of an update that is ready."""
    worker.live.make_ready(run.url, version)
    return worker.live.staged.plan.writes


def accelerator_of(worker) -> Accelerator:
    return worker.live.accelerators.of(small.DEVICE)


def test_rooms_never_overlap_nor_leave_the_block_and_are_free_again_when_dropped():
    block = Arena(CPU, 4096)
    assert block.window_bytes == 512
    rooms = [block.room(1000) for _ in range(4)]
    assert rooms.pop() is None
    taken = [block.window().take(512, torch.uint8), *(room.take(250, torch.int32) for room in rooms)]
    for number, part in enumerate(taken):
        part.fill_(number)
    assert [part.unique().tolist() for part in taken] == [[0], [1], [2], [3]]
    assert len({part.untyped_storage().data_ptr() for part in taken}) == 1
    del rooms[1:]
    assert block.room(2561) is None
    assert block.room(2560) is not None


@pytest.mark.parametrize("kinds", [(torch.int32,), (torch.int32, torch.int32, torch.uint8, torch.uint8)])
@pytest.mark.parametrize("size", [256, 257, 1000])
def test_as_many_elements_as_a_room_has_place_for_fit_in(kinds, size):
    count = most_in(size, *kinds)
    assert 0 <= size - bytes_for(count, *kinds) <= 2 * arena.APART * len(kinds)


@pytest.mark.parametrize(
    ("text", "size"),
    [("", DEFAULT), ("0", 0), ("1048576", 1 << 20), ("3MiB", 3 << 20), ("2 GiB", 2 << 30), ("8KiB", 1 << 13)],
)
def test_the_environment_says_how_large_the_block_is(text, size, monkeypatch):
    monkeypatch.setenv(VARIABLE, text)
    assert wanted_size() == size


@pytest.mark.parametrize("text", ["much", "-1", "12", "1.5GiB", "3MB"])
def test_what_is_no_size_is_refused_when_the_server_starts(text, monkeypatch):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(EngineUnsupported, match=f"{VARIABLE}={text} is no size"):
        Accelerators()


def test_no_more_is_taken_than_a_small_model_can_use(on_accelerator):
    taken = Accelerators()
    taken.take_for([torch.zeros(1000, dtype=torch.bfloat16, device=on_accelerator)])
    assert taken.of(on_accelerator).arena.size == 32_000


def test_nothing_is_taken_for_what_host_memory_holds():
    host = Accelerators()
    host.take_for([torch.zeros(1000), torch.zeros(1000, device="meta")])
    assert (host.of(CPU), host._known) == (None, {})


@pytest.mark.usefixtures("tiny")
def test_foreign_weights_join_through_an_arena_far_smaller_than_the_model(run):
    model = Fused(make_weights(seed=9))
    before = model.served()
    run.publish(a=1, v=1)
    worker = attached(run, model)
    writes = staged(worker, run, 1)
    assert (accelerator_of(worker).arena.size, {type(write) for write in writes}) == (TINY, {Fill})
    assert max(write.new.nbytes for write in writes) <= accelerator_of(worker).arena.window_bytes
    assert dw.equal(model.served(), before)
    assert commit(worker, run, 1) is None
    assert dw.equal(model.served(), run.versions[1])
    assert mismatched(worker) == []
    assert worker.live.take_back()
    assert dw.equal(model.served(), before)
    assert version_of(worker) is None


@pytest.mark.parametrize(("size", "fits"), [(TINY, False), (ENOUGH, True), (0, True)], ids=["tiny", "enough", "none"])
def test_an_update_that_fits_is_written_at_once_and_one_that_does_not_crosses_in_runs(run, size, fits, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(size))
    model = run.model()
    worker = attached(run, model)
    run.publish(a=1, b=-1, v=1)
    (write,) = staged(worker, run, 1)
    assert isinstance(write, ScatterTogether)
    assert (write.room is not None, len(write.runs) == 1) == (fits, fits)
    assert dw.equal(model.served(), run.versions[0])
    assert commit(worker, run, 1) is None
    assert dw.equal(model.served(), run.versions[1])
    assert worker.live.take_back()
    assert dw.equal(model.served(), run.versions[0])
    assert (version_of(worker), mismatched(worker)) == (0, [])
    run.publish(b=1)
    assert commit(worker, run, 2) is None
    assert mismatched(worker) == []
    assert dw.equal(model.served(), run.versions[2])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("few", [0, changes.FEW])
def test_a_change_of_every_element_crosses_in_pieces(run, few, monkeypatch):
    monkeypatch.setattr(changes, "FEW", few)
    model = run.model()
    worker = attached(run, model)
    run.weights["b"] += 1
    run.publish(a=1)
    kinds = {type(write) for write in staged(worker, run, 1)}
    assert kinds == ({ScatterTogether} if few else {ScatterTogether, Fill})
    assert commit(worker, run, 1) is None
    assert dw.equal(model.served(), run.versions[1])
    assert worker.live.take_back()
    assert (version_of(worker), mismatched(worker)) == (0, [])


@pytest.mark.parametrize("size", [TINY, ENOUGH])
@pytest.mark.parametrize("since", [0, None], ids=["from a version", "from the anchor"])
def test_a_write_that_fails_in_the_middle_is_put_back_bit_for_bit(run, since, size, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(size))
    model = run.model() if since == 0 else Fused(run.versions[0] | {"a": run.versions[0]["a"].clone()})
    if since is None:
        model.ab.data[1, ::9] = 42.0
    worker = attached(run, model)
    digests = worker.live.attached.live.digests()
    run.publish(a=1, b=-1, v=1)
    with monkeypatch.context() as broken:
        fail_in_the_middle(broken)
        assert commit(worker, run, 1) == "RuntimeError"
    assert worker.live.attached.live.digests() == digests
    assert (version_of(worker), worker.live.quarantined) == (since, False)
    assert commit(worker, run, 1) is None
    assert dw.equal(model.served(), run.versions[1])


def test_rooms_are_free_again_once_an_update_is_confirmed(run, monkeypatch):
    worker = attached(run, run.model())
    block = accelerator_of(worker).arena
    monkeypatch.setattr(block, "_free", [(block.size - 20_000, block.size)])  # two updates of 8,000 B and no third
    for version in range(1, 6):
        run.publish(a=1)
        (write,) = staged(worker, run, version)
        assert write.room is not None
        del write
        assert commit(worker, run, version) is None


@pytest.mark.usefixtures("tiny")
def test_two_workers_join_and_follow_through_tiny_arenas(run):
    shards = [Shard(make_weights(seed=9), rank) for rank in range(2)]
    with StubEngine(*shards) as engine, Follower(run.url, EngineClient(engine.url)) as follower:
        for version in range(3):
            assert follower.step().version == version
            assert dw.equal(Shard.served(shards), run.versions[version])
            run.publish(a=1, b=-1, v=1)
        with EngineClient(engine.url) as client:
            assert (client.audit().mismatched, client.status().torn) == ([], False)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("new", [True, False], ids=["torch 2.12", "torch 2.11"])
def test_much_pinned_memory_is_given_back_before_more_is_taken(device, new, monkeypatch):
    asked, host = [], Accelerators(0)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: asked.append("CUDA's"), raising=False)
    if new:
        monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: asked.append("any's"), raising=False)
    else:
        monkeypatch.delattr(torch.accelerator, "empty_host_cache", raising=False)
    monkeypatch.setattr(accelerator, "KEPT", 3000)
    monkeypatch.setattr(accelerator, "landing", lambda count, kind, device: torch.empty(count, dtype=kind))
    one = host._known[CPU] = Accelerator(CPU, 0)
    one.device = torch.device(device)
    for _ in range(4):
        one.pinned(300, torch.int32)
        host.give_back_pinned()
    assert asked == ([] if device == "cpu" else ["any's" if new else "CUDA's"])


class Stream:
    """A stream that notes what it waits for."""

    def __init__(self, name, notes):
        self.name, self._notes = name, notes

    def wait_stream(self, other):
        self._notes.append(f"{self.name} waits for {other.name}")

    def synchronize(self):
        self._notes.append(f"the host waits for {self.name}")


@pytest.fixture
def streams(monkeypatch):
    """The model's stream and ours, and what they note."""
    if torch.cuda.is_available():
        pytest.skip("stand-ins for the streams of a GPU, where there is none")
    notes, current = [], []
    models, ours = Stream("the model's", notes), Stream("ours", notes)

    @contextmanager
    def on(stream):
        current.append(stream)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1] if current else models)
    return ours, notes


def test_staging_waits_for_the_models_stream_and_that_never_for_staging(run, streams):
    """The host waits for what it wrote: then it is there for every stream, and its memory may be used again."""
    ours, notes = streams
    worker = attached(run, run.model())
    accelerator_of(worker)._stream = ours
    run.publish(a=1)
    staged(worker, run, 1)
    assert set(notes) == {"ours waits for the model's", "the host waits for ours"}
    assert notes[-1] == "the host waits for ours"
    for act in (lambda: commit(worker, run, 1), worker.live.take_back):
        notes.clear()
        act()
        assert notes == ["the host waits for the model's"]
    assert (version_of(worker), status(worker).error) == (0, None)


def test_what_threads_read_of_an_accelerator_waits_for_what_was_queued_on_the_callers_stream(streams, on_accelerator):
    """Weights in another width than the checkpoint's are read by threads, whose current streams are others."""
    ours, notes = streams
    live, accelerators = torch.zeros(30, device=on_accelerator), Accelerators(TINY)
    accelerators.of(live.device)._stream = ours
    digests_of([Place(Memory(live, 16, accelerators.of(live.device)), LiveBox((30,), 0, (1,), "w", 0, (1,)))])
    assert notes[0] == "the host waits for the model's"


def test_what_failed_while_it_used_the_window_is_over_before_another_may(streams):
    one = Accelerator(CPU, TINY)
    one._stream, notes = streams
    with pytest.raises(IndexError), one.beside():
        raise IndexError
    assert notes == ["ours waits for the model's", "the host waits for ours"]
    notes.clear()
    with pytest.raises(IndexError), one.crossing():
        raise IndexError
    assert notes == ["the host waits for the model's"]


def test_the_block_is_taken_before_a_server_measures_what_is_left_for_requests(run):
    assert list(worker_of(run.model()).live.accelerators._known) == [
        small.DEVICE
    ]  # vLLM makes its worker when it has loaded


def test_nobody_uses_the_window_while_another_thread_may(run, monkeypatch):
    """A job that was left to itself goes on when its store answers, perhaps while another update is written."""
    monkeypatch.setenv(VARIABLE, str(TINY))
    monkeypatch.setattr(changes, "FEW", 0)
    model, used, window = Fused(make_weights(seed=9)), [], Arena.window
    worker = attached(run, model)
    accelerator = accelerator_of(worker)

    def watched(block):
        used.append(accelerator._window_is_mine._is_owned())
        return window(block)

    monkeypatch.setattr(Arena, "window", watched)
    for version in range(3):
        assert commit(worker, run, version) is None
        run.weights["b"] += 1
        run.publish(a=1)
    assert worker.live.take_back()
    assert mismatched(worker) == []
    assert len(used) > 100
    assert all(used)


@pytest.mark.usefixtures("tiny")
def test_a_worker_made_in_inference_mode_updates_outside_of_it_and_the_other_way_round(run):
    model = Fused(make_weights(seed=9))
    with torch.inference_mode():
        worker = attached(run, model)
    assert commit(worker, run, 0) is None
    run.publish(a=1)
    with torch.inference_mode():
        assert commit(worker, run, 1) is None
    run.publish(b=1)
    worker.live.make_ready(run.url, 2)
    with torch.inference_mode():
        assert commit(worker, run, 2) is None
    assert worker.live.take_back()
    assert (version_of(worker), mismatched(worker)) == (1, [])
