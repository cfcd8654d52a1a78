"""Draw docs/page.png: the page of a small fleet, made here, as a headless Chromium shows it.

python scripts/screenshot.py                                 docs/page.png
python scripts/screenshot.py http://127.0.0.1:46507 FILE     a page that is served now, as a demo's is
"""

import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

import deltawire as dw
from deltawire.fleet.page import Board
from deltawire.fleet.status import Watcher
from deltawire.follow.port import Port
from deltawire.runlog import heartbeats
from deltawire.runlog.heartbeats import Heartbeat
from deltawire.upkeep.compactor import Compactor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
if TYPE_CHECKING:
    from browser import Tab
VERSIONS, SECONDS = 28, 45.0
WIDTH = 1100


def main() -> None:
    """Take the picture that is asked for."""
    from browser import chromium, find_chromium

    program = find_chromium()
    if program is None:
        sys.exit("no Chromium here: apt-get install chromium, or name one in CHROMIUM")
    with chromium(program) as tab:
        tab.resize(WIDTH, 900)
        target = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / "page.png"
        target.write_bytes(of_page(tab, sys.argv[1]) if len(sys.argv) > 2 else of_a_fleet(tab))
    Image.open(target).quantize(64).save(target, optimize=True)
    print(f"wrote {target}, {target.stat().st_size:,} bytes", file=sys.stderr)


def of_page(tab: "Tab", url: str) -> bytes:
    """A PNG of a page, once it shows a replica."""
    tab.open(url).until("document.querySelectorAll('#replicas tr').length > 0")
    return tab.screenshot()


def of_a_fleet(tab: "Tab") -> bytes:
    """Publish a run whose clock moves, have four replicas follow it, and take the picture."""
    with tempfile.TemporaryDirectory() as folder:
        bucket = dw.open_bucket((Path(folder) / "wordle").as_uri(), create=True)
        bucket.url = "hf://buckets/me/wordle"  # what the page says
        now = [time.time() - VERSIONS * SECONDS]
        watcher = Watcher(bucket, clock=lambda: now[0])
        with closing(Board(watcher)) as board:
            publish_and_look(bucket, Path(folder), now, board)
            board._look()
            with Port([board], 0) as port:
                return of_page(tab, port.url)


def publish_and_look(bucket: dw.buckets.Bucket, folder: Path, now: list[float], board: Board) -> None:
    """A version every so many seconds, of which two replicas keep up, one lags and one fails in the end."""
    random = np.random.default_rng(0)
    weights = {"w": random.normal(0, 0.02, (256, 1024)).astype(np.float32)}
    with dw.Publisher(bucket, clock=lambda: now[0]) as publisher:
        for step in range(VERSIONS):
            moved = random.random(weights["w"].shape) < random.uniform(0.01, 0.03)
            weights["w"] += moved * random.normal(0, 0.01, weights["w"].shape).astype(np.float32)
            publisher.publish(weights, step=10 * step)
            run = publisher.flush(30).run
            for name, lag in (
                ("vllm-a-8000", 0),
                ("vllm-b-8000", step % 2),
                ("vllm-c-8000", step % 5),
                ("vllm-d-8000", 0),
            ):
                pause = {"pause_p50_ms": random.uniform(3, 5), "pause_p99_ms": random.uniform(7, 12)}
                error = "EngineUnavailable: http://127.0.0.1:8000 does not answer: is vLLM running there?"
                failed = {"error": error, "unready": error} if name[5] == "d" and step > VERSIONS - 4 else {}
                served = max(0, min(step, VERSIONS - 4) if failed else step - lag)
                said = {"fetched_bytes": 12000 * step, "audit": f"version {step // 10 * 10}: equal", "at": now[0]}
                heartbeats.beat(bucket, Heartbeat(name, run, served, every=1e9, **pause, **said, **failed))
            board._look()
            now[0] += SECONDS
    now[0] += SECONDS
    with Compactor(bucket, folder / "mirror", anchors=20) as compactor:
        compactor.step()


if __name__ == "__main__":
    main()
