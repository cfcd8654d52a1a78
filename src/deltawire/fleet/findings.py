"""What a check of the doctor finds: a fact, how grave it is, and the fix."""

from typing import Literal

import msgspec

Level = Literal["ok", "note", "fault"]


class Finding(msgspec.Struct, frozen=True):
    """What one check found: `said` is the fact, `fix` what to do about it."""

    check: str
    level: Level
    said: str
    fix: str | None = None


def ok(check: str, said: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", said)


def note(check: str, said: str, fix: str | None = None) -> Finding:
    """Nothing is broken, but somebody should know."""
    return Finding(check, "note", said, fix)


def fault(check: str, said: str, fix: str) -> Finding:
    """This keeps something from working."""
    return Finding(check, "fault", said, fix)
