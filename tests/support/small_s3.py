"""A small S3 over real HTTP that answers as told: what moto cannot do, a store that refuses, conflicts or ignores."""

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass(frozen=True)
class Asked:
    """A request: its method, the object's key ("" for the bucket), its query, headers and the size of its body."""

    method: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]
    size: int


@dataclass(frozen=True)
class Answer:
    """What is said instead of doing it, or with `after`, though it was done; `drop` hangs up without a word."""

    status: int = 503
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False
    drop: bool = False

    @property
    def body(self) -> bytes:
        said = f"<Error><Code>{self.code}</Code><Message>said {self.code}</Message></Error>"
        return said.encode() if self.code else b""


Plan = Callable[[Asked], Answer | None]


def once(method: str, part: str, answer: Answer, *, times: int = 1) -> Plan:
    """The first `times` requests of a method to a key that contains `part`."""
    left = [times]

    def plan(asked: Asked) -> Answer | None:
        if asked.method != method or part not in asked.key or left[0] == 0:
            return None
        left[0] -= 1
        return answer

    return plan


class SmallS3:
    """Objects by key, under any bucket; `asked` are the requests so far. `plan` may be exchanged at any time.

    `conditional`: "yes", "ignored" (If-None-Match is not looked at) or "501". `keep`: whether bodies are kept, or only
    their sizes. `elsewhere`: the address of a server to which every GET of an object is redirected."""

    def __init__(self, *, conditional: str = "yes", keep: bool = True, elsewhere: str | None = None) -> None:
        self.conditional, self.keep, self.elsewhere = conditional, keep, elsewhere
        self.objects: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.asked: list[Asked] = []
        self.plan: Plan = lambda asked: None
        self.lock = threading.Lock()
        self.url = ""

    def requests(self, method: str, part: str = "") -> list[Asked]:
        return [asked for asked in self.asked if asked.method == method and part in asked.key]

    def store(self, key: str, body: bytes) -> None:
        self.objects[key], self.sizes[key] = body if self.keep else b"", len(body)


@contextmanager
def small_s3(store: SmallS3 | None = None, *, path: str = "") -> Iterator[SmallS3]:
    """A server that the environment names as the S3 endpoint; `path` goes before the bucket's name."""
    store = store or SmallS3()
    handler = type("Handler", (_Handler,), {"store": store, "base": path})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, pytest.MonkeyPatch.context() as patch:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        store.url = f"http://127.0.0.1:{server.server_port}{path}"
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": store.url}.items():
            patch.setenv(name, value)
        yield store
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    store: SmallS3
    base = ""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        if not address.path.startswith(self.base + "/"):
            return self.say(404, b"<Error><Code>NoSuchNamespace</Code></Error>")
        key = unquote(address.path.removeprefix(self.base + "/").partition("/")[2])
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, key, query, headers, len(body))
        with self.store.lock:
            self.store.asked.append(asked)
            planned = self.store.plan(asked)
        if planned is None or planned.after:
            with self.store.lock:
                status, said, extra = self.act(asked, body)
        if planned is None:
            return self.say(status, said, extra)
        if planned.drop:
            self.close_connection = True
            return None
        return self.say(planned.status, planned.body, planned.headers)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_any  # noqa: N815

    def act(self, asked: Asked, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if asked.method == "PUT" and "partNumber" in asked.query:
            part = body if self.store.keep else bytes(8) + len(body).to_bytes(8, "big")
            self.store.parts[asked.query["uploadId"]][int(asked.query["partNumber"])] = part
            return 200, b"", {"ETag": f'"{asked.query["partNumber"]}"'}
        if asked.method == "PUT":
            return self.create(asked, body)
        if asked.method == "POST":
            return self.post(asked, body)
        if asked.method == "DELETE":
            if "uploadId" in asked.query:
                self.store.parts.pop(asked.query["uploadId"], None)
            self.store.objects.pop(asked.key, None)
            return 204, b"", {}
        if not asked.key:
            return self.listing(asked)
        if asked.key not in self.store.objects:
            return 404, b"<Error><Code>NoSuchKey</Code></Error>", {}
        if "X-Amz-Signature" in asked.query and "authorization" in asked.headers:
            return 400, b"<Error><Code>InvalidArgument</Code><Message>only one way to sign</Message></Error>", {}
        if self.store.elsewhere is not None and asked.method == "GET" and "X-Amz-Signature" not in asked.query:
            return 302, b"", {"Location": f"{self.store.elsewhere}/signed/{quote(asked.key)}?X-Amz-Signature=abc"}
        if asked.headers.get("if-match", tag := self.about(asked.key)["ETag"]) != tag:
            return 412, b"<Error><Code>PreconditionFailed</Code></Error>", {}
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", asked.headers.get("range", "")):
            whole, (first, last) = self.store.objects[asked.key], map(int, found.groups())
            part = whole[first : last + 1]
            place = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(whole)}"}
            return 206, part, self.about(asked.key) | place
        return 200, self.store.objects[asked.key], self.about(asked.key)

    def create(self, asked: Asked, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if "if-none-match" in asked.headers:
            if self.store.conditional == "501":
                return 501, b"<Error><Code>NotImplemented</Code></Error>", {}
            if self.store.conditional == "yes" and asked.key in self.store.objects:
                return 412, b"<Error><Code>PreconditionFailed</Code></Error>", {}
        self.store.store(asked.key, body)
        return 200, b"", {"ETag": self.about(asked.key)["ETag"]}

    def post(self, asked: Asked, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if "uploads" in asked.query:
            upload = f"u{len(self.store.asked)}"
            self.store.parts[upload] = {}
            return 200, f"<R><UploadId>{upload}</UploadId></R>".encode(), {}
        if "uploadId" in asked.query:
            parts = self.store.parts.pop(asked.query["uploadId"])
            if self.store.keep:
                self.store.store(asked.key, b"".join(parts[number] for number in sorted(parts)))
            else:
                self.store.objects[asked.key] = b""
                self.store.sizes[asked.key] = sum(int.from_bytes(part[8:], "big") for part in parts.values())
            return 200, b'<CompleteMultipartUploadResult><ETag>"whole-1"</ETag></CompleteMultipartUploadResult>', {}
        keys = [element.text or "" for element in ElementTree.fromstring(body).iter() if element.tag.endswith("Key")]
        for key in keys:
            self.store.objects.pop(key, None)
        done = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        return 200, f"<DeleteResult>{done}</DeleteResult>".encode(), {}

    def listing(self, asked: Asked) -> tuple[int, bytes, dict[str, str]]:
        found = ""
        for key in sorted(key for key in self.store.objects if key.startswith(asked.query.get("prefix", ""))):
            found += (
                f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>{self.about(key)['ETag']}</ETag><Size>{self.store.sizes[key]}</Size></Contents>"
            )
        return 200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode(), {}

    def about(self, key: str) -> dict[str, str]:
        digest = hashlib.md5(self.store.objects[key]).hexdigest()
        return {"ETag": f'"{digest}"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}

    def say(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass
