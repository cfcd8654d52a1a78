#!/usr/bin/env bash
# Numba: Ctrl-C, or what another signal's handler raises, arrives as a SystemError from a function that returns a tuple
# of arrays, and as itself from one that returns one array.
#
# The compiled code has run to its end, and its wrapper makes Python objects of the results. For an array that runs some
# Python (`numba.core.serialize._numba_unpickle`), and there Python handles a signal that came meanwhile. A wrapper that
# makes a tuple goes on although that raised: the caller gets "returned a result with an exception set", with the
# handler's exception as its cause, two causes deep where it was not the last array.
# The signal is sent here from a profile hook when that function begins, which a real one meets by chance.
#
# Versions: numba 0.68.1, numpy 2.4 (0.65.0 alike).  Seen 2026-11-30:
#   an array: KeyboardInterrupt
#   an array and a number: SystemError, KeyboardInterrupt
#   two arrays: SystemError, SystemError, KeyboardInterrupt
# Fails (1) when these lines change; 2 when the packages cannot be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet numba==0.68.1 "numpy>=2.4,<2.5" || exit 2
"$folder/venv/bin/python" - <<'PY'
import signal
import sys

import numba
import numpy as np


@numba.njit
def doubled(array):
    return array * 2


@numba.njit
def doubled_and_one(array):
    return array * 2, 1


@numba.njit
def doubled_and_next(array):
    return array * 2, array + 1


def ctrl_c(frame, event, _):
    if event == "call" and frame.f_code.co_name == "_numba_unpickle":
        sys.setprofile(None)
        signal.raise_signal(signal.SIGINT)


def raised_by(function):
    array = np.arange(3)
    function(array)  # compiles
    sys.setprofile(ctrl_c)
    try:
        function(array)
    except BaseException as error:
        chain = []
        while error is not None:
            chain.append(type(error).__name__)
            error = error.__cause__
        return ", ".join(chain)
    finally:
        sys.setprofile(None)
    return "nothing"


seen = {
    "an array": raised_by(doubled),
    "an array and a number": raised_by(doubled_and_one),
    "two arrays": raised_by(doubled_and_next),
}
for returned, chain in seen.items():
    print(f"{returned}: {chain}")
expected = ["KeyboardInterrupt", "SystemError, KeyboardInterrupt", "SystemError, SystemError, KeyboardInterrupt"]
sys.exit(list(seen.values()) != expected)
PY
