"""Episodes played by vLLM against an environment, with all that GRPO needs of each, and which weights played them.

A turn is one batched request to `/v1/completions`: token ids in, token ids and their log-probabilities out, so nothing
is lost to re-tokenising. Each episode is one OpenEnv session over WebSocket. Which weights played, vLLM tells with each
answer since 0.33, and older ones do by deltawire's middleware; else two looks at `/weight_info` bracket a rollout.
"""

import asyncio
import base64
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, TypeVar

import aiohttp
from openenv.core.client_types import StepResult
from openenv.core.generic_client import GenericEnvClient
from websockets.exceptions import WebSocketException
from yarl import URL

LOOK_AGAIN = 1.0
"""seconds between looks at a server that is not there yet"""
ONLY_A_GATEWAY = {502, 504}
"""what is answered in place of a server that is starting"""
BUSY = 503
"""what vLLM 0.33 answers new requests while a follower with `--pause wait` or `abort` writes; a gateway may, too"""
ASK_AGAIN = 0.1
"""seconds between requests to a server that is busy"""
POLICY_HEADERS = ("X-Policy-Version", "X-Policy-Version-Last")
"""the first and the last weights that made an answer, as deltawire's middleware for vLLM tells them"""
T = TypeVar("T")


class ServerError(RuntimeError):
    """A server the rollouts need is not there or not what it should be: which URL, and what to start."""


class NotThereYet(ServerError):
    """Nobody answers, or only a gateway does: the one that waiting may help."""


class Busy(NotThereYet):
    """It is there, and takes no requests just now."""


class Speech(Protocol):
    """How a game is put into tokens, and what the policy writes into actions. An observation is what the environment
    answered."""

    end_of_turn: int
    """the token that ends what the policy writes"""

    def opening(self, observation: Mapping[str, Any]) -> list[int]:
        """What the policy reads before its first turn."""

    def longest_turn(self, observation: Mapping[str, Any]) -> int:
        """How many tokens a turn may take."""

    def action(self, turn: Sequence[int]) -> dict[str, Any]:
        """What the environment is sent, of the tokens that the policy wrote."""

    def reply(self, turn: Sequence[int], observation: Mapping[str, Any]) -> list[int]:
        """What the policy reads after its turn."""


@dataclass(slots=True)
class Episode:
    """One game as tokens. `sampled[i]` says whether the policy chose `tokens[i]`, with log-probability `logprobs[i]`
    under the weights that sampled it; the other log-probabilities are 0."""

    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reward: float = 0.0
    won: bool = False
    turns: int = 0

    def read(self, tokens: Sequence[int]) -> None:
        """Append what the environment said."""
        self.tokens += tokens
        self.sampled += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)

    def wrote(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Append what the policy sampled."""
        self.tokens += tokens
        self.sampled += [True] * len(tokens)
        self.logprobs += logprobs
        self.turns += 1

    @property
    def last_turn(self) -> list[int]:
        """What the policy wrote last, at the end of the tokens."""
        read = len(self.sampled) - self.sampled[::-1].index(False)
        return self.tokens[read:]


@dataclass(frozen=True, slots=True)
class Rollout:
    """Groups of episodes, each group from one seed, and vLLM's labels of the oldest and the newest weights that may
    have played: those that did, where vLLM tells, else those before and after."""

    groups: tuple[tuple[Episode, ...], ...]
    version_before: str
    version_after: str
    seconds: float


class Player:
    """Plays rollouts: `groups` seeds at a time, `members` games from each, all at once. A server that is busy is
    asked again for `timeout` seconds. An address may hold a name and password; errors leave them out.

    Use as an async context manager; entering opens the sessions. Raises ServerError when vLLM or the environment cannot
    be reached, answers with an error, or hides `/weight_info`; entering waits `wait` seconds for both to be there.
    vLLM's API key, when it has one, is read from VLLM_API_KEY.
    """

    def __init__(
        self,
        engine_url: str,
        environment_url: str,
        speech: Speech,
        *,
        model: str = "policy",
        groups: int = 8,
        members: int = 8,
        timeout: float = 60.0,
        wait: float = 0.0,
    ) -> None:
        address = URL(engine_url.rstrip("/"))
        self.engine_url = str(address.with_user(None) if address.user else address).rstrip("/")
        login = f"{address.user}:{address.password or ''}".encode()
        self._login = f"Basic {base64.b64encode(login).decode()}" if address.user else None
        self.environment_url = environment_url.rstrip("/")
        self._speech = speech
        self._model = model
        self._groups, self._members = groups, members
        self._timeout, self._wait = timeout, wait
        self._sessions: list[GenericEnvClient] = []
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Player":
        key = os.environ.get("VLLM_API_KEY")
        named = self._login or (f"Bearer {key}" if key else None)
        self._http = aiohttp.ClientSession(
            headers={"Authorization": named} if named else {},
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            connector=aiohttp.TCPConnector(force_close=True),  # vLLM may close an idle connection under a request
        )
        try:
            deadline = time.monotonic() + self._wait
            await self._once_there(self.weight_version, deadline)
            for _ in range(self._groups * self._members):
                self._sessions.append(await self._once_there(self._new_session, deadline))
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        await asyncio.gather(*(session.close() for session in self._sessions), return_exceptions=True)
        if self._http is not None:
            await self._http.close()

    async def _once_there(self, ask: Callable[[], Awaitable[T]], deadline: float) -> T:
        while True:
            try:
                return await ask()
            except NotThereYet:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(LOOK_AGAIN)

    async def _once_free(self, ask: Callable[[], Awaitable[T]]) -> T:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return await ask()
            except Busy:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(ASK_AGAIN)

    async def _new_session(self) -> GenericEnvClient:
        session = GenericEnvClient(self.environment_url, message_timeout_s=self._timeout)
        await self._environment(session.connect())
        return session

    async def weight_version(self) -> str:
        """vLLM's label of the weights it serves; "default" until its first update."""
        answer = await self._engine("GET", "/weight_info")
        return str(answer["weight_version"])

    async def play(self, first_seed: int) -> Rollout:
        """One game in every session; group g is from seed `first_seed + g`."""
        started = time.monotonic()
        before = await self.weight_version()
        episodes, told = await self._episodes(first_seed)
        after = await self.weight_version()
        before, after = oldest_and_newest(told) or (before, after)
        groups = tuple(
            tuple(episodes[start : start + self._members]) for start in range(0, len(episodes), self._members)
        )
        return Rollout(groups, before, after, time.monotonic() - started)

    async def _episodes(self, first_seed: int) -> tuple[list[Episode], set[str]]:
        """What was played, and the labels of the weights that vLLM says played it, if it says."""
        told: set[str] = set()
        answers = await self._environment(
            asyncio.gather(
                *(session.reset(seed=first_seed + i // self._members) for i, session in enumerate(self._sessions))
            )
        )
        longest = max(self._speech.longest_turn(answer.observation) for answer in answers)
        episodes = [Episode() for _ in answers]
        for episode, answer in zip(episodes, answers, strict=True):
            episode.read(self._speech.opening(answer.observation))
        live = list(range(len(episodes)))
        while live:
            told |= await self._sample([episodes[i] for i in live], longest)
            actions = [self._speech.action(episodes[i].last_turn) for i in live]
            answers = await self._environment(
                asyncio.gather(*(self._sessions[i].step(action) for i, action in zip(live, actions, strict=True)))
            )
            for i, answer in zip(live, answers, strict=True):
                self._record(episodes[i], answer)
            live = [i for i, answer in zip(live, answers, strict=True) if not answer.done]
        return episodes, told

    async def _sample(self, episodes: Sequence[Episode], max_tokens: int) -> set[str]:
        """Let the policy take one turn in each episode. The labels of the weights that did, if vLLM tells."""
        request = {
            "model": self._model,
            "prompt": [episode.tokens for episode in episodes],
            "max_tokens": max_tokens,
            "stop_token_ids": [self._speech.end_of_turn],
            "temperature": 1.0,  # the untouched distribution: its log-probabilities are GRPO's behaviour policy
            "top_p": 1.0,
            "top_k": 0,
            "logprobs": 0,
            "return_token_ids": True,
            "return_weight_versions": True,  # passed over by vLLM before 0.33
        }
        answer = await self._once_free(lambda: self._engine("POST", "/v1/completions", json=request))
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        for episode, choice in zip(episodes, choices, strict=True):
            episode.wrote(choice["token_ids"], choice["logprobs"]["token_logprobs"])
        spans = {span["version"] for choice in choices for span in choice.get("weight_versions") or ()}
        return spans or {*answer["policy_versions"]}

    def _record(self, episode: Episode, answer: StepResult[dict[str, Any]]) -> None:
        """Let the policy read the answer, and count the reward."""
        episode.read(self._speech.reply(episode.last_turn, answer.observation))
        episode.reward += answer.reward or 0.0
        episode.won = answer.observation["won"]

    async def _engine(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        assert self._http is not None, "use `async with Player(…)`"
        url = self.engine_url + path
        try:
            async with self._http.request(method, url, **options) as response:
                if response.status == 404 and path == "/weight_info":
                    raise ServerError(f"{url}: not found; start vLLM with VLLM_SERVER_DEV_MODE=1")
                if response.status == BUSY:
                    raise Busy(f"{url}: HTTP {response.status}: {(await response.text())[:300]}")
                if response.status in ONLY_A_GATEWAY:
                    raise NotThereYet(f"{url}: HTTP {response.status}: vLLM is not ready behind it")
                if response.status != 200:
                    raise ServerError(f"{url}: HTTP {response.status}: {(await response.text())[:300]}")
                told = [response.headers[name] for name in POLICY_HEADERS if name in response.headers]
                return {**await response.json(), "policy_versions": told}
        except (aiohttp.ClientError, TimeoutError) as error:
            raise NotThereYet(
                f"{url}: {error or 'no answer in time'}; is vLLM running there? Start it with "
                f"`vllm serve MODEL_DIR --served-model-name {self._model}`"
            ) from error

    async def _environment(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except (OSError, RuntimeError, TimeoutError, WebSocketException) as error:
            raise NotThereYet(
                f"{self.environment_url}: {error or 'no answer in time'}; is the environment running there? "
                "Start the game's; for Wordle it is `python -m examples.wordle.environment`"
            ) from error


def oldest_and_newest(labels: Iterable[str]) -> tuple[str, str] | None:
    """Of labels "<run>:<version>" of one run; None of any others."""
    parted = [label.rpartition(":") for label in labels]
    if len({run for run, _, _ in parted}) != 1 or not all(version.isdecimal() for _, _, version in parted):
        return None
    ordered = sorted(parted, key=lambda label: int(label[2]))
    return "".join(ordered[0]), "".join(ordered[-1])
