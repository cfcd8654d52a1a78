import pytest

from deltawire.weights.interrupts import as_raised


def test_the_first_cause_of_system_errors_is_raised_and_any_other_error_as_it_is():
    def fail(error, cause=None):
        with as_raised():
            raise error from cause

    for seen, cause in [(SystemError("a result"), None), (KeyError("a key"), ValueError("why"))]:
        with pytest.raises(type(seen)) as caught:
            fail(seen, cause)
        assert caught.value is seen
    inner = SystemError("an array")
    inner.__cause__ = pressed = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as caught:
        fail(SystemError("a tuple"), inner)
    assert caught.value is pressed
