"""A sum in tokens: the question and the answer as the model's own chat template has them."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


class Chat:
    """A `rollouts.Speech`: a user asks, and the policy answers in one turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.end_of_turn: int = tokenizer.eos_token_id

    def opening(self, observation: Mapping[str, Any]) -> list[int]:
        """The question, and the head of the answer."""
        asked = [{"role": "user", "content": observation["question"]}]
        text = self._tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        return self._tokenizer.encode(text, add_special_tokens=False)

    def longest_turn(self, observation: Mapping[str, Any]) -> int:
        """What the environment allows."""
        return int(observation["longest"])

    def action(self, turn: Sequence[int]) -> dict[str, Any]:
        """The answer's text, and whether the policy ended it."""
        text = self._tokenizer.decode(turn, skip_special_tokens=True)
        return {"answer": text, "ended": turn[-1] == self.end_of_turn}

    def reply(self, turn: Sequence[int], observation: Mapping[str, Any]) -> list[int]:
        """Nothing: the answer was the end."""
        return []
