"""An exception of a stranger's at any line of a publish."""

import dis
import linecache
import sys

from waiting import PATIENCE

from deltawire.errors import DeltaWireError
from deltawire.publish import baseline, capture, comparing, publisher, queue, tracker, uploader

FILES = {module.__file__ for module in (baseline, capture, comparing, publisher, queue, tracker, uploader)}


def run_out(*_):
    raise TimeoutError("the step took too long")


class Watchdog:
    """Raises at the `number`th line that this thread executes in `files`."""

    def __init__(self, number, files=FILES):
        self.left, self.files, self.where = number, files, None

    def __enter__(self):
        sys.settrace(self)

    def __exit__(self, *_):
        sys.settrace(None)

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line" and not leaves_a_block(frame):
            self.left -= 1
            if self.left == 0:
                self.where = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                sys.settrace(None)
                run_out()
        return self


def leaves_a_block(frame):
    """Whether a `with` block has just ended: Python handles no signal between its last line and `__exit__`. An
    exception there would keep the publisher's lock, and its uploader from ending for five seconds."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
    next_up = frame.f_code.co_code[frame.f_lasti]
    return line.startswith("with ") and dis.opname[next_up] in {"LOAD_CONST", "SWAP"}  # at its end, or by a `return`


def publish(pub, weights):
    """Whether the publisher says that it published."""
    try:
        pub.publish(weights)
        pub.flush(timeout=PATIENCE)
    except DeltaWireError as error:
        assert "open a new one" in str(error)
        return False
    return True
