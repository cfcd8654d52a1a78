"""A process that publishes four steps and ends without closing its publisher: `leaving.py SCENARIO URL`.

For test_publisher_exit.py, which looks at what is in the bucket afterwards.
"""

import os
import sys

from runs import edit, model

from deltawire import Publisher, Subscriber, open_bucket
from deltawire.buckets.faulty import Faulty, at
from deltawire.publish import publisher


def start(bucket):
    """A publisher that was given four steps, and the weights after them."""
    weights, opened = model(), Publisher(bucket)
    for step in range(4):
        opened.publish(weights, step=step)
        edit(weights, step)
    return opened, weights


def slow(bucket):
    return Faulty(bucket, at("put_new", "", "delay", times=100, seconds=0.3))


def down(bucket):
    return Faulty(bucket, at("put_new", "deltas/", "fail before", times=10**9))


def ends(bucket):
    """Just ends."""
    start(slow(bucket))


def raises(bucket):
    start(slow(bucket))
    raise KeyError("reward")


def stays_down(bucket):
    """The store stays down, and the process waits a second at its end."""
    start(down(bucket))
    publisher.AT_EXIT = 1.0


def forks(bucket):
    """A forked child ends at once; it would say 7 if it closed the publisher."""
    opened, _ = start(slow(bucket))
    child = os.fork()
    if child == 0:
        opened.close = lambda *arguments: os._exit(7)
        sys.exit(0)
    assert os.waitpid(child, 0) == (child, 0)


def publishes_in_a_child(bucket):
    """A forked child tries to publish, and closes its copy of the publisher."""
    opened, weights = start(bucket)
    opened.flush(30)
    child = os.fork()
    if child == 0:
        try:
            with opened:
                opened.publish(weights, step=9)
        except Exception as error:
            sys.stdout.write(f"child: {error}")
            sys.stdout.flush()
        opened.close()
        sys.exit()
    os.waitpid(child, 0)
    opened.publish(weights, step=10)
    opened.close()


def closes_a_reader_in_a_child(bucket):
    """A forked child closes its copy of a reader."""
    opened, _ = start(bucket)
    opened.close()
    with Subscriber(bucket) as subscriber:
        next(subscriber.updates())
        child = os.fork()
        if child == 0:
            subscriber.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert subscriber.anchor_files(0)[0].is_file()
        assert next(subscriber.updates()).anchor["norm"].data.size == 8


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (ends, raises, stays_down, forks, publishes_in_a_child, closes_a_reader_in_a_child)
}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](open_bucket(sys.argv[2], create=True))
