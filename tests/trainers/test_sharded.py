"""Every rank of a sharded job publishes the shards it holds: readers get whole tensors, and nothing was gathered."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import commits, position, read_weights
from waiting import until

import deltawire as dw
from deltawire.demo.processes import free_port
from deltawire.format import delta_file
from deltawire.format.checkpoint import Checkpoint
from deltawire.runlog.signing import read_key
from deltawire.upkeep.compactor import Compactor
from deltawire.upkeep.retention import Policy, carry_out, find_prunable
from deltawire.weights.bits import Bits, zeros
from deltawire.weights.blocks import part_of
from deltawire.weights.boxes import Box
from deltawire.weights.delta import Delta
from deltawire.weights.tensors import equal

SUPPORT = Path(__file__).parents[1] / "support"
JOB = SUPPORT / "sharded_job.py"
LIMIT = 240.0
"""seconds for one job, on a busy machine"""


def start(scenarios, size, folder, job=JOB):
    """The ranks of a job, as processes of ours."""
    command = [sys.executable, "-W", "error::ResourceWarning", str(job), scenarios]
    port = str(free_port())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, sys.path)])}
    return [
        subprocess.Popen(
            [*command, str(rank), str(size), port, str(folder)], stderr=subprocess.PIPE, text=True, env=environment
        )
        for rank in range(size)
    ]


def finish(ranks):
    """Wait for all; what each said, when one failed."""
    deadline = time.monotonic() + LIMIT
    said = []
    try:
        for rank in ranks:
            said.append(rank.communicate(timeout=max(1.0, deadline - time.monotonic()))[1])
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), told(said)


def told(said):
    """What the ranks wrote, without torch's own C++ frames."""
    lines = [line for text in said for line in text.splitlines() if "frame #" not in line]
    return "\n".join(lines)[-6000:]


def run(scenarios, size, folder, job=JOB):
    folder.mkdir(exist_ok=True)
    finish(start(scenarios, size, folder, job))
    return folder


def expected(place):
    """The whole tensors of each version, as the ranks saved them."""
    versions = {}
    for path in place.glob("version-*.npz"):
        with np.load(path) as arrays:
            bits = {name: Bits("BF16", array.shape, array.reshape(-1)) for name, array in arrays.items()}
        versions[int(path.stem.removeprefix("version-"))] = bits
    return dict(sorted(versions.items()))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Everything that two ranks are asked to do, done once."""
    done = "fsdp,hsdp,mixed,captures,uploads,apart,damaged,tied,closes,stops,gone"
    return run(done, 2, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Everything that four ranks are asked to do, done once."""
    return run("fsdp,hsdp,tp_fsdp,on_device,tied", 4, tmp_path_factory.mktemp("four"))


CASES = [
    *(("pair", scenario) for scenario in ("captures", "uploads", "fsdp", "hsdp")),
    *(("four", scenario) for scenario in ("fsdp", "hsdp", "tp_fsdp")),
]


def test_readers_get_the_same_of_ranks_whose_baseline_lies_on_a_device(four):
    bucket = dw.open_bucket(f"file://{four / 'on_device'}/bucket")
    versions = expected(four / "on_device")
    assert list(versions) == [0, 1, 2, 3, 4]
    for version, bits in versions.items():
        assert equal(read_weights(bucket, version), bits), version


@pytest.mark.parametrize(("job", "scenario"), CASES)
def test_readers_get_every_version_bit_for_bit(job, scenario, request, tmp_path):
    place = request.getfixturevalue(job) / scenario
    bucket = dw.open_bucket(f"file://{place}/bucket")
    versions = expected(place)
    for version, bits in versions.items():
        assert equal(read_weights(bucket, version, base=place / "base"), bits), version
    trusted = [read_key(place / "key").public] if scenario == "hsdp" else []
    dw.materialize(bucket, tmp_path / "out", base=place / "base", trusted=trusted)
    assert equal(dict(Checkpoint(tmp_path / "out")), bits)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(("job", "scenario"), [case for case in CASES if case[1] != "uploads"])
def test_the_files_of_all_ranks_add_up_to_the_change_of_the_whole_tensors(job, scenario, request):
    place = request.getfixturevalue(job) / scenario
    bucket = dw.open_bucket(f"file://{place}/bucket")
    versions = expected(place)
    weights = {name: bits.copy() for name, bits in next(iter(versions.values())).items()}
    found = dw.Subscriber(bucket, base=place / "base").updates(position(bucket, min(versions)), weights=weights)
    changes = []
    for update in found:
        changes.append(update)
        update.delta.apply_(weights)
    for before, after in zip(list(versions), list(versions)[1:], strict=False):
        (update,) = [update for update in changes if update.position.version == after]
        assert dict(update.delta) == dict(Delta.between(versions[before], versions[after]))
        size = {"pair": 2, "four": 4}[job]
        owners = size if scenario != "hsdp" else size // 2
        assert len(update.commit.payloads) == owners
        assert all(
            f".r{rank:03d}-" in payload.key for rank, payload in enumerate(update.commit.payloads) if owners == size
        )
        parts = [
            dw.decode(bucket.get(f"runs/{update.commit.run}/{p.key}", limit=p.size), base=versions[before])
            for p in update.commit.payloads
        ]
        assert sum(part.changed for part in parts) == update.delta.changed
    assert all(commit.parent is None or commit.payloads for commit in commits(bucket))


@pytest.mark.parametrize("job", ["pair", "four"])
def test_ranks_write_class_in_tiles_of_their_own_part_and_of_each_receiver_s(job, request):
    place = request.getfixturevalue(job) / "fsdp"
    bucket, versions = dw.open_bucket(f"file://{place}/bucket"), expected(place)
    for commit in commits(bucket)[2:]:
        before, after = versions[commit.parent], versions[commit.version]
        files = [
            delta_file.open_file(bucket.get(f"runs/{commit.run}/{part.key}", limit=part.size))
            for part in commit.payloads
        ]
        assert all("embed.weight" in file.needs for file in files if "embed.weight" in file)
        assert not any("down.weight" in file.needs for file in files)  # no tiles of eight elements suit its receivers
        change = Delta.between(before, after)["embed.weight"]
        for box in (Box(0, (31, 4), (8, 1)), Box(4, (31, 4), (8, 1))):
            mine = zeros("BF16", (31, 8))
            here = box.positions(np.arange(box.size))
            mine.data[here] = before["embed.weight"].data[here]
            part, found = part_of(mine, [box], 8), Delta()
            for file in files:
                found += Delta({"embed.weight": file.tensor("embed.weight", part)} if "embed.weight" in file else {})
            assert found["embed.weight"] == box.spread(box.restrict(change), (31, 8))


def test_copies_of_shards_are_of_class_too_where_rank_0_asks_for_it(pair):
    found = commits(dw.open_bucket(f"file://{pair / 'hsdp'}/bucket"))
    written = [[part.key.endswith(".class.safetensors") for part in commit.payloads] for commit in found]
    assert written[0] == [False] * len(written[0])  # a run's first version
    assert written[1:3] == [[True], [True]]


def test_a_run_that_began_from_zeros_is_compacted_and_pruned_as_any_other(pair, tmp_path):
    shutil.copytree(pair / "hsdp" / "bucket", tmp_path / "bucket")
    bucket = dw.open_bucket(f"file://{tmp_path}/bucket")
    last = max(expected(pair / "hsdp"))
    carry_out(bucket, find_prunable(bucket, commits(bucket)[0].run, Policy(anchors=1, hours=0)))
    assert equal(read_weights(bucket), expected(pair / "hsdp")[last])  # version 0 is all there is to start from
    key = pair / "hsdp" / "key"
    with Compactor(bucket, tmp_path / "mirror", anchors=1, signing_key=key) as compactor:
        assert compactor.step()
    pruned = find_prunable(bucket, commits(bucket)[0].run, Policy(anchors=1, hours=0))
    assert any("anchors/step_000000" in key for key in pruned.keys)
    carry_out(bucket, pruned)
    assert equal(read_weights(bucket), expected(pair / "hsdp")[last])


@pytest.mark.parametrize("job", ["pair", "four"])
def test_a_tied_tensor_that_every_rank_names_twice_is_published_once(job, request, tmp_path):
    place = request.getfixturevalue(job) / "tied"
    for name in ("bucket", "zeros", "alone"):
        bucket = dw.open_bucket(f"file://{place}/{name}")
        dw.materialize(bucket, tmp_path / name, base=place / "base")
        held = Checkpoint(tmp_path / name)
        assert "embed_tokens.weight" in held
        assert "lm_head.weight" not in held
        assert dw.verify(bucket, base=place / "base").anchors == 1


def test_what_waits_on_every_rank_folds_at_the_same_places(pair):
    found = commits(dw.open_bucket(f"file://{pair / 'uploads'}/bucket"))
    assert found[-1].version == 44
    assert len(found) < 40, "nothing was folded: the store was not slow enough for this test to mean anything"


@pytest.mark.parametrize("killed", [0, 1])
def test_a_job_whose_rank_is_killed_continues_its_run_from_its_own_checkpoint(killed, tmp_path):
    place = tmp_path / "train"
    bucket = dw.open_bucket(f"file://{place}/bucket")
    ranks = start("train", 2, tmp_path)
    try:
        until(
            lambda: len([*place.glob("state-*-[01].pt")]) >= 5,  # the third step, about to be published
            seconds=LIMIT,
            unless=lambda: any(rank.poll() is not None for rank in ranks),
        )
        ranks[killed].send_signal(signal.SIGKILL)
        ranks[1 - killed].communicate(timeout=LIMIT)
        assert ranks[1 - killed].returncode > 0, "the other rank went on as if nothing had happened"
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    before = commits(bucket)
    assert 2 <= len(before) < 7
    run("train", 2, tmp_path)
    after = commits(bucket)
    assert {commit.run for commit in after} == {before[0].run}
    assert after[: len(before)] == before
    assert after[-1].step == 6
    assert equal(read_weights(bucket, base=place / "base"), expected(place)[6])
