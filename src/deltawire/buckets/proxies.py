"""HTTP proxies: never in front of this host's own servers, and named when no answer came through one."""

import os
from urllib.request import getproxies, proxy_bypass

from deltawire.buckets.addresses import is_loopback, parts_of, without_password

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def spare_loopback(url: str) -> bool:
    """Keep clients that read the environment from sending requests to this machine's `url` to a proxy.

    Adds to NO_PROXY of this process, which every client reads, those in Rust too; True when it had to. A client that
    exists already may not see it.
    """
    proxied = getproxies().keys() - {"no"}
    if not proxied or not is_loopback(url):
        return False
    there = [part.strip() for part in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")]
    spared = [host for host in (*_LOOPBACK, parts_of(url).hostname or "") if host]
    missing = [host for host in dict.fromkeys(spared) if host not in there]
    both = ",".join(part for part in (*there, *missing) if part)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = both
    return bool(missing)


def proxy_note(url: str, also: tuple[str, ...] = ()) -> str:
    """ " (through the proxy …)" when the environment has one for `url`, else "". `also` are variables that go first."""
    for name in also:
        if address := os.environ.get(name):
            return _note(address, name)
    parts = parts_of(url)
    proxies = getproxies()
    for scheme in (parts.scheme, "all"):
        address = proxies.get(scheme)
        if address and not proxy_bypass(parts.hostname or ""):
            return _note(address, f"{scheme.upper()}_PROXY")
    return ""


def _note(address: str, variable: str) -> str:
    """Without a name or password, which a proxy's address may carry."""
    host = without_password(address).removeprefix("http://").removeprefix("https://").rstrip("/")
    return f" (through the proxy {host} that {variable} names; NO_PROXY lists hosts to reach without it)"
