"""Wordle as TRL wants an environment, and a toy tokenizer taught the language of chats and tools. Imports no TRL."""

from typing import Any

from openenv.core.generic_client import GenericEnvClient
from transformers import PreTrainedTokenizerBase

TASK = (
    "Play Wordle: find the secret word with the tool `guess`. G is right, Y is elsewhere in the word, X is not in it."
)


class Wordle:
    """One game at a time on an OpenEnv server, as TRL wants its environments: public methods are the tools."""

    def __init__(self, url: str) -> None:
        self._server = GenericEnvClient(base_url=url).sync()
        self._reward = 0.0

    def reset(self, seed: int, **_: Any) -> None:
        """A new game; all samples of a group have its `seed` and with it the secret."""
        self._reward = 0.0
        self._server.reset(seed=seed)

    def guess(self, word: str) -> str:
        """
        Guess the secret word.

        Args:
            word: The guess, in lower-case letters.

        Returns:
            A mark for each letter: G, Y or X, or ? when the guess is no word.
        """
        answer = self._server.step({"guess": word})
        self._reward += answer.reward or 0.0
        return str(answer.observation["feedback"])

    def get_reward(self) -> float:
        """What the game so far is worth, at most 1."""
        return self._reward


def teach_to_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a tokenizer of plain lines speak TRL's language: a line of the policy's is a call of `guess`, and the next
    line is the answer. What is asked of the policy is left out, for this one has seen nothing but games."""
    tokenizer.chat_template = (
        "{{- bos_token }}{%- for message in messages %}{%- if message.role == 'assistant' %}"
        "{%- for call in message.tool_calls or [] %}{{- call.function.arguments.word }}{%- endfor %}"
        "{{- message.content }}{{- eos_token }}"
        "{%- elif message.role == 'tool' %}{{- message.content }}{{- eos_token }}{%- endif %}{%- endfor %}"
    )
    call = {"type": "function", "function": {"name": "guess", "arguments": {"word": "{word}"}}}
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": rf"(?:{tokenizer.bos_token}|\n)",
        "fields": {
            "tool_calls": {"open_pattern": r"(?P<word>[^\n]*)\n", "repeats": True, "transform": call},
            "content": {"content": "text"},
        },
    }
