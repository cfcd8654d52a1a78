"""The doctor's checks of a vLLM server: its version, plugin, endpoints, and what its worker says of the bucket."""

import json
import socket
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import msgspec

from deltawire.buckets.addresses import is_loopback
from deltawire.buckets.base import Bucket
from deltawire.errors import (
    BadSignature,
    BucketError,
    ChainError,
    DeltaWireError,
    EngineError,
    EngineUnavailable,
    EngineUnsupported,
    OtherRun,
    error_text,
    recorded_error,
    some,
)
from deltawire.fleet.findings import Finding, fault, note, ok
from deltawire.follow.status import ServerStatus
from deltawire.live.lease import TTL
from deltawire.runlog import log
from deltawire.vllm import versions
from deltawire.vllm.client import EngineClient

try:
    import httpx
except ImportError:
    raise ImportError("asking vLLM needs httpx: pip install 'deltawire[follow]'") from None

PATIENCE = 60.0
"""seconds that a worker may take to read the bucket and to compare it with its weights"""
START = "start vLLM with VLLM_SERVER_DEV_MODE=1"
BACKEND = """start vLLM with --weight-transfer-config '{"backend":"deltawire"}'"""


class _Version(msgspec.Struct):
    version: str


def engine(bucket: Bucket, url: str, *, addresses: Iterable[str] | None = None) -> Iterator[Finding]:
    """What is wrong with a server, for following this bucket. `addresses` are those of this host that are not loopback,
    found here by default."""
    with EngineClient(url) as client:
        try:
            yield from _version(client.url)
            client.is_paused()
            yield ok("dev endpoints", "vLLM answers its weight endpoints")
        except EngineUnsupported as error:
            yield fault("dev endpoints", str(error), START)
            return
        except EngineError as error:
            yield fault("engine", str(error), "start vLLM, or name its address with --engine")
            return
        yield _exposed(client.url, own_addresses() if addresses is None else addresses)
        status = yield from _plugin(client)
        if status is not None:
            yield from _worker(bucket, client, status)


def _version(url: str) -> Iterator[Finding]:
    try:
        answer = httpx.get(f"{url}/version", timeout=10, trust_env=not is_loopback(url))
        version = msgspec.json.decode(answer.content, type=_Version).version
    except httpx.HTTPError as error:
        raise EngineUnavailable(f"{url} does not answer ({error}): is vLLM running there?") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        yield note("version", f"{url}/version does not say which vLLM it is", "does vLLM listen there?")
        return
    oldest, newest = versions.TESTED
    if versions.is_tested(version):
        yield ok("version", f"vLLM {version}")
    else:
        said = f"vLLM {version}; deltawire is tested with {oldest} to {newest}"
        yield fault("version", said, f"install vLLM {oldest} to {newest}, or watch the plugin's warning at start")


def _exposed(url: str, addresses: Iterable[str]) -> Finding:
    parts = urlsplit(url)
    fix = "start vLLM with --host 127.0.0.1, and let a proxy in front pass on /v1 alone"
    danger = "anyone there may replace its weights and call its workers"
    if not is_loopback(url):
        return fault("exposure", f"the weight endpoints are used at {parts.hostname}: {danger}", fix)
    for address in addresses:
        host = f"[{address}]" if ":" in address else address
        with suppress(httpx.HTTPError):
            answer = httpx.get(f"{parts.scheme}://{host}:{parts.port or 80}/is_paused", timeout=3, trust_env=False)
            if answer.status_code == 200:
                return fault("exposure", f"the weight endpoints answer at {address} too: {danger}", fix)
    return ok("exposure", "the weight endpoints answer on loopback alone")


def own_addresses() -> list[str]:
    """This host's addresses that others can reach, as far as its names and its routes say."""
    found = set()
    with suppress(OSError):
        found |= {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # of an address that nobody has; nothing is sent
        found.add(probe.getsockname()[0])
    return sorted(str(address) for address in found if not str(address).startswith(("127.", "::1")))


def _plugin(client: EngineClient) -> Generator[Finding, None, ServerStatus | None]:
    """The workers' status, once the plugin and the backend are there."""
    try:
        answers = client.call_workers("deltawire_status", json.dumps({}))
    except EngineUnsupported as error:
        yield fault("plugin", str(error), f"pip install deltawire in vLLM's environment, and {BACKEND}")
        return None
    except EngineError as error:
        yield fault("plugin", str(error), "look at vLLM's log")
        return None
    refused = [answer["refused"] for answer in answers if isinstance(answer, dict) and answer.get("refused")]
    if refused:
        yield fault("backend", f"the plugin is there, and not chosen: {refused[0].get('message')}", BACKEND)
        return None
    yield ok("plugin", f"the plugin is there and chosen, in {len(answers)} workers")
    try:
        return client.status()
    except EngineError as error:
        yield fault("plugin", str(error), "restart vLLM with the deltawire that this host has")
        return None


def _worker(bucket: Bucket, client: EngineClient, status: ServerStatus) -> Iterator[Finding]:
    yield _lease(bucket, status)
    problem = None if status.error is None else recorded_error(msgspec.to_builtins(status.error))
    if status.attached == bucket.url:
        yield from _attached(bucket, client, status, problem)
        return
    try:
        found = _within(PATIENCE, client, bucket)
    except DeltaWireError as error:
        yield _blamed(bucket, client, error)
        return
    yield ok("worker", f"vLLM's worker reaches {bucket.url}")
    yield ok("model", f"its model has the run's {found} tensors; what it serves is no version of it yet")


def _attached(
    bucket: Bucket, client: EngineClient, status: ServerStatus, problem: DeltaWireError | None
) -> Iterator[Finding]:
    """A server that stands on the bucket already."""
    if problem is not None:
        yield _blamed(bucket, client, problem)
    else:
        yield ok("worker", f"vLLM's worker stands on {bucket.url}, at {status.position or 'no version yet'}")
        yield ok("model", "its model has the run's tensors")
    yield from _foreign(bucket, status)
    remade = [module for worker in client.placement() for module in worker.remade]
    if remade:
        said = f"vLLM packs the weights of {len(remade)} modules, and again at every update: {some(remade)}"
        fix = "start vLLM without DELTAWIRE_PREPACK=keep for a shorter pause (padded experts are packed in any case)"
        yield fault("prepacking", said, fix)
    else:
        yield ok("prepacking", "every weight is patched where it lies")


def _foreign(bucket: Bucket, status: ServerStatus) -> Iterator[Finding]:
    """Whether the bucket moved to a run that the server's does not lead to."""
    if status.run is None:
        return
    with suppress(BucketError, ChainError):
        now = log.current_run(bucket)
        if now != status.run and not log.continues(bucket, now, status.run):
            said = f"the server serves run {status.run}, and the bucket moved to {now}, which does not continue it"
            yield fault("run", said, "stop the second trainer, or restart vLLM and the follower for the new run")


def _lease(bucket: Bucket, status: ServerStatus) -> Finding:
    holder = status.lease.holder
    if holder is None:
        return note("lease", "no follower drives this server", f"start `deltawire follow --bucket {bucket.url}`")
    who = f"follower {holder.replica} (pid {holder.pid} on {holder.host}) of {holder.bucket}"
    if status.lease.idle > TTL or holder.is_gone():
        return note("lease", f"{who} was not heard of for {status.lease.idle:.0f} s", "start a follower: it takes over")
    if holder.bucket != bucket.url:
        return fault("lease", f"{who} drives this server", "stop it, or follow with --take-over")
    return ok("lease", f"{who} drives this server")


def _within(seconds: float, client: EngineClient, bucket: Bucket) -> int:
    """How many tensors of the run a worker compared with its own, having read the bucket by itself. Raises what kept it
    from that; EngineUnavailable when that takes too long."""
    client.stopping = threading.Event()
    timer = threading.Timer(seconds, client.stopping.set)
    timer.start()
    try:
        return client.audit(bucket.url).tensors
    finally:
        timer.cancel()


def _blamed(bucket: Bucket, client: EngineClient, error: DeltaWireError) -> Finding:
    """What keeps a worker from following a bucket."""
    said = error_text(error)
    if isinstance(error, BadSignature):
        return fault("signatures", said, "give the follower --trust with the key that signs the run")
    if isinstance(error, BucketError | EngineUnavailable):
        with suppress(EngineError):
            said += client.why_unreached(bucket.url)
        fix = "give vLLM's environment the same store settings and credentials as this host, or --pass-endpoint"
        return fault("worker", f"vLLM's worker does not reach the bucket: {said}", fix)
    if isinstance(error, OtherRun):
        return fault("run", said, "restart vLLM and its follower for the run that the bucket is at")
    fix = "serve the checkpoint that the run was begun from: `deltawire materialize` writes one"
    return fault("model", said, fix)
