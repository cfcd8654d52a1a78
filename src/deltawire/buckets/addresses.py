"""Addresses of stores and servers: which are this machine's own, and how one is shown."""

import ipaddress
import re
from urllib.parse import SplitResult, urlsplit


def parts_of(url: str) -> SplitResult:
    """A URL taken apart; one that cannot be, as "http://[", has neither scheme nor host."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine itself."""
    host = parts_of(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def without_password(address: str, mark: str = "") -> str:
    """An address without the name and password that may stand before an "@" in it: safe to print. `mark` takes their
    place."""
    return re.sub(r"^((?:[\w+.-]+:)?//)?[^/]*@", rf"\1{mark}", address)
