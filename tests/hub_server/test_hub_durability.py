"""Whatever the server acknowledged is still there after kill -9, a full disk or a restart; nothing else appears."""

import errno
import os
import random
import resource
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import ask, client_environment, run_client
from programs import program
from xet_builders import nodes, shard, xorb

from deltawire.errors import OutOfSpace, UnknownVersion
from deltawire.hub_server import HubProcess, HubServer
from deltawire.hub_server.database import Database
from deltawire.hub_server.durable import no_space_is_typed
from deltawire.hub_server.xet_hashes import file_hash, to_text

CHECK = """
import random
files = sorted(item.path for item in api.list_bucket_tree("me/b", recursive=True) if "/" not in item.path)
for path in files:
    api.download_bucket_files("me/b", [(path, "copy"), (f"small/{path}", "small")], raise_on_missing_files=True)
    number = int(path)
    assert Path("copy").read_bytes() == random.Random(number).randbytes(200_000 + number * 1000 % 3_000_000), path
    assert Path("small").read_bytes() == b"small %d" % number, path
print(len(files))
"""


def upload_until_killed(server: HubProcess, folder: Path, *, start: int, acknowledged: int) -> int:
    """Upload files from number `start` on, kill the server after that many acknowledgements; the last one heard."""
    environment = os.environ | client_environment(folder) | {"HF_ENDPOINT": server.url}
    client = subprocess.Popen(
        [sys.executable, program("upload_forever"), str(start)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert client.stdout is not None
        for _ in range(acknowledged):
            assert select.select([client.stdout], [], [], 60.0)[0], "nothing was acknowledged in a minute"
            last = int(client.stdout.readline())
        server.kill()
    finally:
        client.kill()
        rest, _ = client.communicate()
    return max([last, *map(int, rest.split())])


def test_after_kill_nine_every_acknowledged_file_is_intact_and_no_half_one_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "client"
    count = 0
    for acknowledged in (1, 4, 9):
        with HubProcess(tmp_path / "root") as server:
            count = upload_until_killed(server, folder, start=count, acknowledged=acknowledged) + 1
        with HubProcess(tmp_path / "root") as server:
            script = f"import os\nos.chdir({str(tmp_path)!r})\n" + CHECK
            found = int(run_client(folder, server.url, script))
        assert found in (count, count + 1)  # the last batch may have been stored and its answer lost
        count = found


def test_after_a_restart_dedup_grants_and_reconstructions_are_answered_from_disk(tmp_path: Path) -> None:
    chunks = [b"one " * 5000, b"two " * 5000]
    digest, data = xorb(chunks)
    name = to_text(digest)
    with HubServer(tmp_path) as server:
        assert ask(server.url, "POST", f"/v1/xorbs/default/{name}", data).status == 200
        assert ask(server.url, "POST", "/v2/shards", shard(chunks)).status == 200
    with HubServer(tmp_path) as server:
        assert ask(server.url, "GET", f"/v1/chunks/default/{to_text(nodes(chunks)[0][0])}").status == 200
        assert ask(server.url, "POST", f"/v1/xorb-grants/default/{name}", b'{"length": 1}').status == 200
        file = to_text(file_hash(nodes(chunks)))
        assert ask(server.url, "GET", f"/v2/reconstructions/{file}").json()["terms"][0]["hash"] == name
        assert ask(server.url, "GET", f"/v1/xorb-bytes/{name}").body == data


def test_a_xorb_whose_row_was_never_written_and_a_half_upload_are_gone_after_a_restart(tmp_path: Path) -> None:
    with HubServer(tmp_path):
        pass
    digest, data = xorb([b"stray"])
    (tmp_path / "xorbs" / to_text(digest)).write_bytes(data)
    (tmp_path / "staging" / "half").write_bytes(data[:5])
    with HubServer(tmp_path) as server:
        assert ask(server.url, "GET", f"/v1/xorb-bytes/{to_text(digest)}").status == 404
        assert list((tmp_path / "xorbs").iterdir()) == list((tmp_path / "staging").iterdir()) == []
        assert ask(server.url, "POST", f"/v1/xorbs/default/{to_text(digest)}", data).json() == {"was_inserted": True}


def test_a_client_that_hangs_up_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    with HubServer(tmp_path) as server, socket.socket() as client:
        client.connect(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
        client.sendall(b"POST /v1/xorbs/default/" + b"0" * 64 + b" HTTP/1.1\r\nHost: localhost\r\n")
        client.sendall(b"Content-Length: 1000000\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 100")
        assert len(list((tmp_path / "staging").iterdir())) == 1
        client.sendall(bytes(1000))
        client.close()
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_full_disk_is_answered_507_and_what_was_stored_stays(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the end of the disk: the write fails in the same place."""
    small, big = xorb([b"small"]), xorb([random.Random(0).randbytes(100_000) for _ in range(20)])
    paths = [f"/v1/xorbs/default/{to_text(digest)}" for digest, _ in (small, big)]
    with HubProcess(tmp_path / "root") as server:
        assert ask(server.url, "POST", paths[0], small[1]).status == 200
        assert ask(server.url, "POST", "/v2/shards", shard([b"small"])).status == 200
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        refused = ask(server.url, "POST", paths[1], big[1])
        assert refused.status == 507
        assert "no space left" in refused.headers["x-error-message"]
        assert list((tmp_path / "root" / "staging").iterdir()) == []
        assert ask(server.url, "GET", f"/v1/xorb-bytes/{to_text(small[0])}").body == small[1]
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert ask(server.url, "POST", paths[1], big[1]).json() == {"was_inserted": True}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "hub.sqlite")
    yield database
    database.close()


def test_a_transaction_that_does_not_fit_is_undone_whole(database: Database) -> None:
    with database.write() as connection:
        connection.execute("INSERT INTO shards (xorbs) VALUES (?)", (b"kept",))
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 5}")
    with pytest.raises(OutOfSpace, match="no space left"), database.write() as connection:
        for _ in range(100):
            connection.execute("INSERT INTO shards (xorbs) VALUES (?)", (bytes(4096),))
    with database.read() as connection:
        assert connection.execute("SELECT xorbs FROM shards").fetchall() == [(b"kept",)]
    with database.write() as connection:
        connection.execute("INSERT INTO shards (xorbs) VALUES (?)", (b"fits",))


def test_a_store_of_a_later_layout_is_refused(tmp_path: Path, database: Database) -> None:
    with database.write() as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UnknownVersion, match="layout 99"):
        Database(tmp_path / "hub.sqlite")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_the_ways_a_disk_says_it_is_full_are_one_error(tmp_path: Path, number: int) -> None:
    with pytest.raises(OutOfSpace), no_space_is_typed(tmp_path):
        raise OSError(number, os.strerror(number))


def test_other_errors_of_the_disk_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), no_space_is_typed(tmp_path):
        raise PermissionError(errno.EACCES, "no")


def test_bit_rot_is_noticed_when_the_server_itself_reads_a_file(tmp_path: Path) -> None:
    digest, data = xorb([b"sound" * 1000])
    with HubServer(tmp_path) as server:
        ask(server.url, "POST", "/api/buckets/me/b", b"{}")
        ask(server.url, "POST", f"/v1/xorbs/default/{to_text(digest)}", data)
        ask(server.url, "POST", "/v2/shards", shard([b"sound" * 1000]))
        name = to_text(file_hash(nodes([b"sound" * 1000])))
        line = f'{{"type":"addFile","path":"f","xetHash":"{name}","mtime":0}}'
        assert ask(server.url, "POST", "/api/buckets/me/b/batch", line.encode()).status == 200
        assert ask(server.url, "GET", "/buckets/me/b/resolve/f").body == b"sound" * 1000
        (tmp_path / "xorbs" / to_text(digest)).write_bytes(data[:-1] + b"?")
        answer = ask(server.url, "GET", "/buckets/me/b/resolve/f")
        assert answer.status == 500
        assert "damaged" in answer.headers["x-error-message"]
