"""All parts of `wordle_trl` on this machine: bucket server, environment, vLLM, follower, trainer, and a final audit.

    python -m examples.trl.run [--steps 8] [--out runs/trl-…]

Everything it starts is ended with it, whatever happens. It takes a few minutes, most of them to start.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from deltawire.demo import audit
from deltawire.demo.commands import SERVED_NAME, Commands, find_checkout
from deltawire.demo.processes import Child, Children, Command, free_port
from deltawire.errors import DeltaWireError
from deltawire.vllm.client import EngineClient

T = TypeVar("T")
PATIENCE = 600.0
"""seconds for any one thing to happen"""


def wait(children: Children, child: Child, look: Callable[[], T | None], what: str) -> T:
    """What `look` finds, while every process is well. Raises ProcessFailed."""
    deadline = time.monotonic() + PATIENCE
    while (found := look()) is None:
        for each in children:
            if each.code is not None and (each.code or each.command.lasting):
                raise each.failed(f"ended with exit code {each.code}")
        if time.monotonic() > deadline:
            raise child.failed(f"did not {what} in {PATIENCE:g} s")
        time.sleep(0.1)
    return found


def url_of(child: Child) -> str | None:
    """Where a process says it is ready, once it does."""
    return next((str(record["url"]) for record in child.output.records() if record.get("event") == "ready"), None)


def trainer_command(commands: Commands, engine: str, environment: str, hub: str, steps: int) -> Command:
    """`wordle_trl` with the demo trainer's environment, beside a folder of the name that vLLM serves the model by."""
    (commands.folder / SERVED_NAME).symlink_to(commands.model_folder, target_is_directory=True)
    options = {
        "--model": SERVED_NAME,
        "--assets": SERVED_NAME,
        "--bucket": commands.game.bucket,
        "--engine": engine,
        "--environment": environment,
        "--steps": str(steps),
        "--digests": str(commands.digests),
    }
    flat = [word for pair in options.items() for word in pair]
    command = [sys.executable, "-m", "examples.trl.wordle_trl", *flat]
    return replace(commands.trainer(engine, environment, hub), arguments=command, folder=commands.folder)


def play(children: Children, commands: Commands, steps: int) -> list[str]:
    """Start all, train, and compare vLLM's live weights with the trainer's; the names of those that differ."""
    server, games = children.start(commands.server()), children.start(commands.environment())
    model = children.start(commands.model())
    wait(children, model, lambda: model.code == 0 or None, "make the model")
    hub = wait(children, server, lambda: url_of(server), "get ready")
    engine = f"http://127.0.0.1:{free_port()}"
    vllm = children.start(commands.vllm(engine, hub))
    environment = wait(children, games, lambda: url_of(games), "get ready")
    print(f"bucket server at {hub}, environment at {environment}, vLLM is starting at {engine}", flush=True)
    wait(children, vllm, lambda: audit.is_healthy(engine) or None, "get ready")
    children.start(commands.follower(engine, hub))
    trainer = children.start(trainer_command(commands, engine, environment, hub, steps))
    print("vLLM is ready; TRL is starting", flush=True)

    def look() -> bool | None:
        for record in trainer.output.records():
            print(json.dumps(record), flush=True)
        return trainer.code == 0 or None

    wait(children, trainer, look, "end")
    trained = json.loads(commands.digests.read_text())
    with EngineClient(engine) as client:
        print(f"vLLM serves {client.weight_version()}; auditing its live weights", flush=True)
        return audit.compare(trained, client.audit().digests)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, help="where logs go, an empty folder; by default runs/trl-<time>")
    arguments = parser.parse_args()
    try:
        folder = arguments.out or Path("runs") / f"trl-{datetime.now():%Y%m%d-%H%M%S}"
        folder.mkdir(parents=True)
        commands = Commands(find_checkout(), folder.absolute())
        with Children(commands.folder / "logs") as children:
            differs = play(children, commands, arguments.steps)
    except (DeltaWireError, OSError) as error:
        print(f"example-trl: {error}", file=sys.stderr)
        return 1
    print(f"{differs} differ" if differs else "every live weight equals the trainer's, bit for bit", flush=True)
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
