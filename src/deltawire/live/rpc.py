"""How a follower and a worker understand each other: one table of verbs, and the number of the protocol they speak.

A request is one JSON object, as text: a verb's record, in which `nonce` names the question. The answer is an object
with that nonce, the worker's rank and the verb's answer, or `refused`. Both name the protocol. A newer deltawire may
add fields, which the other side ignores; any other change takes another protocol.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

import msgspec

from deltawire.errors import BadAnswer, EngineError, OtherProtocol
from deltawire.live import messages as ask

PROTOCOL = 1
"""of the verbs below, their records, and what a follower may expect to have happened after each"""
PREFIX = "deltawire_"
"""of a verb, as the name of a worker's method"""
SHOWN = 200
"""characters of a wrong answer that its error repeats"""

T = TypeVar("T")
W = TypeVar("W")
Q = TypeVar("Q", bound=msgspec.Struct)
A = TypeVar("A", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class Verb(Generic[Q, A]):
    """Something that a worker can be asked, as which record, and the record that it answers."""

    name: str
    request: type[Q]
    answer: type[A]

    def by(self, handle: Callable[[W, Q], A]) -> tuple[str, Callable[[W, object], A]]:
        """The verb's name, and what answers it from a request that was JSON. Raises EngineError for no such request."""
        return self.name, lambda worker, request: handle(worker, request_as(request, self.request))


STATUS = Verb("status", ask.Request, ask.WorkerStatus)
TAKE = Verb("take", ask.Take, ask.Taken)
RELEASE = Verb("release", ask.Request, ask.Done)
HOLDINGS = Verb("holdings", ask.Request, ask.HeldParts)
SET_POSITION = Verb("set_position", ask.SetPosition, ask.Done)
STAGE = Verb("stage", ask.Stage, ask.Accepted)
STAGED = Verb("staged", ask.Request, ask.Digested)
REVERT = Verb("revert", ask.Request, ask.Reverted)
PLACEMENT = Verb("placement", ask.Request, ask.Placed)
ENVIRON = Verb("environ", ask.SeeEnviron, ask.Environ)
BEGIN = Verb("begin", ask.Begin, ask.Accepted)
RESULT = Verb("result", ask.FetchResult, ask.Outcome)
VERBS: Mapping[str, Verb[msgspec.Struct, msgspec.Struct]] = {
    verb.name: verb  # type: ignore[misc]  # each has its own records
    for verb in (
        STATUS,
        TAKE,
        RELEASE,
        HOLDINGS,
        SET_POSITION,
        STAGE,
        STAGED,
        REVERT,
        PLACEMENT,
        ENVIRON,
        BEGIN,
        RESULT,
    )
}


@cache
def version() -> str:
    """The deltawire of this process."""
    return importlib.metadata.version("deltawire")


def request_as(request: object, kind: type[Q]) -> Q:
    """A request that was JSON as its record. Raises EngineError, naming the fields it lacks."""
    try:
        return msgspec.convert(request, kind)
    except msgspec.ValidationError as error:
        own = [name for name in kind.__struct_fields__ if name not in ask.Request.__struct_fields__]
        raise EngineError(f"{kind.__name__} is asked for by {', '.join(own)}: {error}") from None


def answer_as(answer: object, kind: type[T], asked: str) -> T:
    """An answer that was JSON as its record; `asked` is the question, for the error. Raises BadAnswer."""
    try:
        return msgspec.convert(answer, kind)
    except (msgspec.ValidationError, RecursionError, UnicodeError) as error:
        raise bad_answer(asked, error, repr(answer).encode()) from None


def bad_answer(asked: str, error: Exception, came: bytes) -> BadAnswer:
    """The error for an answer that is not the record `asked` should get."""
    shown = ascii(came[:SHOWN].decode(errors="replace"))
    return BadAnswer(f"{asked} got no answer that it should get ({error}); it was {shown}: is that the right server?")


def require_protocol(protocol: object, other: str, *, remedy: str) -> None:
    """Raise OtherProtocol unless this is the protocol spoken here. `other` is who speaks it."""
    if protocol != PROTOCOL:
        raise OtherProtocol(f"{other} speaks protocol {protocol} and this deltawire {version()} {PROTOCOL}: {remedy}")
