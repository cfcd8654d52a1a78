"""Clients that ask a server for sampled tokens again and again, and print when each token came.

    stream_tokens.py HOST PORT STREAMS LENGTH

Every tenth of a second one line of JSON: `gaps`, the time of each token and of the one before it in its answer (null
for the first), and `until`, up to when that is all. Times are of the monotonic clock, which processes of a host share.
Ends with a line that has `failed` when a request fails.
"""

import http.client
import json
import sys
import threading
import time
from contextlib import closing

TELL = 0.1
"""seconds from one line to the next"""
STALLED = 120
"""seconds without a token"""


class Clients:
    """Threads with a connection each; `gaps` grows, `failed` says what ended one of them."""

    def __init__(self, host: str, port: int, length: int) -> None:
        self._address, self._length = (host, port), length
        self.gaps: list[tuple[float | None, float]] = []
        self.failed: str | None = None

    def stream(self, number: int) -> None:
        body = {"model": "policy", "prompt": [number + 3, 17, 9], "max_tokens": self._length, "temperature": 1,
                "ignore_eos": True, "stream": True}  # fmt: skip
        try:
            while self.failed is None:
                self._request(json.dumps(body))
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.failed = repr(error)

    def _request(self, body: str) -> None:
        """One answer, on a connection of its own: a server closes one that was idle for a while."""
        with closing(http.client.HTTPConnection(*self._address, timeout=STALLED)) as connection:
            self._read(connection, body)

    def _read(self, connection: http.client.HTTPConnection, body: str) -> None:
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer, last = connection.getresponse(), None
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {answer.read(500)!r}")
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            if line.startswith(b'data: {"error"'):
                raise ValueError(line.decode())
            now = time.perf_counter()
            self.gaps.append((last, now))
            last = now


def main() -> None:
    host, port, streams, length = sys.argv[1:]
    clients = Clients(host, int(port), int(length))
    for number in range(int(streams)):
        threading.Thread(target=clients.stream, args=(number,), daemon=True).start()
    while clients.failed is None:
        time.sleep(TELL)
        gaps, clients.gaps, until = clients.gaps, [], time.perf_counter()
        print(json.dumps({"until": until, "gaps": gaps}), flush=True)
    print(json.dumps({"failed": clients.failed}), flush=True)


if __name__ == "__main__":
    main()
