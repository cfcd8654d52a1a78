"""Small sums: which are asked, which are held out, and what an answer is worth. Pure."""

import random
import re
from dataclasses import dataclass
from itertools import product

SMALLEST, LARGEST = 2, 9
HELD_OUT = ((7, 8), (4, 9), (5, 3), (6, 6), (2, 7), (8, 4))
"""what is never trained on, in either order"""
IN_TIME = 0.25
"""what it is worth to end the answer within `LONGEST`, right or wrong"""
LONGEST = 24
"""tokens an answer may take"""
NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Sum:
    """Two numbers to add."""

    a: int
    b: int

    @property
    def question(self) -> str:
        return f"What is {self.a} + {self.b}?"

    def is_right(self, answer: str) -> bool:
        """Whether the last number in the answer is the sum: "7 + 8 = 15." is right, "15 or 16" is not."""
        return NUMBER.findall(answer)[-1:] == [str(self.a + self.b)]


def held_out() -> tuple[Sum, ...]:
    """The questions of the exam."""
    return tuple(Sum(a, b) for a, b in HELD_OUT)


def trained() -> tuple[Sum, ...]:
    """All other sums of the same size, in an order without order."""
    numbers = range(SMALLEST, LARGEST + 1)
    left = [Sum(a, b) for a, b in product(numbers, numbers) if not {(a, b), (b, a)} & set(HELD_OUT)]
    random.Random(0).shuffle(left)
    return tuple(left)


def sum_for(seed: int) -> Sum:
    """The sum of a seed: consecutive seeds go round those that are trained on."""
    sums = trained()
    return sums[seed % len(sums)]


def worth(right: bool, ended: bool) -> float:
    """The reward of an answer."""
    return float(right) + IN_TIME * ended
