"""`deltawire plan`: the arithmetic of the Hugging Face post, the Hub's limits, and a fleet's day, as pure functions."""

import dataclasses
import time

import pytest
from verbs import records, say

from deltawire.errors import FormatError
from deltawire.sizing.constants import HUB_LIMITS, POST_BYTES_A_CHANGE
from deltawire.sizing.forecast import forecast
from deltawire.sizing.scenario import Scenario, bytes_a_change, parse_count
from deltawire.sizing.simulation import simulate

PULSE = 108e6 / (0.01 * 7e9)
"""bytes a change of the post's 108 MB for a 7B model at 1 %"""
GIB = 2**30
GBYTE = 8e9
"""bits a second of a link of 1 GB/s"""


class TestThePost:
    """Figures of "Shipping a Trillion Parameters With a Hub Bucket", each beside what the planner says."""

    def test_qwen3_0_6b_goes_from_1_2_gb_to_20_to_35_mb(self):
        for density, megabytes in ((0.0056, 20), (0.0097, 35)):
            found = forecast(Scenario(parse_count("0.6B"), density=density, bytes_a_change=POST_BYTES_A_CHANGE))
            assert found.checkpoint_bytes == pytest.approx(1.2e9)
            assert found.delta_bytes == pytest.approx(megabytes * 1e6, rel=0.01)

    def test_a_7b_model_is_14_gb_and_108_mb(self):
        found = forecast(Scenario(parse_count("7B"), bytes_a_change=PULSE))
        assert found.checkpoint_bytes == 14e9
        assert found.delta_bytes == pytest.approx(108e6)
        assert found.ratio == pytest.approx(130, rel=0.01)

    def test_llama_405b_is_810_gb_and_6_gb_and_13_minutes_are_6_seconds(self):
        found = forecast(Scenario(parse_count("405B"), bytes_a_change=PULSE, up=GBYTE, down=GBYTE))
        whole, fabric = found.others
        assert found.checkpoint_bytes == 810e9
        assert found.delta_bytes == pytest.approx(6e9, rel=0.05)
        assert fabric.pause == pytest.approx(8, rel=0.02)
        assert pytest.approx(13 * 60, rel=0.05) == 810e9 / 1e9
        assert found.times.upload == pytest.approx(6, rel=0.15)
        assert whole.served > 13 * 60

    def test_on_nodes_of_8_gpus_405b_pauses_for_a_quarter_of_nccl(self):
        """The post guesses a couple of seconds for the apply step, where a broadcast pauses for eight."""
        found = forecast(Scenario(parse_count("405B"), bytes_a_change=PULSE, workers=8))
        assert found.times.pause <= found.others[1].pause / 4

    def test_a_terabyte_of_fp8_is_20_3_gib_a_step(self):
        weights = 1024 * GIB
        found = forecast(Scenario(weights, width=1, density=0.0198, bytes_a_change=1.0))
        assert found.checkpoint_bytes == 1024 * GIB
        assert found.delta_bytes == pytest.approx(20.3 * GIB, rel=0.01)
        assert found.ratio == pytest.approx(50, rel=0.02)

    def test_a_trillion_weights_are_15_gb_a_step(self):
        found = forecast(Scenario(parse_count("1T"), width=1, bytes_a_change=PULSE))
        assert found.delta_bytes == pytest.approx(15e9, rel=0.05)
        assert found.ratio == pytest.approx(65, rel=0.01)

    def test_nccl_is_no_way_between_regions(self):
        assert forecast(Scenario(7e9, regions=2)).others[1].served is None


@pytest.mark.parametrize(
    ("text", "count"),
    [("0.6B", 6e8), ("7b", 7e9), ("405B", 4.05e11), ("1T", 1e12), ("350 M", 3.5e8), ("93000", 93_000)],
)
def test_a_number_of_weights_as_people_write_it(text, count):
    assert parse_count(text) == count


def test_what_is_no_number_or_no_share_is_refused():
    with pytest.raises(FormatError, match="write it as"):
        parse_count("seven")
    for bare, meant in (("7", "7B"), ("0.6", "0.6B"), ("405 ", "405B")):
        with pytest.raises(FormatError, match=f"write {meant} for billions"):
            parse_count(bare)
    for wrong in ({"density": 0.0}, {"density": 2.0}, {"up": 0.0}, {"plan": "gold"}, {"replicas": 0}):
        with pytest.raises(FormatError, match=next(iter(wrong))):
            Scenario(7e9, **wrong)


def test_bytes_of_a_change_fall_with_density_and_stay_within_what_was_measured():
    each = [bytes_a_change(density) for density in (1e-5, 1e-3, 0.005, 0.01, 0.05)]
    assert each == sorted(each, reverse=True)
    assert each[0] == each[1] == 1.67
    assert Scenario(1e9, density=1.0).delta_bytes() <= 2e9


def test_a_trainer_slower_than_its_pace_folds():
    quick, slow = forecast(Scenario(7e9, cadence=60)), forecast(Scenario(7e9, cadence=5, up=1e8))
    assert (quick.folded, quick.times.wait) == (1.0, 0.0)
    assert slow.folded > 1 and "go into one commit" in " ".join(slow.advice)
    assert slow.up_a_day <= 1e8 / 8 * 86_400, "no more than the link carries"


@pytest.mark.parametrize("plan", HUB_LIMITS)
def test_as_many_replicas_as_a_token_carries_fit_and_one_more_does_not(plan):
    found = forecast(Scenario(7e9, plan=plan))
    most = found.requests.replicas_at_most
    for replicas, fits in ((most, True), (most + 1, False)):
        assert forecast(Scenario(7e9, plan=plan, replicas=replicas)).requests.fits is fits


def test_the_pause_between_looks_that_is_advised_fits():
    scenario = Scenario(7e9, replicas=8)
    found = forecast(scenario)
    assert not found.requests.fits and "--poll" in " ".join(found.advice)
    slower = dataclasses.replace(scenario, poll=found.requests.poll_that_fits)
    assert forecast(slower).requests.busiest == pytest.approx(1000)


def test_sixteen_followers_at_five_seconds_are_beyond_one_free_token_by_their_looks_alone():
    assert 16 * 300 / 5 == 960
    assert not forecast(Scenario(0.6e9, replicas=16, cadence=3600)).requests.fits


def test_an_anchor_is_due_when_single_deltas_cost_a_checkpoint():
    found = forecast(Scenario(7e9))
    assert (
        (found.anchor_every - 1) * found.delta_bytes < found.checkpoint_bytes <= found.anchor_every * found.delta_bytes
    )


class TestADayOfAFleet:
    def test_a_thousand_replicas_take_seconds(self):
        started = time.process_time()
        report = simulate(Scenario(7e9, replicas=1000, cadence=60), failures_a_day=1)
        assert time.process_time() - started < 10
        assert (report.replicas, report.versions, report.commits) == (1000, 1440, 1440)
        assert report.joins > 1000, "each once, and those that were replaced"
        assert report.updates + report.joins <= 1000 * 1440

    def test_it_agrees_with_the_forecast(self):
        scenario = Scenario(7e9, replicas=50, cadence=60)
        found, report = forecast(scenario), simulate(scenario)
        assert report.staleness_p50 == pytest.approx(found.times.served - found.times.publish, rel=0.15)
        assert report.bytes_out == pytest.approx(found.down_a_day + 50 * found.checkpoint_bytes, rel=0.05)
        assert report.busiest == pytest.approx(found.requests.busiest, rel=0.1)

    def test_equal_seeds_give_equal_days(self):
        scenario = Scenario(1e9, replicas=20)
        days = [simulate(scenario, failures_a_day=3, seed=seed) for seed in (1, 1, 2)]
        assert days[0] == days[1] != days[2]

    def test_a_link_that_a_region_shares_makes_replicas_skip_versions(self):
        alone = simulate(Scenario(0.6e9, replicas=100, cadence=5), seconds=7200)
        shared = simulate(Scenario(0.6e9, replicas=100, cadence=5, region=1e9), seconds=7200)
        assert alone.lag_p50 == 1 < shared.lag_p50
        assert shared.staleness_p50 > alone.staleness_p50

    def test_a_fleet_that_never_gets_there_says_so(self):
        assert simulate(Scenario(7e9, replicas=100, region=1e8), seconds=600).staleness_p50 == float("inf")


def test_plan_prints_a_table_and_advice(tmp_path):
    shown = say("plan", "7B", "--replicas", 16)
    assert "158 times smaller than a checkpoint of 14.0 GB" in shown and "above the limit of 1,000" in shown
    (record,) = records("plan", "7B", "--regions", 2, "--simulate")
    assert record["fleet"]["replicas"] == 1 and record["advice"][0].startswith("Deltas through a bucket")
    with pytest.raises(FormatError):
        say("plan", tmp_path / "nothing")
