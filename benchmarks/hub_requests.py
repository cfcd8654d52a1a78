"""How many requests one version costs on the Hub: the trainer's, a follower's, and a look where nothing is new.

The real huggingface_hub client against the embedded bucket server, which counts what it is asked. Requests to
`/api/…` count against the Hub's API limit; those for content go to another host there.
"""

import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from starlette.requests import Request

VERSIONS = 10


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HOME": folder, "HF_TOKEN": "local", "HF_HUB_DISABLE_TELEMETRY": "1"}
        count(Path(folder))


def count(folder: Path) -> None:
    """Publish and read versions, and print what each took."""
    import deltawire as dw
    from deltawire.hub_server import HubServer

    asked: Counter[str] = Counter()

    def hear(request: Request) -> None:
        asked["API" if request.url.path.startswith("/api/") else "content"] += 1

    def told(what: str, times: int) -> None:
        print(f"{what}: {asked['API'] / times:.1f} API requests, {asked['content'] / times:.1f} for content")
        asked.clear()

    with HubServer(folder / "hub", faults=hear) as server:
        os.environ["HF_ENDPOINT"] = server.url
        weights = {"w": np.zeros(1_000_000, np.float16)}
        bucket = dw.open_bucket("hf://buckets/me/counted", create=True)
        with dw.Publisher(bucket) as publisher, dw.Subscriber(bucket) as subscriber:
            publisher.publish(weights)
            publisher.flush()
            position = subscriber.latest()
            for _ in subscriber.updates():
                pass
            asked.clear()
            for version in range(VERSIONS):
                weights["w"][version::100] += 1
                publisher.publish(weights)
                publisher.flush()
            told("a version, by its trainer", VERSIONS)
            newest = [position]
            for update in subscriber.updates(since=position):
                newest.append(update.position)
            assert len(newest) == VERSIONS + 1
            told("a version of several, by a reader", VERSIONS)
            weights["w"][:5] += 1
            publisher.publish(weights)
            publisher.flush()
            asked.clear()
            (update,) = subscriber.updates(since=newest[-1])
            told("one version, by a reader", 1)
            for _ in range(VERSIONS):
                bucket.stat("HEAD.json")
            told("a look where nothing is new", VERSIONS)
            for _ in range(VERSIONS):
                bucket.put("replicas/counted.json", b"{}")
            told("a heartbeat", VERSIONS)


if __name__ == "__main__":
    main()
