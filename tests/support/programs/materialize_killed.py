"""Materializes and is killed at a version: URL FOLDER VERSION."""

import os
import signal
import sys

from deltawire import materialize, open_bucket


def die(update):
    if update.position.version == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)


materialize(open_bucket(sys.argv[1]), sys.argv[2], on_update=die)
