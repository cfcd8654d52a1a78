"""The public names: one sorted list, complete, and each with a sentence of its own."""

import inspect
import types

import pytest

import deltawire

PROMISED = {
    "Delta", "Publisher", "Subscriber", "decode", "digest", "encode", "equal", "materialize", "open_bucket",
}  # fmt: skip
"""what programs were told they can call"""


def test_the_public_names_are_sorted_and_stand_once():
    assert list(deltawire.__all__) == sorted(set(deltawire.__all__))


def test_every_public_name_is_listed_and_every_listed_name_is_there():
    public = {
        name
        for name, value in vars(deltawire).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    modules = {name for name, value in vars(deltawire).items() if isinstance(value, types.ModuleType)}
    assert public - set(deltawire.__all__) == set()
    assert all(hasattr(deltawire, name) for name in deltawire.__all__)
    assert set(deltawire.__all__) & modules == set()


def test_what_was_promised_is_public():
    assert set(deltawire.__all__) >= PROMISED


@pytest.mark.parametrize("name", deltawire.__all__)
def test_every_public_name_says_what_it_is(name):
    thing = getattr(deltawire, name)
    assert inspect.getdoc(thing), f"{name} has no docstring"


@pytest.mark.parametrize("name", [n for n in deltawire.__all__ if inspect.isfunction(getattr(deltawire, n))])
def test_no_function_takes_a_third_argument_by_position(name):
    kinds = [parameter.kind for parameter in inspect.signature(getattr(deltawire, name)).parameters.values()]
    assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 3
