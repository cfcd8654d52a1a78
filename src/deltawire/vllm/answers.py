"""What vLLM's own endpoints answer, as typed records."""

from typing import Any, TypeVar

import msgspec

from deltawire.live.rpc import bad_answer

T = TypeVar("T")


def decoded(body: bytes, kind: type[T], asked: str) -> T:
    """The body of an answer as what it should be; `asked` is the question, for the error. Raises BadAnswer."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_answer(asked, error, body) from None


class Results(msgspec.Struct, frozen=True):
    """The answer of `/collective_rpc`: what each worker answered."""

    results: list[Any]


class Paused(msgspec.Struct, frozen=True):
    """The answer of `/is_paused`."""

    is_paused: bool


class WeightInfo(msgspec.Struct, frozen=True):
    """The answer of `/weight_info`."""

    weight_version: str


class Card(msgspec.Struct, frozen=True):
    """A model or adapter that requests may name, and the folder it was loaded from."""

    id: str
    root: str | None = None


class Models(msgspec.Struct, frozen=True):
    """The answer of `/v1/models`."""

    data: list[Card]


Done = dict[str, Any]
"""of an endpoint that has nothing to tell: an object, whatever is in it"""
