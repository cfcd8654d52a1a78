"""`deltawire` as people run it: a process of its own."""

import subprocess
import sys


def run_verb(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A verb with its arguments, to its end within a minute; fails unless it ends with this exit code."""
    command = [sys.executable, "-m", "deltawire.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done
