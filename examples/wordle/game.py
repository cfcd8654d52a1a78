"""The rules of Wordle: which words exist, how a guess is marked, and what it is worth. Pure, but for the word list.

A guess is marked letter by letter: `G` is the right letter in the right place, `Y` a letter that stands elsewhere in
the secret, `X` one that does not. A letter is marked no more often than the secret has it, the right places first.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

Problem = Literal["no game", "length", "letters", "unknown word"]
"""Why a guess was not marked: no game is running, or the guess is too long or too short, has something other than
letters, or is not in the vocabulary."""

INVALID = "?"
"""The mark of every letter of a guess that was not marked."""
INVALID_WORTH = -0.05
PARTIAL_WORTH = 0.3
"""What no guess but the secret reaches: every win is worth more."""
SLOWEST_WIN = 0.6
"""What a win would be worth one turn after the last; a win at the first is worth 1."""


@dataclass(frozen=True, slots=True)
class Rules:
    """A variant of the game: letters in a word, turns, and how many words (the first of that length in the list) may be
    secrets and may be guessed. Raises ValueError if the list cannot serve it."""

    length: int = 3
    guesses: int = 4
    secrets: int = 4
    vocabulary: int = 16

    def __post_init__(self) -> None:
        known = len(words(self.length))
        if self.guesses < 1 or not 1 <= self.secrets <= self.vocabulary:
            raise ValueError(f"{self}: needs at least one guess, one secret, and a vocabulary that holds the secrets")
        if self.vocabulary > known:
            lengths = ", ".join(f"{len(words(n))} of {n}" for n in word_lengths())
            raise ValueError(f"{self.vocabulary} words of {self.length} letters wanted; words.txt has {lengths}")


@dataclass(frozen=True, slots=True)
class Game:
    """A game under way. `best` is the worth of the best guess so far, 0 before the first."""

    rules: Rules
    secret: str
    guesses: int = 0
    best: float = 0.0
    won: bool = False

    @property
    def over(self) -> bool:
        return self.won or self.guesses >= self.rules.guesses


@dataclass(frozen=True, slots=True)
class Answer:
    """What the player hears: the marks of the guess, or the problem with it, and the reward."""

    feedback: str
    problem: Problem | None
    reward: float


@cache
def all_words() -> tuple[str, ...]:
    """The word list, in its own order: within a length, the first words are the first to become secrets."""
    return tuple(Path(__file__).with_name("words.txt").read_text(encoding="ascii").split())


@cache
def words(length: int) -> tuple[str, ...]:
    """The words of one length."""
    return tuple(word for word in all_words() if len(word) == length)


def word_lengths() -> list[int]:
    return sorted({len(word) for word in all_words()})


def vocabulary(rules: Rules) -> tuple[str, ...]:
    """The words that may be guessed."""
    return words(rules.length)[: rules.vocabulary]


def secret_for(seed: int, rules: Rules) -> str:
    """The secret of a seed: consecutive seeds go round the secrets, so that a batch of them is balanced."""
    return words(rules.length)[seed % rules.secrets]


def score(guess: str, secret: str) -> str:
    """The marks of `guess`, one of `G`, `Y`, `X` a letter; both words have the same length."""
    elsewhere = Counter(letter for mine, letter in zip(guess, secret, strict=True) if mine != letter)
    marks = []
    for mine, letter in zip(guess, secret, strict=True):
        if mine == letter:
            marks.append("G")
        elif elsewhere[mine] > 0:
            elsewhere[mine] -= 1
            marks.append("Y")
        else:
            marks.append("X")
    return "".join(marks)


def problem_with(guess: str, rules: Rules) -> Problem | None:
    """Why `guess` cannot be played, None if it can."""
    if len(guess) != rules.length:
        return "length"
    if not (guess.isascii() and guess.isalpha() and guess.islower()):
        return "letters"
    return None if guess in vocabulary(rules) else "unknown word"


def worth(feedback: str, turn: int, rules: Rules) -> float:
    """What a marked guess is worth at `turn`, counted from 0: a win 1, less the later it comes; any other guess its
    greens and half its yellows, as a share of `PARTIAL_WORTH`."""
    if set(feedback) == {"G"}:
        return 1.0 - (1.0 - SLOWEST_WIN) * turn / rules.guesses
    return PARTIAL_WORTH * (feedback.count("G") + feedback.count("Y") / 2) / len(feedback)


def play(game: Game, guess: str) -> tuple[Game, Answer]:
    """The game after a guess, and the answer to it. A guess that cannot be played takes a turn, too.

    A reward is what the guess gained over the best one before it, so that the rewards of a game add up to the worth of
    its best guess, less `-INVALID_WORTH` for each guess that could not be played.
    """
    if game.over:
        return game, Answer("", "no game", 0.0)
    after = replace(game, guesses=game.guesses + 1)
    if problem := problem_with(guess, game.rules):
        return after, Answer(INVALID * game.rules.length, problem, INVALID_WORTH)
    feedback = score(guess, game.secret)
    best = max(game.best, worth(feedback, game.guesses, game.rules))
    return replace(after, best=best, won=guess == game.secret), Answer(feedback, None, best - game.best)
