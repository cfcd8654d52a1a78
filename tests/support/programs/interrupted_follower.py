"""A follower's process that gets a signal when it is about to make one call of its server.

Arguments: KILL or STOP, the call, a bucket, a server; then the name of an adapter and the folder of its copies, if the
run is of one. One that is stopped follows on when it is let go on; one that is killed takes one step before.
"""

import os
import signal
import sys

from deltawire.follow.follower import Follower
from deltawire.vllm.adapters import AdapterFollower
from deltawire.vllm.client import EngineClient


def interrupted(url: str, call: str, number: int) -> EngineClient:
    """A client that sends this process a signal before a call."""

    class Interrupted(EngineClient):
        pass

    original = getattr(EngineClient, call)

    def before(*arguments, **options):
        os.kill(os.getpid(), number)
        return original(*arguments, **options)

    setattr(Interrupted, call, before)
    return Interrupted(url)


if __name__ == "__main__":
    how, call, bucket, server, *adapter = sys.argv[1:]
    engine = interrupted(server, call, signal.Signals[f"SIG{how}"])
    if adapter:
        name, folder = adapter
        follower = AdapterFollower(bucket, engine, name, folder=folder)
    else:
        follower = Follower(bucket, engine)
    with follower:
        if how == "KILL":
            follower.step()
        else:
            follower.run()
