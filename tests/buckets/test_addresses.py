"""An address is shown without what may be secret in it."""

import pytest

from deltawire.buckets.addresses import is_loopback, parts_of, without_password


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://name:secret@host:80/path", "http://host:80/path"),
        ("name:secret@host:80", "host:80"),
        ("http://na:me:se@cret@host", "http://host"),
        ("http://host/a@b", "http://host/a@b"),
        ("socks5://u:p@10.0.0.1:9", "socks5://10.0.0.1:9"),
        ("host,10.0.0.0/8", "host,10.0.0.0/8"),
    ],
)
def test_an_address_is_shown_without_a_name_and_password(address, shown):
    assert without_password(address) == shown


@pytest.mark.parametrize(
    ("url", "own"),
    [
        ("http://127.0.0.1:1", True),
        ("http://[", False),
        ("http://[::1]/", True),
        ("http://a.localhost", True),
        ("http://10.0.0.1", False),
    ],
)
def test_the_machine_itself_is_known_by_its_names(url, own):
    assert is_loopback(url) == own


def test_a_url_that_cannot_be_read_has_no_host():
    assert parts_of("http://[") == parts_of("") and parts_of("http://[::1]:80").hostname == "::1"
