"""Wordle as an OpenEnv server: many games at once, one a WebSocket session.

    python -m examples.wordle.environment --port 8001 --length 3 --guesses 4 --words 4 --vocabulary 16

prints one JSON line, `{"event": "ready", "url": "http://127.0.0.1:8001"}`, when it can be played with; port 0 takes a
free port. Any OpenEnv client plays: `reset(seed=…)` or `reset(word=…)`, then `step({"guess": "cat"})` until `done`.
What cannot be played is answered with a `problem`, never with an error: a policy that babbles is to be taught.
"""

import argparse
import inspect
import json
import random
import socket
import sys
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import uvicorn
from examples.wordle.game import Answer, Game, Problem, Rules, play, problem_with, secret_for
from fastapi import FastAPI
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State
from pydantic import Field


class WordleAction(Action):
    """A guess: lower-case letters."""

    guess: str


class WordleObservation(Observation):
    """The marks of the last guess, `G`, `Y` or `X` for each letter, or `?` when there was a `problem` with it."""

    feedback: str = ""
    problem: Problem | None = None
    won: bool = False
    length: int
    guesses_left: int


class WordleState(State):
    """The game so far; the secret only once it is over."""

    guesses: list[str] = Field(default_factory=list)
    secret: str | None = None


class WordleEnvironment(Environment[WordleAction, WordleObservation, WordleState]):
    """One game at a time, by the rules of `game`. The rewards of an episode add up to the worth of its best guess."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self._game: Game | None = None
        self._state = WordleState()

    @property
    def state(self) -> WordleState:
        return self._state

    def reset(
        self, seed: int | None = None, episode_id: str | None = None, word: str | None = None, **_: Any
    ) -> WordleObservation:
        """A new game about `word`, else about the secret of `seed`: consecutive seeds go round the secrets."""
        self._state = WordleState(episode_id=episode_id or str(uuid4()))
        self._game = None
        if word is not None and (problem := problem_with(word, self.rules)):
            return self._observe(Answer("", problem, 0.0))
        seed = random.randrange(self.rules.secrets) if seed is None else seed
        self._game = Game(self.rules, word or secret_for(seed, self.rules))
        return self._observe(Answer("", None, 0.0))

    def step(self, action: WordleAction, timeout_s: float | None = None, **_: Any) -> WordleObservation:
        """Play one guess. Without a game, or after its end, the problem is "no game" and nothing changes."""
        if self._game is None or self._game.over:
            return self._observe(Answer("", "no game", 0.0))
        self._game, answer = play(self._game, action.guess)
        self._state.step_count += 1
        self._state.guesses = [*self._state.guesses, action.guess]
        self._state.secret = self._game.secret if self._game.over else None
        return self._observe(answer)

    # Rules take microseconds: answering on the event loop spares OpenEnv a thread for every session.
    async def reset_async(
        self, seed: int | None = None, episode_id: str | None = None, word: str | None = None, **_: Any
    ) -> WordleObservation:
        return self.reset(seed, episode_id, word)

    async def step_async(self, action: WordleAction, timeout_s: float | None = None, **_: Any) -> WordleObservation:
        return self.step(action)

    def _observe(self, answer: Answer) -> WordleObservation:
        game = self._game
        return WordleObservation(
            feedback=answer.feedback,
            problem=answer.problem,
            reward=answer.reward,
            done=game is None or game.over,
            won=game is not None and game.won,
            length=self.rules.length,
            guesses_left=0 if game is None else self.rules.guesses - game.guesses,
        )


def server_app(
    name: str,
    make: Callable[[], Environment],
    types: tuple[type[Action], type[Observation], type[State]],
    sessions: int,
) -> FastAPI:
    """The OpenEnv server of an environment, for up to `sessions` games at once."""
    action, observation, state = types
    options: dict[str, Any] = {"env_name": name, "max_concurrent_envs": sessions}
    if "state_cls" in inspect.signature(create_app).parameters:  # newer OpenEnv wants it, 0.4 does not know it
        options["state_cls"] = state
    return create_app(make, action, observation, **options)


class AnnouncingServer(uvicorn.Server):
    """A server that prints its ready line once it answers."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            print(json.dumps({"event": "ready", "url": f"http://{host}:{port}"}), flush=True)


def listen(app: FastAPI, host: str, port: int) -> None:
    """Serve until asked to end. Raises OSError when the address cannot be had."""
    listener = socket.create_server((host, port))
    AnnouncingServer(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001, help="0 takes a free one")
    parser.add_argument("--length", type=int, default=Rules().length, help="letters in a word")
    parser.add_argument("--guesses", type=int, default=Rules().guesses, help="turns in a game")
    parser.add_argument("--words", type=int, default=Rules().secrets, help="how many words are secrets")
    parser.add_argument("--vocabulary", type=int, default=Rules().vocabulary, help="how many words may be guessed")
    parser.add_argument("--sessions", type=int, default=256, help="games at once")
    arguments = parser.parse_args()
    try:
        rules = Rules(arguments.length, arguments.guesses, arguments.words, arguments.vocabulary)
        types = WordleAction, WordleObservation, WordleState
        app = server_app("wordle", lambda: WordleEnvironment(rules), types, arguments.sessions)
        listen(app, arguments.host, arguments.port)
    except (ValueError, OSError) as error:
        print(f"wordle environment on {arguments.host}:{arguments.port}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
