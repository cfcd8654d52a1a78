"""Small sums as an OpenEnv server: a question and an answer, one a WebSocket session.

    python -m examples.sums.environment --port 8001

prints one JSON line, `{"event": "ready", "url": "http://127.0.0.1:8001"}`, when it can be asked; port 0 takes a free
one. Any OpenEnv client plays: `reset(seed=…)` tells a question, `step({"answer": "7 + 8 = 15", "ended": true})` what
the answer is worth.
"""

import argparse
import sys
from typing import Any
from uuid import uuid4

from examples.sums.game import LONGEST, Sum, sum_for, worth
from examples.wordle.environment import listen, server_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class SumsAction(Action):
    """An answer, and whether the policy ended it or was cut off."""

    answer: str
    ended: bool = True


class SumsObservation(Observation):
    """The question, how many tokens an answer may take, and once there is one, whether it is right."""

    question: str
    longest: int = LONGEST
    won: bool = False


class SumsEnvironment(Environment[SumsAction, SumsObservation, State]):
    """One question at a time; an answer ends the episode."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._sum: Sum = sum_for(0)
        self._state = State()

    @property
    def state(self) -> State:
        return self._state

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> SumsObservation:
        """The question of `seed`."""
        self._sum = sum_for(seed or 0)
        self._state = State(episode_id=episode_id or str(uuid4()))
        return SumsObservation(question=self._sum.question, reward=0.0, done=False)

    def step(self, action: SumsAction, timeout_s: float | None = None, **_: Any) -> SumsObservation:
        """What the answer is worth."""
        self._state.step_count += 1
        right = self._sum.is_right(action.answer)
        reward = worth(right, action.ended)
        return SumsObservation(question=self._sum.question, won=right, reward=reward, done=True)

    # Both take microseconds: answering on the event loop spares OpenEnv a thread for every session.
    async def reset_async(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> SumsObservation:
        return self.reset(seed, episode_id)

    async def step_async(self, action: SumsAction, timeout_s: float | None = None, **_: Any) -> SumsObservation:
        return self.step(action)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001, help="0 takes a free one")
    parser.add_argument("--sessions", type=int, default=256, help="questions at once")
    arguments = parser.parse_args()
    app = server_app("sums", SumsEnvironment, (SumsAction, SumsObservation, State), arguments.sessions)
    try:
        listen(app, arguments.host, arguments.port)
    except OSError as error:
        print(f"sums environment on {arguments.host}:{arguments.port}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
