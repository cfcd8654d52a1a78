"""What `deltawire follow` prints: lines where nobody looks, a bar on a terminal, one object a line with --json."""

import json

from deltawire.cli.telling import Teller
from deltawire.errors import Unavailable
from deltawire.follow.health import Health
from deltawire.follow.news import Current, Fetching, Waiting

ANCHOR = Fetching("0123456789abcdef", 7, 3 << 20, 64 << 20)


def test_without_a_terminal_everything_is_a_line(capsys):
    teller = Teller(as_json=False, bar=False)
    standing = Health(clock=lambda: 700.0, problem="no answer", problem_since=520.0)
    teller.problem(Unavailable("no answer"), standing)
    for news in (Waiting("nothing is published there yet", 60.0), ANCHOR, Current(ANCHOR.run, 7)):
        teller.news(news)
    assert capsys.readouterr().out.splitlines() == [
        "problem for 3 min: Unavailable: no answer",
        "waiting for 1 min: nothing is published there yet",
        "version 7: fetching an anchor, 3.00 MiB of 64.00 MiB",
        "version 7: the server is current",
    ]


def test_an_anchor_that_is_there_at_once_is_not_worth_a_line(capsys):
    Teller(as_json=False, bar=False).news(Fetching(ANCHOR.run, 7, 0, 1 << 20))
    assert capsys.readouterr().out == ""


def test_on_a_terminal_an_anchor_is_a_bar_that_the_next_line_ends(capsys):
    teller = Teller(as_json=False, bar=True)
    teller.news(ANCHOR)
    assert teller._progress.tasks[0].percentage == 100 * 3 / 64
    teller.news(Current(ANCHOR.run, 7))
    assert teller._progress is None
    assert capsys.readouterr().out == "version 7: the server is current\n"


def test_as_json_every_line_is_an_event(capsys):
    Teller(as_json=True).news(ANCHOR)
    said = json.loads(capsys.readouterr().out)
    assert said == {"event": "fetching", "run": ANCHOR.run, "version": 7, "done": 3 << 20, "total": 64 << 20}
