"""A server with users: what is private stays so, refusals are the Hub's, and a hash opens nothing."""

import http.client
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_client import ask, client_environment, run_client
from huggingface_hub import HfApi
from huggingface_hub.errors import BucketBatchError, BucketNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from starlette.responses import JSONResponse
from waiting import until

from deltawire import open_bucket
from deltawire.errors import AccessRefused, FormatError
from deltawire.hub_server import HubServer
from deltawire.hub_server.access import Access, Pass
from deltawire.hub_server.users import read_users

TOKENS = {name: f"token-of-{name}" for name in ("ada", "bob", "eve", "__CI_ROBOT__")}
LAB = {"name": "lab", "private_by_default": True}
USERS = {
    "users": [
        {"name": "ada", "token": TOKENS["ada"], "orgs": [LAB]},
        {"name": "bob", "token": TOKENS["bob"], "orgs": [LAB]},
        {"name": "eve", "token": TOKENS["eve"]},
        {"name": "__CI_ROBOT__", "token": TOKENS["__CI_ROBOT__"]},
    ]
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A server with three users, and a client for each; `api(None)` has no token."""
    folder = tmp_path_factory.mktemp("users")
    (folder / "users.json").write_text(json.dumps(USERS))
    with HubServer(folder / "root", users=folder / "users.json") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in client_environment(folder).items():
            patch.setenv(name, value)
        patch.setenv("HF_ENDPOINT", server.url)

        def api(name):
            return HfApi(endpoint=server.url, token=TOKENS[name] if name else False)

        yield SimpleNamespace(url=server.url, api=api, folder=folder)


def status(call):
    with pytest.raises(HfHubHTTPError) as refused:
        call()
    return refused.value.response.status_code


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def test_a_name_without_a_namespace_is_the_tokens_user(place):
    assert place.api("ada").create_bucket("plain").bucket_id == "ada/plain"
    assert place.api("ada").whoami()["orgs"][0]["name"] == "lab"
    assert "ada/plain" in [bucket.id for bucket in place.api("ada").list_buckets()]
    assert [bucket.id for bucket in place.api("eve").list_buckets()] == []


def test_a_user_may_be_named_like_a_machine(place):
    assert place.api("__CI_ROBOT__").create_bucket("own").bucket_id == "__CI_ROBOT__/own"
    assert place.api("eve").bucket_info("__CI_ROBOT__/own").id == "__CI_ROBOT__/own"


def test_a_namespace_is_one_of_the_users_or_organisations(place):
    assert list(place.api("ada").list_buckets(namespace="eve", search="nothing")) == []
    assert status(lambda: list(place.api("ada").list_buckets(namespace="nobody"))) == 404


def test_a_page_of_buckets_names_none_that_is_private(place):
    for name, private in (("pages-1", False), ("pages-2-secret", True), ("pages-3", False)):
        place.api("bob").create_bucket(name, private=private)
    seen, path = [], "/api/buckets/bob?search=pages&limit=1"
    while path:
        answer = ask(place.url, "GET", path, None, bearer(TOKENS["eve"]))
        seen += [bucket["id"] for bucket in answer.json()]
        link = answer.headers.get("link", "")
        assert "secret" not in link
        path = link.partition(">")[0].removeprefix(f"<{place.url}")
    assert seen == ["bob/pages-1", "bob/pages-3"]
    assert len(list(place.api("bob").list_buckets(search="pages"))) == 3


def test_a_bucket_is_moved_by_its_owner_to_where_he_may_make_one(place):
    ada, eve = place.api("ada"), place.api("eve")
    ada.create_bucket("ada/leaving", private=False)
    ada.create_bucket("ada/hidden", private=True)
    assert status(lambda: eve.move_bucket("ada/leaving", "eve/stolen")) == 403
    assert status(lambda: eve.move_bucket("ada/hidden", "eve/stolen")) == 404
    assert status(lambda: ada.move_bucket("ada/leaving", "eve/present")) == 403
    assert status(lambda: place.api(None).move_bucket("ada/leaving", "ada/x")) == 401
    ada.move_bucket("ada/hidden", "lab/shared")
    assert place.api("bob").bucket_info("lab/shared").private
    assert status(lambda: eve.update_bucket_settings("ada/leaving", private=True)) == 403
    assert not eve.bucket_info("ada/leaving").private


def test_a_reader_of_the_feed_is_sent_away_when_the_bucket_is_closed_to_it(place):
    ada = place.api("ada")
    ada.create_bucket("ada/closing", private=False)
    connection = http.client.HTTPConnection(place.url.removeprefix("http://"), timeout=30)
    connection.request("GET", "/api/buckets/ada/closing/events", headers=bearer(TOKENS["eve"]))
    stream = connection.getresponse()
    assert stream.readline() == b"event: ready\n"
    ada.update_bucket_settings("ada/closing", private=True)
    ada.batch_bucket_files("ada/closing", add=[(b"x", "secret")])
    rest = stream.read()
    connection.close()
    assert b"event: reconnect" in rest
    assert b"secret" not in rest


def test_a_private_bucket_is_not_there_for_others(place):
    place.api("ada").create_bucket("ada/diary", private=True)
    place.api("ada").batch_bucket_files("ada/diary", add=[(b"dear diary", "page")])
    eve = place.api("eve")
    for call in [
        lambda: eve.bucket_info("ada/diary"),
        lambda: list(eve.list_bucket_tree("ada/diary")),
        lambda: list(eve.get_bucket_paths_info("ada/diary", ["page"])),
        lambda: eve.batch_bucket_files("ada/diary", delete=["page"]),
        lambda: eve.delete_bucket("ada/diary"),
        lambda: eve.bucket_info("ada/never-was"),
    ]:
        with pytest.raises(BucketNotFoundError):
            call()
    with pytest.raises(RepositoryNotFoundError):
        eve.get_bucket_file_metadata("ada/diary", "page")
    assert [bucket.id for bucket in eve.list_buckets(namespace="ada") if bucket.private] == []
    assert status(lambda: place.api(None).bucket_info("ada/diary")) == 401
    assert status(lambda: place.api(None).bucket_info("ada/never-was")) == 401
    assert ask(place.url, "GET", "/api/buckets/ada/diary/events", None, bearer(TOKENS["eve"])).status == 404


def test_an_organisations_bucket_is_open_to_its_members_and_private_by_default(place, tmp_path):
    place.api("ada").create_bucket("lab/weights")
    place.api("ada").batch_bucket_files("lab/weights", add=[(b"w" * 1000, "w")])
    assert place.api("bob").bucket_info("lab/weights").private
    place.api("bob").download_bucket_files("lab/weights", [("w", tmp_path / "w")], raise_on_missing_files=True)
    assert (tmp_path / "w").read_bytes() == b"w" * 1000
    with pytest.raises(BucketNotFoundError):
        place.api("eve").bucket_info("lab/weights")
    place.api("bob").create_bucket("lab/open", private=False)
    assert place.api("eve").bucket_info("lab/open").id == "lab/open"


def test_a_public_bucket_is_read_by_all_and_written_by_its_owner(place, tmp_path):
    place.api("ada").create_bucket("ada/paper", private=False)
    place.api("ada").batch_bucket_files("ada/paper", add=[(b"read me", "p")])
    for name in ("eve", None):
        place.api(name).download_bucket_files("ada/paper", [("p", tmp_path / "p")], raise_on_missing_files=True)
        assert (tmp_path / "p").read_bytes() == b"read me"
    assert status(lambda: place.api("eve").batch_bucket_files("ada/paper", delete=["p"])) == 403
    assert status(lambda: place.api("eve").delete_bucket("ada/paper")) == 403
    assert status(lambda: place.api(None).batch_bucket_files("ada/paper", delete=["p"])) == 401
    assert status(lambda: place.api("eve").create_bucket("ada/mine")) == 403
    assert status(lambda: place.api("eve").create_bucket("lab/mine")) == 403


def test_a_token_nobody_has_is_refused_everywhere(place):
    stranger = HfApi(endpoint=place.url, token="token-of-nobody")
    assert status(stranger.whoami) == 401
    assert status(lambda: stranger.bucket_info("ada/paper")) == 401
    assert status(lambda: stranger.create_bucket("x")) == 401


def test_who_may_not_ask_is_refused_before_a_body_is_waited_for(place):
    announced = {"Content-Length": "1000"}
    for method, path in [
        ("POST", "/api/buckets/ada/x"),
        ("POST", "/api/repos/move"),
        ("PUT", "/api/buckets/ada/x/settings"),
        ("POST", "/api/buckets/ada/x/batch"),
        ("POST", "/api/buckets/ada/x/paths-info"),
        ("POST", f"/v1/xorbs/default/{'0' * 64}"),
        ("POST", "/v2/shards"),
    ]:
        assert ask(place.url, method, path, None, announced).status == 401


def test_a_bucket_that_exists_is_answered_with_its_url_to_who_may_make_it(place):
    place.api("ada").create_bucket("ada/twice")
    assert status(lambda: place.api("ada").create_bucket("ada/twice")) == 409
    assert place.api("ada").create_bucket("ada/twice", exist_ok=True).bucket_id == "ada/twice"


def test_deltawire_says_that_a_token_is_refused(place, monkeypatch):
    place.api("ada").create_bucket("ada/run", private=True)
    monkeypatch.setenv("HF_TOKEN", "token-of-nobody")
    with pytest.raises(AccessRefused, match="hf auth login"):
        open_bucket("hf://buckets/ada/run").stat("HEAD.json")


def test_copies_between_buckets_are_of_what_the_user_may_read(place):
    ada, eve = place.api("ada"), place.api("eve")
    ada.create_bucket("ada/source", private=True)
    ada.create_bucket("ada/target")
    eve.create_bucket("eve/loot")
    ada.batch_bucket_files("ada/source", add=[(b"precious" * 99, "gold")])
    ada.copy_files("hf://buckets/ada/source/gold", "hf://buckets/ada/target/copy")
    (copied,) = ada.get_bucket_paths_info("ada/target", ["copy"])
    with pytest.raises(BucketBatchError):
        eve.batch_bucket_files("eve/loot", copy=[("bucket", "ada/source", copied.xet_hash, "gold")])
    line = {"type": "addFile", "path": "gold", "xetHash": copied.xet_hash, "mtime": 0}
    answer = ask(place.url, "POST", "/api/buckets/eve/loot/batch", json.dumps(line).encode(), bearer(TOKENS["eve"]))
    assert answer.status == 422
    assert [*eve.list_bucket_tree("eve/loot")] == []


def test_a_pass_opens_one_bucket_for_one_right_for_a_while(place):
    ada, eve = place.api("ada"), place.api("eve")
    ada.create_bucket("ada/vault", private=True)
    ada.batch_bucket_files("ada/vault", add=[(b"secret" * 999, "s")])
    eve.create_bucket("eve/own")
    (info,) = ada.get_bucket_paths_info("ada/vault", ["s"])
    path = f"/v2/reconstructions/{info.xet_hash}"

    def take(user, bucket, right):
        answer = ask(place.url, "GET", f"/api/buckets/{bucket}/xet-{right}-token", None, bearer(TOKENS[user]))
        return answer.json()["accessToken"]

    reads, foreign = take("ada", "ada/vault", "read"), take("eve", "eve/own", "write")
    assert ask(place.url, "GET", path, None, bearer(foreign)).status == 404
    assert ask(place.url, "GET", path, None, bearer(reads[:-1] + "x")).status == 401
    assert ask(place.url, "GET", path).status == 401
    for odd in ("\xe9", "\xe9.\xe9", ".", "a.b.c", "=" * 99, reads.split(".")[0] + ".\xff"):
        assert ask(place.url, "GET", path, None, bearer(odd)).status == 401
        assert ask(place.url, "GET", "/api/whoami-v2", None, bearer(odd)).status == 401
    assert ask(place.url, "POST", "/v2/shards", b"", bearer(reads)).status == 403
    plan = ask(place.url, "GET", path, None, bearer(reads)).json()
    (address,) = {fetch["url"] for fetches in plan["xorbs"].values() for fetch in fetches}
    where = address.removeprefix(place.url)
    assert ask(place.url, "GET", where).status == 200
    assert ask(place.url, "GET", where.split("?")[0]).status == 403
    assert ask(place.url, "GET", where[:-1] + ("0" if where[-1] != "0" else "1")).status == 403


def test_a_pass_ends(place):
    now = [1000.0]
    users = read_users(place.folder / "users.json")
    access = Access(users, b"k" * 32, clock=lambda: now[0])

    def request(token):
        return SimpleNamespace(headers={"authorization": f"Bearer {token}"})

    token, expires = access.issue(request(TOKENS["ada"]), "ada/x", "read")
    assert access.visitor(request(token), "read") == Pass("ada", "ada/x", "read", expires)
    now[0] = float(expires)
    with pytest.raises(AccessRefused, match="expired"):
        access.visitor(request(token), "read")


def test_passes_outlive_a_restart(tmp_path):
    (tmp_path / "users.json").write_text(json.dumps(USERS))
    with HubServer(tmp_path / "root", users=tmp_path / "users.json") as server:
        ask(server.url, "POST", "/api/buckets/ada/b", b"{}", bearer(TOKENS["ada"]))
        answer = ask(server.url, "GET", "/api/buckets/ada/b/xet-write-token", None, bearer(TOKENS["ada"]))
    with HubServer(tmp_path / "root", users=tmp_path / "users.json") as server:
        refused = ask(server.url, "POST", "/v2/shards", b"", bearer(answer.json()["accessToken"]))
    assert refused.status == 400
    assert (tmp_path / "root" / "secret").stat().st_mode & 0o077 == 0


def test_the_same_content_sent_by_two_users_is_stored_once_and_told_to_neither(place, tmp_path):
    """Each with caches of its own: the second must send what it cannot know to be there."""
    script = (
        "api.create_bucket('me/same', exist_ok=True)\napi.batch_bucket_files('me/same', add=[(b'x' * 70_000, 'f')])\n"
    )
    sent = []
    for name in ("ada", "bob", "bob"):
        before = stats(place)
        run_client(tmp_path / f"{name}{len(sent)}", place.url, script, HF_TOKEN=TOKENS[name])
        after = stats(place)
        sent.append((after["xorbs"] - before["xorbs"], after["deduplicated_bytes"] > before["deduplicated_bytes"]))
    assert sent == [(1, False), (0, False), (0, True)]


def stats(place):
    return ask(place.url, "GET", "/_deltawire/stats", None, bearer(TOKENS["ada"])).json()


def test_a_content_type_is_kept_and_answered(place):
    place.api("ada").create_bucket("ada/typed")
    place.api("ada").batch_bucket_files("ada/typed", add=[(b"{}", "a.json")])
    answer = ask(place.url, "GET", "/buckets/ada/typed/resolve/a.json", None, bearer(TOKENS["ada"]))
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.body == b"{}"


@pytest.mark.parametrize(
    ("users", "says"),
    [
        ({"users": []}, "names no user"),
        ({"users": [{"name": "a"}]}, "missing required field `token`"),
        ({"users": [{"name": "me", "token": "12345678"}]}, "cannot be the name"),
        ({"users": [{"name": "../x", "token": "12345678"}]}, "cannot be the name"),
        ({"users": [{"name": "a", "token": "short"}]}, "must be 8 or more"),
        ({"users": [{"name": "a", "token": "12345678"}, {"name": "b", "token": "12345678"}]}, "the same token"),
        ({"users": [{"name": "a", "token": "12345678", "orgs": [{"name": "a"}]}]}, "a user and an organisation"),
        ({"users": [{"name": "a", "token": "12345678", "admin": True}]}, "unknown field `admin`"),
    ],
)
def test_a_users_file_that_cannot_be_right_is_refused_without_showing_a_token(tmp_path, users, says):
    (tmp_path / "users.json").write_text(json.dumps(users))
    with pytest.raises(FormatError, match=says) as refused:
        read_users(tmp_path / "users.json")
    assert "12345678" not in str(refused.value)


def test_users_do_not_show_their_tokens(tmp_path):
    (tmp_path / "users.json").write_text(json.dumps(USERS))
    users = read_users(tmp_path / "users.json")
    assert TOKENS["ada"] not in repr(users.with_token(TOKENS["ada"])) + repr(vars(users))


def test_the_feed_tells_what_changed_and_goes_on_from_a_cursor(place):
    ada = place.api("ada")
    ada.create_bucket("ada/fed")
    told, stop = [], threading.Event()
    from huggingface_hub._bucket_live_follow import BucketFollower

    follower = BucketFollower(
        endpoint=place.url,
        bucket_id="ada/fed",
        token=TOKENS["ada"],
        on_changes=lambda changes: told.extend((change.op, change.path, change.size) for change in changes),
        on_reconcile=lambda: None,
        is_alive=lambda: not stop.is_set(),
    )
    follower.start()
    until(lambda: follower.subscribed)
    ada.batch_bucket_files("ada/fed", add=[(b"1", "a"), (b"22", "b")])
    until(lambda: len(told) == 2)
    ada.batch_bucket_files("ada/fed", add=[(b"333", "a")], delete=["b"])
    until(lambda: len(told) == 4)
    assert sorted(told[:2]) == [("add", "a", 1), ("add", "b", 2)]
    assert sorted(told[2:]) == [("delete", "b", None), ("update", "a", 3)]
    stop.set()
    follower.stop()
    for query, status_code in (("cursor=nonsense", 400), ("since=yesterday", 400)):
        answer = ask(place.url, "GET", f"/api/buckets/ada/fed/events?{query}", None, bearer(TOKENS["ada"]))
        assert answer.status == status_code
    reset = ask(place.url, "GET", "/api/buckets/ada/fed/events?cursor=dead-7", None, bearer(TOKENS["ada"]))
    assert reset.body.startswith(b"event: reset\n")


def test_a_watch_is_woken_by_the_feed_long_before_it_would_poll(place, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKENS["ada"])
    bucket = open_bucket("hf://buckets/ada/watched")
    assert bucket.watch("HEAD.json", tag=None, timeout=0.01) is None  # whoever follows may be there first
    place.api("ada").create_bucket("ada/watched")
    bucket.poll_seconds = 60.0
    writer = open_bucket("hf://buckets/ada/watched")
    threading.Timer(1.0, lambda: writer.put("HEAD.json", b"1")).start()
    started = time.monotonic()
    assert bucket.watch("HEAD.json", tag=None, timeout=50) is not None
    assert time.monotonic() - started < 20


def test_a_server_with_users_may_listen_beyond_loopback(tmp_path):
    (tmp_path / "users.json").write_text(json.dumps(USERS))
    with HubServer(tmp_path / "root", "0.0.0.0", users=tmp_path / "users.json") as server:
        port = server.url.rsplit(":", 1)[1]
        assert ask(f"http://127.0.0.1:{port}", "GET", "/api/whoami-v2").status == 401


def test_a_test_may_have_the_server_fail_as_it_likes(tmp_path: Path):
    left = [2]

    def faults(request):
        if request.url.path.endswith("/whoami-v2") and left[0]:
            left[0] -= 1
            return JSONResponse({"error": "later"}, 429)
        return None

    with HubServer(tmp_path, faults=faults) as server:
        statuses = [ask(server.url, "GET", "/api/whoami-v2").status for _ in range(3)]
    assert statuses == [429, 429, 200]
