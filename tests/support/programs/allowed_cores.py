"""A process bound to one core: CORE. Prints the cores that a thread of it may use."""

import os
import sys

from deltawire.live import cores

if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[1])})
    sys.stdout.write(str(cores.allowed()))
