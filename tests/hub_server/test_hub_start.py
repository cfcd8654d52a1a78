"""A server that cannot start says why, and which option is the remedy."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_client import ask
from verbs import run_verb

from deltawire.errors import AccessRefused, FormatError, Unavailable
from deltawire.hub_server import HubProcess, HubServer, Store

NOBODY = 65534


def test_a_folder_is_served_by_one_server_at_a_time(tmp_path: Path) -> None:
    with HubServer(tmp_path), pytest.raises(Unavailable, match="another bucket server"):
        Store(tmp_path)
    Store(tmp_path).close()


def test_a_taken_port_is_refused_and_the_next_server_may_have_it(tmp_path: Path) -> None:
    with HubServer(tmp_path / "one") as server:
        port = int(server.url.rsplit(":", 1)[1])
        with pytest.raises(Unavailable, match=f"port {port}"):
            HubServer(tmp_path / "two", port=port)
    with HubServer(tmp_path / "two", port=port) as server:
        assert ask(server.url, "GET", "/api/whoami-v2").status == 200


def test_a_server_process_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = HubProcess(tmp_path / "root", "0.0.0.0", log=tmp_path / "log")
    with pytest.raises(Unavailable, match="users and tokens are needed"):
        server.start()


def test_a_taken_port_is_one_line_that_names_the_option(tmp_path: Path) -> None:
    with HubServer(tmp_path / "one") as server:
        port = server.url.rsplit(":", 1)[1]
        error = run_verb("serve", "--root", tmp_path / "two", "--port", port, code=1).stderr
    assert error.count("\n") == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use; give it another port (--port" in error
    assert not (tmp_path / "two").exists()


def test_a_port_is_taken_from_the_beginning(tmp_path: Path) -> None:
    first = HubServer(tmp_path / "one")
    try:
        with pytest.raises(Unavailable, match="already in use"):
            HubServer(tmp_path / "two", port=int(first.url.rsplit(":", 1)[1]))
    finally:
        first.close()


@pytest.mark.parametrize(
    ("host", "port", "option"),
    [("192.0.2.1", 0, "--host"), ("no-such-host.invalid", 0, "--host"), ("127.0.0.1", 70_000, "--port")],
)
def test_an_address_that_cannot_be_had_names_the_option(tmp_path: Path, host: str, port: int, option: str) -> None:
    users = tmp_path / "users.json"
    users.write_text(json.dumps({"users": [{"name": "ada", "token": "token-of-ada"}]}))
    with pytest.raises(Unavailable, match=f"cannot listen on {host} port {port}: .*{option}"):
        HubServer(tmp_path / "root", host, port, users=users)


@contextmanager
def unprivileged() -> Iterator[None]:
    """As somebody whom modes of files hold for."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_is_not_writable_is_named_with_the_option(tmp_path: Path) -> None:
    Store(tmp_path / "served").close()
    (tmp_path / "served").chmod(0o555)
    for root in (tmp_path / "served", tmp_path / "served" / "new"):
        with unprivileged(), pytest.raises(AccessRefused, match=f"buckets in {root}: .*--root"):
            HubServer(root)
    (tmp_path / "served").chmod(0o755)
    Store(tmp_path / "served").close()


def test_a_file_is_no_folder_for_buckets(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    error = run_verb("serve", "--root", tmp_path / "file", "--port", "0", code=1).stderr
    assert error.count("\n") == 1
    assert f"cannot keep buckets in {tmp_path / 'file'}: " in error
    assert "--root" in error
    assert (tmp_path / "file").read_text() == "mine"


def test_metadata_that_is_none_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "hub.sqlite").write_bytes(b"a letter, not a database" * 100)
    for _ in range(2):  # the folder was given back
        with pytest.raises(FormatError, match=r"hub\.sqlite is not the metadata of a bucket server"):
            Store(tmp_path)
    assert (tmp_path / "hub.sqlite").read_bytes().startswith(b"a letter")


def test_metadata_that_cannot_be_opened_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "hub.sqlite").mkdir()
    for _ in range(2):
        with pytest.raises(AccessRefused, match=r"unable to open database file \(hub\.sqlite\)"):
            Store(tmp_path)
