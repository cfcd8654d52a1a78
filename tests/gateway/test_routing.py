"""Which engine gets a request: one that is ready, new enough, and has its prefix, unless it has more than its share."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from deltawire.errors import FormatError
from deltawire.gateway.engines import parse_engine
from deltawire.gateway.routing import Engine, Floor, Known, choose, parse_floor, prefix_of, why_none

URLS = [f"http://engine-{number}:8000" for number in range(4)]


def fleet(*versions: int | None) -> list[Known]:
    """Ready engines that serve these versions of a run."""
    return [
        Known(Engine(url), ready=True, reason=None, run="ab", version=version)
        for url, version in zip(URLS, versions, strict=False)
    ]


def test_a_request_goes_to_no_engine_that_is_not_ready_or_too_old():
    engines = fleet(5, 7, 9)
    engines[2] = replace(engines[2], ready=False)
    chosen = {choose(engines, f"prompt {number}", Floor(6)).engine.url for number in range(50)}
    assert chosen == {URLS[1]}
    assert choose(engines, "prompt", Floor(8)) is None
    assert choose(engines, "prompt", Floor(6, "cd")) is None
    assert choose(fleet(None), "prompt", Floor(0)) is None and choose(fleet(None), "prompt", None)


def test_a_prefix_stays_with_its_engine_whatever_the_others_do():
    engines = fleet(1, 1, 1, 1)
    prompts = [f"prompt {number}" for number in range(400)]
    before = {prompt: choose(engines, prompt, None).engine.url for prompt in prompts}
    assert min(Counter(before.values()).values()) > 60, "spread over all"
    without = [known for known in engines if known.engine.url != URLS[0]]
    after = {prompt: choose(without, prompt, None).engine.url for prompt in prompts}
    moved = [prompt for prompt in prompts if before[prompt] != after[prompt]]
    assert {before[prompt] for prompt in moved} == {URLS[0]}, "only those of the engine that went"


def test_an_engine_with_more_than_its_share_hands_a_prefix_to_the_next():
    engines = fleet(1, 1, 1)
    first = choose(engines, "popular", None).engine.url
    busy = [replace(known, in_flight=20 if known.engine.url == first else 0) for known in engines]
    second = choose(busy, "popular", None).engine.url
    assert second != first
    assert choose(engines, "popular", None, without=[first]).engine.url == second


def test_a_request_without_a_prefix_goes_where_the_fewest_are():
    engines = [replace(known, in_flight=count) for known, count in zip(fleet(1, 1, 1), (3, 1, 2), strict=True)]
    assert choose(engines, None, None).engine.url == URLS[1]


@pytest.mark.parametrize(
    ("body", "prefix"),
    [
        ({"prompt": "once upon"}, "once upon"),
        ({"prompt": ["once upon", "a time"]}, "once upon"),
        ({"prompt": [1, 2, 3]}, "1 2 3"),
        ({"prompt": [[1, 2], [3]]}, "1 2"),
        ({"prompt": "other", "prompt_cache_key": "game 7"}, "game 7"),
        ({"messages": [{"role": "user", "content": "hi"}]}, '[{"role": "user", "content": "hi"}]'),
        ({"prompt": ""}, None),
        ({"messages": []}, None),
        ({"model": "policy"}, None),
        ([1], None),
    ],
)
def test_the_prefix_of_a_request(body, prefix):
    assert prefix_of(json.dumps(body).encode()) == prefix


def test_a_body_that_is_none_has_no_prefix():
    assert prefix_of(b"{") is None and prefix_of(b"\xff") is None and prefix_of(b"") is None
    assert prefix_of(b"[" * 200_000) is None


def test_prompts_that_begin_alike_go_to_one_engine():
    engines, system = fleet(1, 1, 1, 1), "You play Wordle. " * 40
    bodies = [json.dumps({"prompt": f"{system} Turn {turn}"}).encode() for turn in range(8)]
    assert len({choose(engines, prefix_of(body), None).engine.url for body in bodies}) == 1


def test_the_oldest_policy_that_a_request_accepts():
    assert parse_floor(None) is None
    assert parse_floor("12") == Floor(12) and parse_floor("ab:12") == Floor(12, "ab")
    for wrong in ("", "new", "ab:", "-1", "1.5"):
        with pytest.raises(FormatError, match="X-Min-Policy-Version"):
            parse_floor(wrong)


def test_why_none_names_the_reasons_or_the_newest():
    assert "version 7" in why_none(fleet(5, 7), Floor(9)) and "version 9 was asked" in why_none(fleet(5, 7), Floor(9))
    down = [replace(known, ready=False, reason="joining") for known in fleet(1, 1)]
    assert why_none(down, None) == "none of 2 engines is ready: joining"


def test_an_engine_is_an_address_and_perhaps_where_its_follower_tells_its_health():
    assert parse_engine("http://a:8000/") == Engine("http://a:8000")
    assert parse_engine("http://a:8000,http://a:8001/health") == Engine("http://a:8000", "http://a:8001/health")
    for wrong in ("a:8000", "http://a:8000,8001"):
        with pytest.raises(FormatError, match="no address"):
            parse_engine(wrong)
    with pytest.raises(FormatError, match="password") as refused:
        parse_engine("http://ada:secret@a:8000")
    assert "secret" not in str(refused.value)
