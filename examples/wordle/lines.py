"""Wordle in tokens: a line for each guess, a line for its marks."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

END_OF_LINE = "\n"


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    bos_token_id: int
    eos_token_id: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...


class Lines:
    """A `rollouts.Speech`: the policy guesses by writing a word and the end of its line, and reads the marks."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.end_of_turn = tokenizer.eos_token_id

    def opening(self, observation: Mapping[str, Any]) -> list[int]:
        """The mark of a beginning: a game tells nothing of its secret."""
        return [self._tokenizer.bos_token_id]

    def longest_turn(self, observation: Mapping[str, Any]) -> int:
        """A word and the end of its line."""
        return int(observation["length"]) + 1

    def action(self, turn: Sequence[int]) -> dict[str, Any]:
        """The guess: what stands on the line."""
        return {"guess": self._tokenizer.decode(turn).removesuffix(END_OF_LINE)}

    def reply(self, turn: Sequence[int], observation: Mapping[str, Any]) -> list[int]:
        """The marks, on a line of their own whether or not the policy ended its own."""
        unfinished = turn[-1] != self.end_of_turn
        return self._tokenizer.encode(END_OF_LINE * unfinished + observation["feedback"] + END_OF_LINE)
