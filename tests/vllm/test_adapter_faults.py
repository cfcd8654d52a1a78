"""What a follower of adapters does when endpoints fail, folders are lost or damaged, and others are in its way."""

import shutil
import threading

import pytest
import torch
from runs import PATIENCE
from small_adapters import NAME, SmallAdapterRun
from stub_engine import StubEngine
from verbs import run_verb

import deltawire as dw
from deltawire.errors import AccessRefused, EngineError, EngineUnsupported, FormatError
from deltawire.format.checkpoint import Checkpoint
from deltawire.vllm.adapters import AdapterFollower


@pytest.fixture
def run(tmp_path):
    made = SmallAdapterRun(tmp_path)
    yield made
    made.publisher.close(10)


@pytest.fixture
def engine():
    with StubEngine() as engine:
        yield engine


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (404, {"detail": "Not Found"}, EngineUnsupported, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (500, {"error": {"message": "LoRA is not enabled. Use --enable-lora"}}, EngineUnsupported, "--enable-lora"),
        (
            404,
            {"error": {"type": "NotFoundError", "message": "No adapter found for x"}},
            EngineError,
            "No adapter found",
        ),
        (400, {"error": {"message": "rank 64 is too large"}}, EngineError, "rank 64"),
        (200, {}, EngineError, "does not list it"),
    ],
)
def test_a_server_that_does_not_load_is_a_typed_error_and_the_next_step_loads(run, engine, status, body, kind, says):
    engine.fail("/v1/load_lora_adapter", status, body)
    with run.follower(engine) as follower:
        with pytest.raises(kind, match=says):
            follower.step()
        assert follower.health.served is None
        assert run.served(engine) == {}
        engine.faults.clear()
        assert follower.step().version == 0
        assert run.served(engine) == {"lora@0": 0.0}


def test_a_replica_of_adapters_may_be_sent_requests_once_it_answers_the_newest_version(run, engine):
    with run.follower(engine) as follower:
        assert follower.health.why_unready(0) == "no version is served yet"
        follower.step()
        assert follower.health.why_unready(0) is None


def test_the_command_tells_of_each_load(run, engine):
    place = ("--engine", engine.url, "--adapter", "lora", "--adapter-folder", run.folder / "cache")
    said = run_verb("follow", "--bucket", run.url, *place, "--once").stdout
    assert said.splitlines()[1].startswith("version 0: 512 weights, ")
    assert ", load " in said
    assert run.served(engine) == {"lora@0": 0.0}


def test_a_server_that_was_restarted_gets_the_version_again_without_a_byte(run, engine):
    with run.follower(engine) as follower:
        follower.step()
        run.publish()
        follower.step()
        engine.fail("/v1/models", 503)
        with pytest.raises(EngineError):
            follower.step()
        engine.faults.clear()
        engine.adapters.clear()
        report = follower.step()
    assert (report.version, report.wire_bytes) == (1, 0)
    assert run.served(engine) == {"lora@1": 1.0}


def test_an_answer_that_was_lost_after_the_load_is_found_loaded(run, engine):
    engine.fail("/v1/load_lora_adapter", 500, after=True)
    with run.follower(engine) as follower:
        with pytest.raises(EngineError):
            follower.step()
        assert follower.step() is None
        assert follower.health.served == run.publisher.position


def test_an_unload_that_failed_is_made_up_for(run, engine):
    with run.follower(engine) as follower:
        follower.step()
        for _ in range(2):
            run.publish()
            engine.fail("/v1/unload_lora_adapter", 500)
            if run.versions == 3:
                with pytest.raises(EngineError):
                    follower.step()
            else:
                follower.step()
        assert set(run.served(engine)) == {"lora@0", "lora@1", "lora@2"}
        engine.faults.clear()
        assert follower.step() is None
    assert run.served(engine) == {"lora@1": 1.0, "lora@2": 2.0}


def test_a_folder_that_was_lost_is_made_and_read_again(run, engine):
    with run.follower(engine) as follower:
        follower.step()
        shutil.rmtree(engine.adapters["lora@0"])
        assert follower.step().wire_bytes == 0
        assert run.served(engine) == {"lora@0": 0.0}


def test_a_copy_that_is_damaged_on_the_disk_is_made_anew_and_never_given_to_the_server(run, engine):
    with run.follower(engine) as follower:
        follower.step()
        run.publish()
        damaged = Checkpoint(run.folder / "cache" / "lora" / "copy", writable=True)
        damaged[NAME].data[5] ^= 1
        damaged.flush()
        assert follower.step().from_version is None
        assert run.served(engine) == {"lora@0": 0.0, "lora@1": 1.0}


def test_a_copy_of_another_run_is_made_anew_whatever_its_tensors(run, engine):
    with run.follower(engine) as follower:
        follower.step()
    bucket = dw.open_bucket(run.url)
    with dw.Publisher(bucket, assets=run.folder / "config", run="supersede") as publisher:
        publisher.publish({NAME: torch.full((8, 64), 7.0), NAME.replace("q_proj", "k_proj"): torch.zeros(8, 64)})
    with run.follower(engine) as successor:
        report = successor.step()
    assert (report.version, report.from_version, report.changed) == (0, None, 1024)
    assert run.served(engine) == {"lora@0": 7.0}


def test_only_names_with_a_version_of_this_adapter_are_unloaded(run, engine):
    others = {"policy": "/base", "lora@best": "/a", "lora": "/b", "other@1": "/c"}
    engine.adapters |= {**others, "lora@7": "/left/by/another"}
    with run.follower(engine) as follower:
        follower.step()
    assert set(engine.adapters) == {*others, "lora@0"}


def test_two_followers_do_not_share_a_folder(run, engine):
    with run.follower(engine) as follower, run.follower(engine) as second:
        follower.step()
        engine.adapters.clear()
        with pytest.raises(AccessRefused, match="another process"):
            second.step()


def test_a_name_that_no_request_could_spell_is_refused(run, engine):
    with pytest.raises(FormatError, match="adapter name"):
        AdapterFollower(run.url, engine.url, "lora@1")


def test_nothing_is_done_while_nothing_is_published(tmp_path, engine):
    dw.open_bucket((tmp_path / "bucket").as_uri(), create=True)
    with AdapterFollower((tmp_path / "bucket").as_uri(), engine.url, "lora", folder=tmp_path / "cache") as follower:
        assert follower.step() is None
    assert engine.calls == []


def test_what_passes_is_reported_once_and_a_closed_follower_lets_its_folder_go(run, engine):
    updates, problems = threading.Semaphore(0), threading.Semaphore(0)
    engine.fail("/v1/models", 500)
    follower = run.follower(
        engine,
        poll=0.01,
        on_update=lambda report: updates.release(),
        on_problem=lambda error: problems.release(),
    )
    thread = threading.Thread(target=follower.run)
    thread.start()
    try:
        assert problems.acquire(timeout=PATIENCE)
        engine.faults.clear()
        for version in range(3):
            assert updates.acquire(timeout=PATIENCE)
            if version < 2:
                run.publish()
    finally:
        follower.close()
        thread.join(PATIENCE)
    assert not thread.is_alive()
    assert not problems.acquire(blocking=False)
    assert run.served(engine) == {"lora@1": 1.0, "lora@2": 2.0}
    with run.follower(engine) as successor:
        assert successor.step() is None
