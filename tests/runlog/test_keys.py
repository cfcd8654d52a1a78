"""Keys: what is written, what a listed one says, and that no other file of the package spells one."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltawire
from deltawire.errors import FormatError
from deltawire.runlog import keys
from deltawire.runlog.keys import Listed, listed
from deltawire.runlog.records import Payload

RUN = "00112233aabbccdd"
HASH = "ab" * 32
VERSIONS = st.integers(0, 10**12)
PAYLOADS = (Payload("a", 1, HASH),)


def test_keys_say_what_they_hold():
    assert keys.run_key(RUN) == f"runs/{RUN}/run.json"
    assert keys.commit_key(RUN, 11) == f"runs/{RUN}/commits/000011.json"
    assert keys.commit_key(RUN, 12_345_678) == f"runs/{RUN}/commits/12345678.json"
    assert keys.delta_key(11, HASH) == "deltas/step_000011-abababababab.safetensors"
    assert keys.delta_key(11, HASH, 3) == "deltas/step_000011.r003-abababababab.safetensors"
    assert keys.part_key(0, HASH, 3) == "anchors/step_000000-abababababab/r003.safetensors"
    assert keys.anchor_prefix(0, HASH) == "anchors/step_000000-abababababab"
    assert keys.fold_key(3, 9, HASH) == "folds/step_000003-000009-abababababab.safetensors"
    assert keys.way_key(RUN) == f"runs/{RUN}/way.json"
    assert keys.replica_key("gpu-7") == "replicas/gpu-7.json"


@given(VERSIONS, VERSIONS, st.none() | st.integers(0, 999))
def test_a_key_that_is_written_is_read_back(first, second, rank):
    start, end = sorted((first, second + first + 1))
    below = keys.run_prefix(RUN)
    assert listed(RUN, keys.commit_key(RUN, end)) == Listed("commit", end)
    assert listed(RUN, keys.commit_key(RUN, end, HASH)) == Listed("commit", end)
    assert listed(RUN, below + keys.delta_key(end, HASH, rank)) == Listed("delta", end)
    assert listed(RUN, below + keys.fold_key(start, end, HASH)) == Listed("fold", end, start)
    assert listed(RUN, f"{below}{keys.anchor_prefix(end, HASH)}/model.safetensors") == Listed("anchor", end)
    assert listed(RUN, keys.derived_key(RUN, start, end, PAYLOADS)) == Listed("fold record", end, start)
    assert listed(RUN, keys.derived_key(RUN, None, end, PAYLOADS)) == Listed("anchor record", end)
    assert keys.commit_version(RUN, keys.commit_key(RUN, end, HASH)) == end


@pytest.mark.parametrize(
    "key",
    [
        "HEAD.json",
        f"runs/{RUN}/run.json",
        f"runs/{RUN}/commits/11.json",
        f"runs/{RUN}/commits/0000011.json",
        f"runs/{RUN}/commits/000011-ABABABABABAB.json",
        f"runs/{RUN}/deltas/step_000011/x",
        f"runs/{RUN}/derived/fold-000001-{HASH[:12]}.json",
        "runs/ffffffffffffffff/commits/000011.json",
    ],
)
def test_a_key_that_is_never_written_says_nothing(key):
    assert listed(RUN, key) is None
    assert keys.commit_version(RUN, key) is None


def test_a_run_is_known_by_its_commits():
    assert keys.run_of(keys.commit_key(RUN, 3)) == RUN
    assert keys.run_of(keys.run_key(RUN)) is None
    assert keys.run_of("HEAD.json") is None


@pytest.mark.parametrize("name", ["", "a/b", "../x", "x" * 101])
def test_a_replica_name_that_is_no_part_of_a_key_is_refused(name):
    with pytest.raises(FormatError, match="replica name"):
        keys.replica_key(name)


@pytest.mark.parametrize("name", ["best", "v1.0", "0-rc_1", "x" * 100])
def test_the_key_of_a_tag_says_its_name(name):
    assert keys.tag_name(RUN, keys.tag_key(RUN, name)) == name
    assert listed(RUN, keys.tag_key(RUN, name)) is None, "a prune passes it over"


@pytest.mark.parametrize(("step", "anchor"), [(0, True), (11, False), (1_234_567, False)])
def test_the_key_of_a_file_in_trls_layout_says_its_step_and_kind(step, anchor):
    assert keys.trl_step(keys.trl_key(step, anchor=anchor)) == (step, anchor)
    assert keys.trl_step(f"deltas/step_{step}.bin") is None


def test_no_other_module_spells_a_key():
    spelled = re.compile(r"""f?"(runs|replicas|commits|deltas|anchors|folds|derived|tags)/""")
    source = Path(deltawire.__file__).parent
    rooms = [path for path in source.iterdir() if path.name not in ("hub_server", "buckets")]  # they hold any keys
    others = [path for room in rooms for path in room.rglob("*.py") if path.name != "keys.py"]
    assert [path.name for path in others if spelled.search(path.read_text())] == []
