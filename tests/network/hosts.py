"""Hosts of their own on one machine: network namespaces around a router that forwards what a rule allows, no more.

Every link carries `rate` in either direction (a token bucket at both of its ends). Needs root, and ip, tc and nft.
"""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations

TOOLS = {"ip": "iproute2", "tc": "iproute2", "nft": "nftables"}
"""commands, and the packages of Debian and Ubuntu that bring them"""
PROBE = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3]))"


def why_not() -> str | None:
    """Why there can be no hosts here, None if there can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        return f"needs {' and '.join(missing)}: apt-get install {' '.join(missing)}"
    name = f"dw-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"may not make network namespaces here: {made.stderr.strip()}"
    _run("ip", "netns", "delete", name)
    return None


@dataclass(frozen=True)
class Rule:
    """Who may open connections to a port of whom."""

    source: str
    target: str
    port: int

    def __str__(self) -> str:
        return f"{self.source} to {self.target} port {self.port}"


class Network:
    """The hosts while they exist; `network[name]` is a host's address."""

    def __init__(self, tag: str, hosts: Sequence[str]) -> None:
        self._tag = tag
        self._addresses = {name: f"10.77.{number}.2" for number, name in enumerate(hosts, start=1)}

    def __getitem__(self, host: str) -> str:
        return self._addresses[host]

    def inside(self, host: str, *command: str) -> list[str]:
        """The command line that runs a command on a host."""
        return ["ip", "netns", "exec", self._namespace(host), *command]

    def connects(self, source: str, target: str, port: int, timeout: float = 2.0) -> bool:
        """Whether a TCP connection from one host to another comes about."""
        command = [sys.executable, "-I", "-S", "-c", PROBE, self[target], str(port), str(timeout)]
        return subprocess.run(self.inside(source, *command), capture_output=True, check=False).returncode == 0

    def packets(self) -> dict[str, int]:
        """How many packets met each of the router's rules."""
        listing = json.loads(_run(*self.inside("router", "nft", "-j", "list", "table", "inet", "wire")))
        rules = [item["rule"] for item in listing["nftables"] if "rule" in item]
        counted = {rule["comment"]: [part["counter"] for part in rule["expr"] if "counter" in part] for rule in rules}
        return {comment: counter[0]["packets"] for comment, counter in counted.items()}

    def sent_and_received(self, host: str) -> tuple[int, int]:
        """Bytes that the router has taken from a host, and given to it."""
        link = json.loads(_run(*self.inside("router", "ip", "-json", "-statistics", "link", "show", f"to-{host}")))
        counted = link[0]["stats64"]
        return counted["rx"]["bytes"], counted["tx"]["bytes"]

    def _namespace(self, host: str) -> str:
        return f"dw-{self._tag}-{host}"

    def build(self, allowed: Sequence[Rule], rate: str) -> None:
        """Make the namespaces, the links between each and the router, and the router's rules."""
        _run("ip", "netns", "add", self._namespace("router"))
        _run(*self.inside("router", "tee", "/proc/sys/net/ipv4/ip_forward"), text="1")
        shape = f"root tbf rate {rate} burst 64kb latency 100ms"
        for host, address in self._addresses.items():
            namespace, gateway = self._namespace(host), address.removesuffix("2") + "1"
            _run("ip", "netns", "add", namespace)
            self._set_up("router", f"ip link add to-{host} type veth peer name wire netns {namespace}")
            self._set_up("router", f"ip address add {gateway}/24 dev to-{host}", f"ip link set to-{host} up")
            self._set_up("router", f"tc qdisc add dev to-{host} {shape}")
            self._set_up(host, "ip link set lo up", f"ip address add {address}/24 dev wire", "ip link set wire up")
            self._set_up(host, f"tc qdisc add dev wire {shape}", f"ip route add default via {gateway}")
        accept = [
            f"ip saddr {self[rule.source]} ip daddr {self[rule.target]} tcp dport {rule.port} "
            f'counter accept comment "{rule}"'
            for rule in allowed
        ]
        drop = [
            f'ip saddr {self[a]} ip daddr {self[b]} counter drop comment "{a} to {b}, dropped"'
            for a, b in permutations(self._addresses, 2)
        ]
        chain = [
            "type filter hook forward priority 0; policy drop;",
            'ct state established,related counter accept comment "answers"',
            *accept,
            *drop,
        ]
        table = "table inet wire {\nchain forward {\n" + "\n".join(chain) + "\n}\n}\n"
        _run(*self.inside("router", "nft", "-f", "-"), text=table)

    def _set_up(self, host: str, *commands: str) -> None:
        for command in commands:
            _run(*self.inside(host, *command.split()))

    def remove(self) -> None:
        """Delete the namespaces; their links and rules go with them once no process is left inside."""
        for host in [*self._addresses, "router"]:
            subprocess.run(["ip", "netns", "delete", self._namespace(host)], capture_output=True, check=False)


@contextmanager
def network(hosts: Sequence[str], allowed: Sequence[Rule], rate: str) -> Iterator[Network]:
    """Hosts by name, until this ends, however it ends."""
    made = Network(uuid.uuid4().hex[:6], hosts)
    try:
        made.build(allowed, rate)
        yield made
    finally:
        made.remove()


def _run(*command: str, text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
