"""What a demo plays, and with which model. The games themselves are in `examples/` of a checkout."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from deltawire.weights.threads import cores


@dataclass(frozen=True, slots=True)
class Act:
    """A stretch of training at one learning rate."""

    name: str
    learning_rate: float
    steps: int


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds a process may take to get ready, and go on without a word, before the demo gives up."""

    start: float = 300.0
    news: float = 120.0


@dataclass(frozen=True, slots=True)
class Game:
    """`examples.NAME` of a checkout has its `model`, `environment` and `trainer`, and with `exam` an exam.

    `model` is the folder of the checkpoint that all start from, made once for all runs: below the checkout or, where it
    is `cached`, below this user's cache folder. `won` says what is counted of the episodes that went well. `context` is
    vLLM's, in tokens, and `threads` are the trainer's and vLLM's each.
    """

    name: str
    model: Path
    acts: tuple[Act, ...]
    quick: tuple[Act, ...]
    won: str
    context: int
    threads: int = 1
    cached: bool = False
    exam: bool = False
    patience: Patience = field(default_factory=Patience)

    @property
    def bucket(self) -> str:
        """The address of its bucket."""
        return f"hf://buckets/me/{self.name}"

    def quickly(self) -> "Game":
        """The same in a few steps of each act."""
        return replace(self, acts=self.quick)


WORDLE = Game(
    name="wordle",
    model=Path("runs", "model"),
    acts=(Act("learn", 5e-4, 80), Act("rl", 2e-6, 20)),
    quick=(Act("learn", 5e-4, 4), Act("rl", 2e-6, 4)),
    won="win rate",
    context=64,
)
"""the first act's rate is one this toy visibly learns at, the second's is one real models are trained at"""
SUMS = Game(
    name="sums",
    model=Path("smollm2-135m-instruct"),
    acts=(Act("learn", 2e-5, 40),),
    quick=(Act("learn", 2e-5, 3),),
    won="right answers",
    context=128,
    threads=max(1, cores() // 2),
    cached=True,
    exam=True,
    patience=Patience(start=900.0, news=600.0),
)
"""a pretrained model; the rate is the lowest of those tried at which its answers get better within minutes"""
