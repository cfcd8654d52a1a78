"""The command line and environment of each process of the demo. Nothing here starts anything."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import deltawire
from deltawire.demo.games import WORDLE, Game
from deltawire.demo.processes import Command
from deltawire.errors import DeltaWireError
from deltawire.read.host_cache import cache_folder

SERVED_NAME = "policy"
NOTHING: Mapping[str, str] = {}


class NoExamples(DeltaWireError):
    """The examples are not here: they are in the repository, not in the package."""


def in_checkout() -> bool:
    """Whether this package was imported from a source checkout, which has the examples."""
    return (Path(deltawire.__file__).parents[2] / "examples" / "wordle" / "trainer.py").is_file()


def find_checkout() -> Path:
    """The root of the source checkout this package was imported from. Raises NoExamples."""
    root = Path(deltawire.__file__).parents[2]
    if not in_checkout():
        raise NoExamples(
            f"{root / 'examples' / 'wordle'} is not there: this needs the repository, not only the package; "
            "run it in a checkout"
        )
    return root


@dataclass(frozen=True, slots=True)
class Commands:
    """The commands, for one run folder. The trainer gets the bucket and where to read rollouts and play, no more."""

    checkout: Path
    folder: Path
    game: Game = WORDLE

    @property
    def model_folder(self) -> Path:
        """The checkpoint all start from; made once for all runs. Raises NotFound where it lies in this user's cache and
        the user has no home."""
        return (cache_folder() if self.game.cached else self.checkout) / self.game.model

    @property
    def buckets(self) -> Path:
        """Where the bucket server keeps its buckets."""
        return self.folder / "buckets"

    @property
    def metrics(self) -> Path:
        """Where the trainer writes a JSON line for each step."""
        return self.folder / "steps.jsonl"

    @property
    def digests(self) -> Path:
        """Where the trainer writes the digests of its last weights."""
        return self.folder / "trainer_digests.json"

    @property
    def materialized(self) -> Path:
        """Where the bucket's last version is materialized."""
        return self.folder / "materialized"

    def model(self) -> Command:
        """Makes the checkpoint; ends by itself."""
        return self._python("model", "-m", f"examples.{self.game.name}.model", str(self.model_folder), lasting=False)

    def server(self) -> Command:
        """The bucket server; says `ready` with its URL."""
        root = ("--root", str(self.buckets))
        return self._python("bucket-server", "-m", "deltawire.cli", "serve", *root, "--port", "0", "--json")

    def environment(self) -> Command:
        """The game's server; says `ready` with its URL."""
        return self._python("environment", "-m", f"examples.{self.game.name}.environment", "--port", "0")

    def vllm(self, engine: str, hub: str) -> Command:
        """vLLM with the deltawire engine, on the starting checkpoint; ready when /health answers."""
        return self._serve("vllm", self.model_folder, engine, hub)

    def fresh_vllm(self, engine: str, hub: str) -> Command:
        """Another one, on the materialized checkpoint, that nobody will update."""
        return self._serve("fresh-vllm", self.materialized, engine, hub)

    def _serve(self, name: str, model: Path, engine: str, hub: str) -> Command:
        arguments = {
            "--model": str(model),
            "--served-model-name": SERVED_NAME,
            "--dtype": "bfloat16",
            "--max-model-len": str(self.game.context),
            "--gpu-memory-utilization": "0.3",  # where there is a GPU, two servers and the trainer share it
            "--host": "127.0.0.1",
            "--port": engine.rpartition(":")[2],
            "--weight-transfer-config": json.dumps({"backend": "deltawire"}),
            "--middleware": "deltawire.vllm.middleware.PolicyVersion",
        }
        flat = [word for pair in arguments.items() for word in pair]
        extra = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by itself every vLLM takes the first core: on a busy machine of 2
            # cores that starts in 43 s; unbound with one thread, in 24 s
            "OMP_NUM_THREADS": str(self.game.threads),
            "VLLM_NO_USAGE_STATS": "1",
        }
        module = "vllm.entrypoints.openai.api_server"
        return self._python(name, "-m", module, *flat, "--enforce-eager", hub=hub, extra=extra)

    def follower(self, engine: str, hub: str) -> Command:
        """Drives vLLM's updates; says `update` for each version that came to be served."""
        arguments = ("follow", "--bucket", self.game.bucket, "--engine", engine, "--poll", "0.2", "--json")
        return self._python("follower", "-m", "deltawire.cli", *arguments, hub=hub)

    def trainer(self, engine: str, environment: str, hub: str) -> Command:
        """Trains and publishes; says `start`, `step` and `done` in `metrics`; ends by itself."""
        arguments = {
            "--model": str(self.model_folder),
            "--bucket": self.game.bucket,
            "--engine": engine,
            "--served-model-name": SERVED_NAME,
            "--environment": environment,
            "--metrics": str(self.metrics),
            "--digests": str(self.digests),
        }
        flat = [word for pair in arguments.items() for word in pair]
        acts = [word for act in self.game.acts for word in ("--act", f"{act.name},{act.learning_rate},{act.steps}")]
        module, extra = f"examples.{self.game.name}.trainer", {"OMP_NUM_THREADS": str(self.game.threads)}
        return self._python("trainer", "-m", module, *flat, *acts, hub=hub, extra=extra, lasting=False)

    def exam(self, when: str, engine: str) -> Command:
        """Has vLLM answer what nobody trained on; says `exam` with the answers; ends by itself."""
        module = f"examples.{self.game.name}.exam"
        return self._python(f"exam-{when}", "-m", module, "--engine", engine, lasting=False)

    def page(self, hub: str) -> Command:
        """The page of the run and its replica; says `page` with its URL."""
        arguments = ("status", self.game.bucket, "--serve", "0", "--json")
        return self._python("page", "-m", "deltawire.cli", *arguments, hub=hub)

    def materialize(self, hub: str) -> Command:
        """Writes the bucket's last version as a checkpoint; ends by itself."""
        arguments = ("materialize", self.game.bucket, str(self.materialized), "--json")
        return self._python("materialize", "-m", "deltawire.cli", *arguments, hub=hub, lasting=False)

    def _python(
        self, name: str, *arguments: str, hub: str = "", extra: Mapping[str, str] = NOTHING, lasting: bool = True
    ) -> Command:
        path = [str(self.checkout), str(self.checkout / "src"), os.environ.get("PYTHONPATH", "")]
        common = {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        command = (sys.executable, *arguments)
        client = self._client_environment(name, hub) if hub else {}
        return Command(name, command, {**common, **client, **extra}, self.checkout, grace=20.0, lasting=lasting)

    def _client_environment(self, name: str, hub: str) -> dict[str, str]:
        home = self.folder / "clients" / name  # one each: what a process fetches must come from the server
        return {
            "HF_ENDPOINT": hub,
            "HF_TOKEN": "hf_local",
            "HF_HOME": str(home),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "200ms",
        }
