"""Comparing and encoding at once gives the change and the bytes that comparing and then encoding gives."""

import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from strategies import changed, pairs, random_bits

from deltawire.errors import DtypeMismatch, FormatError, NeedsBase, ShapeMismatch
from deltawire.format import delta_file
from deltawire.format.codecs import classes_numba, fused, subset, tiles, twins
from deltawire.format.codecs.classes import SCHEMES
from deltawire.format.codecs.subset import Coded
from deltawire.weights import threads
from deltawire.weights.bits import Bits
from deltawire.weights.delta import Delta, between_bits
from deltawire.weights.found import Found

FAST, PLAIN, TORCH = twins.fast(), twins.plain, twins.on_torch()


def same(one: Coded, other: Coded) -> bool:
    assert one.payload.tobytes() == other.payload.tobytes()
    entries = [[(entry.nbytes, entry.dead, entry.lists) for entry in coded.entries] for coded in (one, other)]
    return (one.tile, one.by_class) == (other.tile, other.by_class) and entries[0] == entries[1]


def check(old: Bits, new: Bits, twin: twins.Twin) -> None:
    expected = between_bits(old, new)
    for base in (None, old.data):
        delta, coded = fused.compare(old, new, by_class=base is not None, twin=twin)
        assert delta == expected
        assert coded.changed == expected.changed
        if delta.changed:
            assert same(coded, subset.encode(expected, base, twin=PLAIN))


@given(pairs())
def test_numba_finds_and_writes_what_numpy_does_apart(pair):
    check(*pair, FAST)


@settings(max_examples=25)
@given(pairs())
def test_so_does_numpy_at_once(pair):
    check(*pair, PLAIN)


@settings(max_examples=8)
@given(pairs())
def test_and_torch(pair):
    check(*pair, TORCH)


@pytest.mark.parametrize("dtype", [*SCHEMES, "U8", "I64"])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 1023, 1024, 1025, 1024 + 63, 5000])
def test_every_width_at_the_limits_of_what_a_loop_takes_at_a_time(dtype, size):
    rng = np.random.default_rng(size)
    old = random_bits(rng, dtype, (size,))
    for how in ("nothing", "everything", "first and last", "a few by one", "half"):
        check(old, changed(rng, old, how), FAST)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 1.0])
def test_every_density_however_often_the_room_for_changes_grows(share):
    rng = np.random.default_rng(0)
    old = random_bits(rng, "BF16", (700, 300))
    new = old.copy()
    new.data[rng.random(old.data.size) < share] += np.uint16(1)
    check(old, new, FAST)


def test_one_class_of_all_elements_and_zeros_alone():
    for value in (0x0000, 0x8000, 0x7FC0, 0x3F80):
        old = Bits("BF16", (3000,), np.full(3000, value, np.uint16))
        new = old.copy()
        new.data[::7] ^= 0x0101
        check(old, new, FAST)


def test_idle_rows_are_left_out_where_that_is_shorter():
    rng = np.random.default_rng(0)
    old = random_bits(rng, "BF16", (1000, 256))
    new = old.copy()
    live = rng.choice(1000, 100, replace=False)
    new.data.reshape(1000, 256)[live, ::30] += 1
    check(old, new, FAST)
    assert fused.compare(old, new, by_class=True)[1].entries[0].dead == 900


@pytest.mark.parametrize("cores", [1, 2, 3, 16])
def test_threads_that_share_a_tensor_s_tiles_give_its_change_in_order(cores, monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: cores)
    monkeypatch.setattr(tiles, "TARGET", 4096)
    rng = np.random.default_rng(cores)
    old = random_bits(rng, "BF16", (1001, 64))
    assert len(list(tiles.grid(old.shape, tiles.choose(old.shape)))) == 16
    new = changed(rng, old, "a few by one")
    new.data[20_000:40_000] = old.data[20_000:40_000]  # some tiles have no change
    check(old, new, FAST)


def test_weights_written_while_they_are_compared_are_encoded_as_they_are_when_read(monkeypatch):
    old, new = Bits("BF16", (5000,), np.zeros(5000, np.uint16)), Bits("BF16", (5000,), np.ones(5000, np.uint16))
    real, stops = classes_numba._compare, []

    def compare(*arguments):
        stopped = real(*arguments)
        stops.append(stopped[0])
        new.data[:] = 3
        return stopped

    monkeypatch.setattr(classes_numba, "_compare", compare)
    delta, coded = fused.compare(old, new, by_class=True)
    assert 0 < stops[0] < 5000
    assert delta.increments.tolist() == [1] * stops[0] + [3] * (5000 - stops[0])
    assert same(coded, subset.encode(delta, old.data, twin=PLAIN))


def test_two_threads_in_one_pass_both_find_their_own():
    rng = np.random.default_rng(3)
    old = random_bits(rng, "BF16", (400, 1000))
    news = [changed(rng, old, "a few by one") for _ in range(2)]
    barrier, found = threading.Barrier(2), {}

    def work(k: int) -> None:
        barrier.wait()
        found[k] = fused.compare(old, news[k], by_class=True)

    workers = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for k, new in enumerate(news):
        delta, coded = found[k]
        assert delta == between_bits(old, new)
        assert same(coded, subset.encode(delta, old.data))


def test_other_dtypes_and_shapes_are_refused():
    old = random_bits(np.random.default_rng(0), "BF16", (4, 4))
    with pytest.raises(DtypeMismatch):
        fused.compare(old, Bits("F16", (4, 4), old.data), by_class=True)
    with pytest.raises(ShapeMismatch):
        fused.compare(old, Bits("BF16", (16,), old.data), by_class=True)


@pytest.mark.parametrize("codec", ["subset", "class"])
def test_a_file_of_what_was_coded_already_is_the_file_of_the_change(codec):
    rng = np.random.default_rng(0)
    old = {name: random_bits(rng, dtype, (50, 40)) for name, dtype in (("a", "BF16"), ("b", "I32"), ("c", "F8_E4M3"))}
    new = {
        name: changed(rng, bits, how)
        for (name, bits), how in zip(old.items(), ("half", "half", "a few by one"), strict=True)
    }
    done = {name: fused.compare(old[name], new[name], by_class=codec == "class") for name in old}
    delta = Delta({name: change for name, (change, _) in done.items()})
    coded = {name: own for name, (_, own) in done.items()}
    assert delta_file.encode(delta, codec=codec, coded=coded) == delta_file.encode(delta, codec=codec, base=old)
    del coded["a"]
    data = delta_file.encode(delta, codec=codec, coded=coded)
    assert delta_file.decode(data, base=old) == delta
    assert delta_file.read_header(data).encodings[0] in ("subset", "dense")


def test_what_was_coded_for_another_file_or_of_another_change_is_refused():
    rng = np.random.default_rng(0)
    old = random_bits(rng, "BF16", (5000,))
    delta, coded = fused.compare(old, changed(rng, old, "a few by one"), by_class=True)
    both = Delta({"w": delta + fused.compare(old, changed(rng, old, "half"), by_class=False)[0]})
    for codec in ("subset", "gap", "raw"):
        with pytest.raises(FormatError, match=f"coded for another codec than '{codec}'"):
            delta_file.encode(Delta({"w": delta}), codec=codec, base={"w": old}, coded={"w": coded})
    with pytest.raises(FormatError, match="the delta has others"):
        delta_file.encode(both, codec="class", coded={"w": coded})
    with pytest.raises(NeedsBase):
        delta_file.encode(both, codec="class")
    with pytest.raises(NeedsBase):
        delta_file.encode(both, codec="raw", coded={})


def test_found_changes_are_kept_in_memory_of_their_size():
    found = Found(1 << 20, np.dtype(np.uint16))
    found.append(np.arange(40_000), np.ones(40_000, np.uint16))
    positions, steps = found.take()
    assert (positions.tolist(), set(steps.tolist())) == (list(range(40_000)), {1})
    assert positions.base is steps.base is None


WARM = """
import gc
import numpy as np
from numba.core.registry import CPUDispatcher
from deltawire.format.codecs import fused
from deltawire.weights.bits import Bits

def compiled():
    return {(loop.__name__, str(own)) for loop in gc.get_objects() if isinstance(loop, CPUDispatcher)
            for own in loop.signatures}

fused.warm_up(["BF16", "U16"], by_class=True)
before = compiled()
old = Bits("BF16", (300, 1000), np.arange(300_000, dtype=np.uint16))
new = old.copy()
new.data[:9000] += 3
for by_class in (False, True):
    change, _ = fused.compare(old, new, by_class=by_class)
    change.apply_(old.copy().data)
print(len(before), compiled() - before)
"""


def test_once_it_is_warm_no_publish_compiles_anything():
    done = subprocess.run([sys.executable, "-c", WARM], capture_output=True, text=True, check=True, timeout=240)
    loops, more = done.stdout.split(maxsplit=1)
    assert int(loops) > 5, done.stdout
    assert more.strip() == "set()"


@pytest.mark.parametrize("by_class", [False, True])
def test_room_is_made_for_what_changes_whatever_the_number_of_tiles(by_class, monkeypatch):
    monkeypatch.setattr(fused.threads, "cores", lambda: 1)
    old = random_bits(np.random.default_rng(0), "BF16", (64 * 60, 64))
    new = old.copy()
    new.data[np.arange(old.data.size) % 5 != 0] += 1
    tracemalloc.start()
    change, coded = fused.compare(old, new, by_class=by_class, tile=(64, 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (change.changed, len(coded.entries)) == (old.data.size * 4 // 5, 60)
    assert peak < 10 * 4 * change.changed * 4, "positions and steps, and four times their room"
