"""Whatever a client sends that is not true, not allowed or not sound is refused, and nothing of it is kept."""

import json
from pathlib import Path
from urllib.parse import quote

import lz4.frame
import pytest
from hub_client import Answer, Ask
from huggingface_hub import HfApi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xet_builders import chunk_record, nodes, shard, xorb

from deltawire.errors import AccessRefused
from deltawire.hub_server import HubProcess, HubServer
from deltawire.hub_server.xet_hashes import file_hash, to_text, xorb_hash

_fresh = iter(range(1_000_000))


def fresh_chunks(count: int = 3) -> list[bytes]:
    """Chunks no other test has sent."""
    seed = next(_fresh)
    return [f"chunk {seed}/{number} ".encode() * 500 for number in range(count)]


def send_xorb(request_hub: Ask, digest: bytes, data: bytes) -> Answer:
    return request_hub("POST", f"/v1/xorbs/default/{to_text(digest)}", data)


def stored(request_hub: Ask, digest: bytes) -> bool:
    return request_hub("GET", f"/v1/xorb-bytes/{to_text(digest)}").status == 200


@pytest.mark.parametrize("scheme", [0, 1, 2])
def test_a_true_xorb_is_stored_once_in_every_compression(request_hub: Ask, scheme: int) -> None:
    digest, data = xorb(fresh_chunks(), scheme=scheme)
    assert send_xorb(request_hub, digest, data).json() == {"was_inserted": True}
    assert send_xorb(request_hub, digest, data).json() == {"was_inserted": False}
    assert request_hub("GET", f"/v1/xorb-bytes/{to_text(digest)}").body == data


def test_a_footer_is_dropped(request_hub: Ask) -> None:
    digest, data = xorb(fresh_chunks())
    assert send_xorb(request_hub, digest, data + b"XETBLOB" + bytes(200)).status == 200
    assert request_hub("GET", f"/v1/xorb-bytes/{to_text(digest)}").body == data


@pytest.mark.parametrize("scheme", [0, 1, 2])
def test_a_xorb_with_one_flipped_bit_is_refused(request_hub: Ask, scheme: int) -> None:
    digest, data = xorb(fresh_chunks(), scheme=scheme)
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    assert send_xorb(request_hub, digest, bytes(damaged)).status == 400
    assert not stored(request_hub, digest)


def test_a_granted_xorb_is_checked_too_and_its_grant_is_good_once(request_hub: Ask) -> None:
    digest, data = xorb(fresh_chunks())
    name = to_text(digest)

    def upload(body: bytes) -> tuple[str, Answer]:
        grant = request_hub("POST", f"/v1/xorb-grants/default/{name}", json.dumps({"length": len(body)}).encode())
        assert grant.status == 201
        assert request_hub(grant.json()["method"], "/" + grant.json()["url"].split("/", 3)[3], body).status == 200
        commit = f"/v1/xorb-commits/default/{name}/grant/{grant.json()['id']}"
        return commit, request_hub("POST", commit)

    assert upload(data[:-1] + b"?")[1].status == 400
    assert not stored(request_hub, digest)
    commit, answer = upload(data)
    assert answer.json() == {"was_inserted": True}
    assert request_hub("POST", commit).status == 404
    assert request_hub("POST", f"/v1/xorb-grants/default/{name}", b'{"length": 1}').status == 200


def test_an_upload_without_a_grant_and_a_grant_without_an_upload_are_refused(request_hub: Ask) -> None:
    assert request_hub("PUT", "/v1/xorb-uploads/made-up", b"data").status == 404
    name = to_text(xorb(fresh_chunks())[0])
    grant = request_hub("POST", f"/v1/xorb-grants/default/{name}", b'{"length": 10}').json()["id"]
    assert request_hub("POST", f"/v1/xorb-commits/default/{name}/grant/{grant}").status == 404


@pytest.mark.parametrize(
    ("record", "status"),
    [
        pytest.param(b"", 400, id="no chunks"),
        pytest.param(chunk_record(b"abc")[:6], 400, id="cut in a header"),
        pytest.param(chunk_record(b"abc")[:-1], 400, id="cut in a chunk"),
        pytest.param(chunk_record(b"abc", length=4), 400, id="wrong length"),
        pytest.param(chunk_record(b""), 400, id="empty chunk"),
        pytest.param(chunk_record(b"abc", scheme=3, stored=b"abc"), 400, id="unknown compression"),
        pytest.param(b"\1" + chunk_record(b"abc")[1:], 400, id="unknown version"),
        pytest.param(chunk_record(b"abc", scheme=1, stored=b"not lz4"), 400, id="not LZ4"),
        pytest.param(chunk_record(bytes(131_073)), 413, id="a chunk over 128 KiB"),
        pytest.param(
            chunk_record(b"", scheme=1, stored=lz4.frame.compress(bytes(50_000_000)), length=100), 400, id="a bomb"
        ),
        pytest.param(chunk_record(b"a") * 8193, 413, id="too many chunks"),
    ],
)
def test_a_malformed_xorb_is_refused(request_hub: Ask, record: bytes, status: int) -> None:
    assert send_xorb(request_hub, xorb_hash(nodes([b"abc"])), record).status == status


def test_a_body_announced_as_too_long_is_refused_before_it_is_read(request_hub: Ask) -> None:
    name = to_text(xorb(fresh_chunks())[0])
    headers = {"Content-Length": str(1 << 40)}
    assert request_hub("POST", f"/v1/xorbs/default/{name}", None, headers).status == 413
    assert request_hub("POST", "/v2/shards", None, headers).status == 413
    assert request_hub("POST", f"/v1/xorb-grants/default/{name}", b'{"length": 100000000}').status == 413


def test_a_true_shard_makes_its_file_known_and_its_first_chunk_found(request_hub: Ask) -> None:
    chunks = fresh_chunks()
    digest, data = xorb(chunks)
    send_xorb(request_hub, digest, data)
    assert request_hub("POST", "/v2/shards", shard(chunks)).json() == {"type": "result"}
    name = to_text(file_hash(nodes(chunks)))
    plan = request_hub("GET", f"/v2/reconstructions/{name}").json()
    whole = {"start": 0, "end": len(chunks)}
    assert plan["offset_into_first_range"] == 0
    assert plan["terms"] == [{"hash": to_text(digest), "unpacked_length": sum(map(len, chunks)), "range": whole}]
    (fetch,) = plan["xorbs"][to_text(digest)]
    assert fetch["ranges"] == [{"chunks": whole, "bytes": {"start": 0, "end": len(data) - 1}}]
    assert request_hub("GET", fetch["url"], headers={"Range": f"bytes=0-{len(data) - 1}"}).body == data
    first = to_text(nodes(chunks)[0][0])
    for prefix in ("default", "default-merkledb"):
        answer = request_hub("GET", f"/v1/chunks/{prefix}/{first}")
        assert answer.status == 200
        assert digest in answer.body
    assert request_hub("GET", f"/v1/chunks/default/{'0' * 64}").status == 404


def test_a_shard_that_names_a_xorb_nobody_sent_is_refused(request_hub: Ask) -> None:
    chunks = fresh_chunks()
    answer = request_hub("POST", "/v2/shards", shard(chunks))
    assert answer.status == 400
    assert "not stored" in answer.headers["x-error-message"]
    assert request_hub("GET", f"/v2/reconstructions/{to_text(file_hash(nodes(chunks)))}").status == 404


@pytest.mark.parametrize(
    "lie",
    [
        {"file": b"\1" * 32},
        {"verification": b"\1" * 32},
        {"length": 7},
        {"last": 2},
        {"last": 4},
    ],
    ids=["file hash", "verification hash", "segment length", "fewer chunks", "chunks that are not there"],
)
def test_a_shard_that_lies_is_refused(request_hub: Ask, lie: dict[str, bytes | int]) -> None:
    chunks = fresh_chunks()
    send_xorb(request_hub, *xorb(chunks))
    assert request_hub("POST", "/v2/shards", shard(chunks, **lie)).status == 400
    assert request_hub("POST", "/v2/shards", shard(chunks)).status == 200


def test_a_shard_with_other_chunks_than_the_xorb_has_is_refused(request_hub: Ask) -> None:
    chunks, others = fresh_chunks(), fresh_chunks()
    digest, data = xorb(chunks)
    send_xorb(request_hub, digest, data)
    assert request_hub("POST", "/v2/shards", shard(others, xorb=digest)).status == 400


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mangled_shard_is_refused_and_never_an_internal_error(request_hub: Ask, data: st.DataObject) -> None:
    good = bytearray(shard([b"mangled"]))
    at = data.draw(st.integers(0, len(good) - 1))
    mangled = data.draw(
        st.sampled_from(
            [
                bytes(good[:at]),
                bytes(good[:at]) + b"\xff\xff\xff\xff" + bytes(good[at + 4 :]),
                bytes(good[:at]) + bytes([good[at] ^ 0x80]) + bytes(good[at + 1 :]),
            ]
        )
    )
    assert request_hub("POST", "/v2/shards", mangled).status == 400


def test_keys_that_are_no_keys_are_refused_one_by_one(api: HfApi, bucket: str, request_hub: Ask) -> None:
    bad = ["", "/a", "a/", "a//b", "..", "../a", "a/../b", "./a", "a/.", "a\\b", "a\0b", "é" * 600, "\ud800"]
    api.batch_bucket_files(bucket, add=[(b"x", "good")])
    xet_hash = next(iter(api.get_bucket_paths_info(bucket, ["good"]))).xet_hash
    lines = [{"type": "copyFile", "path": path, "xetHash": xet_hash, "mtime": 0} for path in [*bad, "fine"]]
    body = "\n".join(map(json.dumps, lines)).encode()
    answer = request_hub("POST", f"/api/buckets/{bucket}/batch", body)
    assert answer.status == 200
    assert len(answer.json()["failed"]) == len(bad)
    assert [item.path for item in api.list_bucket_tree(bucket, recursive=True)] == ["fine", "good"]


@pytest.mark.parametrize(
    "line",
    [
        {"type": "addFile", "path": "p", "xetHash": "../../etc/passwd", "mtime": 0},
        {"type": "addFile", "path": "p", "mtime": 0},
        {"type": "addFile", "path": "p", "xetHash": "0" * 64},
        {"type": "addFile", "path": "p", "xetHash": "0" * 64, "mtime": 1e300},
        {"type": "addFile", "path": "p", "xetHash": "0" * 64, "mtime": 0, "contentType": "a\r\nSet-Cookie: b"},
        {"type": "renameFile", "path": "p"},
    ],
)
def test_an_operation_that_makes_no_sense_fails_alone(bucket: str, request_hub: Ask, line: dict[str, object]) -> None:
    answer = request_hub("POST", f"/api/buckets/{bucket}/batch", json.dumps(line).encode())
    assert (answer.status, len(answer.json()["failed"])) == (422, 1)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"not json", 400),
        (b'{"type": "deleteFile"}', 400),
        (b"[" * 100_000, 400),
        (b'{"type":"deleteFile","path":"p"}\n' * 1001, 413),
    ],
)
def test_a_batch_that_cannot_be_read_changes_nothing(bucket: str, request_hub: Ask, body: bytes, status: int) -> None:
    good = b'{"type":"addFile","path":"p","xetHash":"%s","mtime":0}\n' % (b"0" * 64)
    assert request_hub("POST", f"/api/buckets/{bucket}/batch", good + body).status == status
    assert request_hub("GET", f"/api/buckets/{bucket}/tree").json() == []


@pytest.mark.parametrize("path", ["../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "..%2fhub.sqlite", "a%00b"])
def test_no_request_reaches_a_file_outside_the_store(bucket: str, request_hub: Ask, path: str) -> None:
    for route in (f"/buckets/{bucket}/resolve/{path}", f"/v1/xorb-bytes/{path}", f"/v2/reconstructions/{path}"):
        answer = request_hub("GET", route)
        assert answer.status in (400, 404)
        assert b"root:" not in answer.body
        assert "x-error-message" in answer.headers


@pytest.mark.parametrize("name", ["..", ".", "%00", "x" * 97, "a%0Ab", "%C3%A9", "..."])
def test_a_bucket_with_an_impossible_name_is_refused(request_hub: Ask, name: str) -> None:
    assert request_hub("POST", f"/api/buckets/me/{name}", b"{}").status == 400


def test_refusals_carry_what_the_client_reads(request_hub: Ask, bucket: str) -> None:
    gone = request_hub("GET", "/api/buckets/me/nowhere")
    assert (gone.status, gone.headers["x-error-code"]) == (404, "RepoNotFound")
    missing = request_hub("HEAD", f"/buckets/{bucket}/resolve/{quote('no/file', safe='')}")
    assert (missing.status, missing.headers["x-error-code"]) == (404, "EntryNotFound")
    assert "no/file" in missing.headers["x-error-message"]
    assert missing.headers["x-request-id"] != gone.headers["x-request-id"]
    assert request_hub("GET", "/no/such/route").status == 404
    assert request_hub("PATCH", f"/api/buckets/{bucket}").status == 405


def test_a_request_may_name_the_whole_address(hub: HubProcess, request_hub: Ask, bucket: str) -> None:
    assert request_hub("GET", f"{hub.url}/api/buckets/{bucket}?x=1").json()["id"] == bucket
    assert request_hub("GET", hub.url).status == 404


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_listening_beyond_loopback_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(AccessRefused, match="users and tokens are needed to listen beyond loopback"):
        HubServer(tmp_path, host)
    assert list(tmp_path.iterdir()) == []
