"""The rules: marks with repeated letters, what a guess is worth, and what cannot be played."""

from collections import Counter

import pytest
from examples.wordle.game import (
    Game,
    Rules,
    all_words,
    play,
    problem_with,
    score,
    secret_for,
    vocabulary,
    word_lengths,
    words,
    worth,
)
from hypothesis import given
from hypothesis import strategies as st

FEW_LETTERS = st.text("abc", min_size=5, max_size=5)
RULES = Rules(length=3, guesses=4, secrets=4, vocabulary=16)


@pytest.mark.parametrize(
    ("guess", "secret", "marks"),
    [
        ("crane", "crane", "GGGGG"),
        ("speed", "abide", "XXYXY"),
        ("allee", "apple", "GYXXG"),
        ("eerie", "steel", "YYXXX"),
        ("geese", "eagle", "YYXXG"),
        ("aab", "baa", "YGY"),
        ("aaa", "bab", "XGX"),
    ],
)
def test_a_repeated_letter_is_marked_as_often_as_the_secret_has_it_right_places_first(
    guess: str, secret: str, marks: str
) -> None:
    assert score(guess, secret) == marks


@given(FEW_LETTERS)
def test_a_word_guessed_is_all_green(word: str) -> None:
    assert score(word, word) == "GGGGG"


@given(FEW_LETTERS, FEW_LETTERS)
def test_marks_count_the_letters_both_words_have(guess: str, secret: str) -> None:
    marks = score(guess, secret)
    shared = Counter(guess) & Counter(secret)
    marked = Counter(letter for letter, mark in zip(guess, marks, strict=True) if mark in "GY")
    assert marked == shared
    assert [mark == "G" for mark in marks] == [mine == theirs for mine, theirs in zip(guess, secret, strict=True)]


@given(st.lists(st.sampled_from([*vocabulary(RULES), "zzz", "to", "C4t"]), min_size=4, max_size=4), st.integers(0, 9))
def test_the_rewards_of_a_game_add_up_to_the_worth_of_its_best_guess_less_what_could_not_be_played(
    guesses: list[str], seed: int
) -> None:
    game = Game(RULES, secret_for(seed, RULES))
    rewards, worths, unplayable = 0.0, [0.0], 0
    for turn, guess in enumerate(guesses):
        if game.over:
            break
        game, answer = play(game, guess)
        rewards += answer.reward
        unplayable += answer.problem is not None
        if answer.problem is None:
            worths.append(worth(answer.feedback, turn, RULES))
    assert rewards == pytest.approx(max(worths) - 0.05 * unplayable)


@given(st.sampled_from(vocabulary(RULES)), st.sampled_from(vocabulary(RULES)))
def test_every_win_is_worth_more_than_any_other_guess_and_an_early_one_more_than_a_late(
    guess: str, secret: str
) -> None:
    wins = [worth("GGG", turn, RULES) for turn in range(RULES.guesses)]
    assert wins == sorted(wins, reverse=True)
    assert wins[0] == 1.0
    assert guess == secret or worth(score(guess, secret), 0, RULES) < wins[-1]


@pytest.mark.parametrize(
    ("guess", "problem"),
    [("", "length"), ("ca", "length"), ("cats", "length"), ("c t", "letters"), ("Cat", "letters"), ("çat", "letters"),
     ("zzz", "unknown word"), ("zoo", "unknown word"), ("cat", None)],
)  # fmt: skip
def test_a_guess_that_cannot_be_played_has_a_problem_of_its_own(guess: str, problem: str | None) -> None:
    assert problem_with(guess, RULES) == problem


def test_a_guess_that_cannot_be_played_takes_a_turn() -> None:
    game, answer = play(Game(RULES, "cat"), "zzz")
    assert (game.guesses, answer.feedback, answer.problem, answer.reward) == (1, "???", "unknown word", -0.05)


def test_a_game_that_is_over_changes_no_more() -> None:
    won, _ = play(Game(RULES, "cat"), "cat")
    after, answer = play(won, "dog")
    assert won.won
    assert after == won
    assert (answer.problem, answer.reward) == ("no game", 0.0)


def test_consecutive_seeds_go_round_the_secrets() -> None:
    assert [secret_for(seed, RULES) for seed in range(5)] == ["cat", "dog", "sun", "map", "cat"]


def test_the_word_list_has_every_word_once_in_lower_case_and_hundreds_of_them() -> None:
    assert len(set(all_words())) == len(all_words()) > 500
    assert all(word.isascii() and word.isalpha() and word.islower() for word in all_words())
    assert word_lengths() == [3, 4, 5]
    assert min(len(words(length)) for length in word_lengths()) >= 100


@pytest.mark.parametrize(
    "wrong",
    [{"length": 9}, {"guesses": 0}, {"secrets": 0}, {"secrets": 20, "vocabulary": 10}, {"vocabulary": 10_000}],
)
def test_rules_the_word_list_cannot_serve_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"vocabulary|words\.txt"):
        Rules(**wrong)
