"""An exception that is none of ours, such as a watchdog's, at any line of a publish: what is committed is true."""

import itertools
import signal
import time

import pytest
from faults import Faulty, down, never
from runs import PATIENCE, edit, fresh, model, publish_all, read_weights, served
from watchdog import Watchdog, publish, run_out

from deltawire import Publisher, materialize
from deltawire.weights.tensors import equal


class Alarm:
    """Raises from a real signal handler after so many seconds."""

    def __init__(self, seconds):
        self.seconds, self.where = seconds, None

    def __enter__(self):
        self.before = signal.signal(signal.SIGALRM, run_out)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


def small():
    return {name: tensor for name, tensor in model().items() if tensor.size < 20}


def interrupt(watchdog, begun, base):
    """Publish under a watchdog, then publish other weights; whether it raised, and whether the publisher went on."""
    bucket, weights = fresh(), small()
    pub = Publisher(bucket, base=base)
    try:
        for seed in range(begun):
            edit(weights, seed)
            pub.publish(weights)
        pub.flush(timeout=PATIENCE)
        edit(weights, 7)
        try:
            with watchdog:
                pub.publish(weights)
            raised = False
        except TimeoutError:
            raised = True
        edit(weights, 8, "norm")
        went_on = publish(pub, weights)
    finally:
        pub.close(timeout=PATIENCE)
    if not went_on:
        publish_all(bucket, weights, base=base)
    assert equal(read_weights(bucket, base=base), served(weights)), watchdog.where
    return raised, went_on


@pytest.mark.parametrize(("begun", "on_base"), [(0, False), (0, True), (1, False)], ids=["first", "on a base", "later"])
def test_a_publish_cut_short_at_any_line_ends_in_true_weights_or_says_that_only_a_new_publisher_goes_on(
    begun, on_base, tmp_path, quick_retries
):
    base = a_base(tmp_path) if on_base else None
    went_on = []
    for number in itertools.count(1):
        raised, going = interrupt(Watchdog(number), begun, base)
        if not raised:
            break
        went_on.append(going)
    assert len(went_on) > 100
    assert went_on.count(True) > len(went_on) / 2, "what tears nothing need not stop a publisher"
    assert False in went_on


def test_a_version_under_way_is_committed_wherever_the_next_publish_is_cut_short(quick_retries):
    for number in itertools.count(1):
        bucket, weights = Faulty(fresh()), small()
        bucket.plan, asked = down()
        pub, raised = Publisher(bucket), False
        try:
            pub.publish(weights)
            first = served(weights)
            assert asked.wait(PATIENCE)  # from here on it is under way
            edit(weights, 7)
            with Watchdog(number):
                pub.publish(weights)
        except TimeoutError:
            raised = True
        finally:
            bucket.plan = never
            pub.close(timeout=PATIENCE)
        assert equal(read_weights(bucket, 0), first)
        if not raised:
            break
    assert number > 100


def a_base(folder):
    bucket = fresh()
    publish_all(bucket, small())
    materialize(bucket, folder / "base")
    return folder / "base"


def test_a_real_signal_at_many_moments_of_a_publish_leaves_true_weights_too(quick_retries):
    interrupt(Alarm(PATIENCE), 2, None)  # compiles
    started = time.perf_counter()
    interrupt(Alarm(PATIENCE), 2, None)
    whole = time.perf_counter() - started  # an upper bound of the publish in it
    raised = [interrupt(Alarm(whole * number / 300), 2, None)[0] for number in range(1, 60)]
    assert True in raised


def test_what_a_signal_raises_while_numba_makes_arrays_arrives_as_it_was_raised(quick_retries):
    serialize = pytest.importorskip("numba.core.serialize")
    came = []
    for number in itertools.count(1):
        raised, _ = interrupt(Watchdog(number, {serialize.__file__}), 2, None)
        if not raised:
            break
        came.append(raised)
    assert came
