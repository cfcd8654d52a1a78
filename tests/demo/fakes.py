"""Stand-ins for the demo's processes: small programs that say and serve what the real ones do, and can be broken."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
from scripts import TELL, python

from deltawire import digest
from deltawire.demo.commands import Commands
from deltawire.demo.games import WORDLE, Act, Game
from deltawire.demo.processes import Command
from deltawire.live import rpc
from deltawire.live.messages import Audited, Outcome
from deltawire.weights.boxes import Box

ACTS = (Act("learn", 1e-3, 2), Act("rl", 2e-6, 1))
GAME = replace(WORDLE, acts=ACTS, won="right answers", exam=True)
WEIGHTS = np.arange(4, dtype=np.uint16)
DIGEST = f"{digest({'w': WEIGHTS})['w']:016x}"
CHECKPOINT = {"w": {"dtype": "U16", "shape": [4], "data_offsets": [0, 8]}}

SAY_PID = TELL + "tell(event='pid', pid=os.getpid())\n"
END_ON_SIGTERM = "signal.signal(signal.SIGTERM, lambda *_: os._exit(0))\n"
STAY = "while True: signal.pause()\n"
HTTP = """
import http.server
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        length = int(self.headers.get('content-length') or 0)
        body = json.dumps(answer(self.path, json.loads(self.rfile.read(length) or b'{}'))).encode()
        self.send_response(200)
        self.send_header('content-length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_POST = do_GET
    def log_message(self, *_): pass
server = http.server.HTTPServer(('127.0.0.1', PORT), Answers)
"""
BUCKET_SERVER = (
    "PORT = 0\nanswer = lambda path, body: {'received_bytes': 90, 'deduplicated_bytes': 4}\n"
    + HTTP
    + "tell(event='ready', url=f'http://127.0.0.1:{server.server_port}')\nserver.serve_forever()\n"
)
AUDITED = Audited(
    digests={"w": [DIGEST]}, sizes={"w": 4}, parts={"w": [Box(0, (4,), (1,))]}, frozen={}, position=None,
    promised={"w": DIGEST}, drifted=[],
)  # fmt: skip
ANSWER = {
    **msgspec.to_builtins(Outcome(True, AUDITED)), "accepted": True, "rank": 0, "protocol": rpc.PROTOCOL,
    "deltawire": rpc.version(), "session_open": False,
}  # fmt: skip
"""what a worker says to every verb of an audit"""
VLLM = (
    "PORT = int(os.environ['PORT'])\ndef answer(path, body):\n"
    f"    if path == '/weight_checker': return {{'checksums': {{'w': {DIGEST!r}}}}}\n"
    "    if path == '/health': return {}\n"
    f"    return {{'results': [{ANSWER!r} | {{'nonce': json.loads(body['args'][0])['nonce']}}]}}\n"
    + HTTP
    + "server.serve_forever()\n"
)
STEP = {
    "event": "step", "reward": 0.5, "win_rate": 0.25, "staleness": 1, "changed_fraction": 0.1, "delta_bytes": 10,
    "model_bytes": 100,
}  # fmt: skip
RECORDS = [
    {"event": "start", "version": 0},
    *(
        STEP | {"act": act.name, "learning_rate": act.learning_rate, "step": number, "version": number}
        for number, act in enumerate([ACTS[0], ACTS[0], ACTS[1]], 1)
    ),
    {"event": "done", "version": 3},
]
UPDATE = {
    "event": "update", "version": 3, "changed": 1, "wire_bytes": 10, "pause_ms": 2.0, "publish_to_served_s": 0.5,
    "verified": True,
}  # fmt: skip
ANSWERS = {
    "before": ("default", "It is 4.\x1b[2J\nOr 5?", False),
    "after": ("r:3", "1 + 2 = 3", True),
}
SOURCES = {
    "model": "tell(event='doing', what='fetching')\n",
    **{
        f"exam-{when}": f"answers = [dict(question='What is 1 + 2?', answer={answer!r}, right={right})]\n"
        f"tell(event='exam', weights={weights!r}, answers=answers)\n"
        for when, (weights, answer, right) in ANSWERS.items()
    },
    "page": "tell(event='page', url='http://127.0.0.1:2')\n" + STAY,
    "bucket-server": BUCKET_SERVER,
    "environment": "tell(event='ready', url='http://127.0.0.1:1')\n" + STAY,
    "vllm": VLLM,
    "fresh-vllm": VLLM,
    "follower": f"tell(**{UPDATE!r})\n" + STAY,
    "trainer": f"open(os.environ['METRICS'], 'w').writelines(json.dumps(record) + chr(10) for record in {RECORDS!r})\n",
    "materialize": (
        f"header = json.dumps({CHECKPOINT!r}).encode()\n"
        "os.mkdir(os.environ['MATERIALIZED'])\n"
        "with open(os.environ['MATERIALIZED'] + '/model.safetensors', 'wb') as file:\n"
        f"    file.write(len(header).to_bytes(8, 'little') + header + {WEIGHTS.tobytes()!r})\n"
    ),
}
PROCESS_NAMES = tuple(SOURCES)


@dataclass(frozen=True, slots=True)
class FakeCommands(Commands):
    """`broken` replaces what a process does after it told its pid."""

    game: Game = GAME
    broken: Mapping[str, str] = field(default_factory=dict)
    grace: float = 5.0

    def model(self) -> Command:
        self.digests.write_text(json.dumps({"w": DIGEST}))
        return self._fake("model", lasting=False)

    def server(self) -> Command:
        return self._fake("bucket-server")

    def environment(self) -> Command:
        return self._fake("environment")

    def vllm(self, engine: str, hub: str) -> Command:
        return self._fake("vllm", PORT=engine.rpartition(":")[2])

    def fresh_vllm(self, engine: str, hub: str) -> Command:
        return self._fake("fresh-vllm", PORT=engine.rpartition(":")[2])

    def follower(self, engine: str, hub: str) -> Command:
        return self._fake("follower")

    def trainer(self, engine: str, environment: str, hub: str) -> Command:
        return self._fake("trainer", lasting=False, METRICS=str(self.metrics))

    def exam(self, when: str, engine: str) -> Command:
        return self._fake(f"exam-{when}", lasting=False)

    def page(self, hub: str) -> Command:
        return self._fake("page")

    def materialize(self, hub: str) -> Command:
        return self._fake("materialize", lasting=False, MATERIALIZED=str(self.materialized))

    def breaking(self, name: str, source: str) -> "FakeCommands":
        """The same commands with one process that does something else."""
        return replace(self, broken={**self.broken, name: source})

    def with_digest(self, name: str, value: str) -> "FakeCommands":
        """The same commands with a server whose weights have another digest."""
        return self.breaking(name, VLLM.replace(DIGEST, value))

    def with_grace(self, seconds: float) -> "FakeCommands":
        """The same commands with less time to end in."""
        return replace(self, grace=seconds)

    def pids(self) -> dict[str, int]:
        """The processes that have been started, by name."""
        found = {}
        for log in (self.folder / "logs").glob("*.log"):
            first = log.read_text().partition("\n")
            if first[1]:
                found[log.stem] = json.loads(first[0])["pid"]
        return found

    def _fake(self, name: str, *, lasting: bool = True, **environment: str) -> Command:
        source = SAY_PID + (END_ON_SIGTERM if lasting else "") + self.broken.get(name, SOURCES[name])
        return Command(name, python(source), environment, grace=self.grace, lasting=lasting)


def fake_commands(folder: Path) -> FakeCommands:
    """A commands that plays a whole demo in a second or two."""
    return FakeCommands(checkout=folder, folder=folder)
