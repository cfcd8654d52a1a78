"""An FSDP2 model shows whole, old tensors after a forward: its weights are published, in every order of verbs."""

from pathlib import Path

import pytest
from test_sharded import run

JOB = Path(__file__).parents[1] / "support" / "fsdp_orders_job.py"


@pytest.mark.parametrize("size", [1, 2])
def test_whatever_was_done_before_a_version_holds_the_weights_and_not_what_a_forward_gathered(size, tmp_path):
    run("orders,hooks,gathered" + ",torn" * (size == 1), size, tmp_path, JOB)


@pytest.mark.nightly
@pytest.mark.parametrize("size", [1, 2])
def test_many_orders_of_all_verbs(size, tmp_path):
    run("many_orders", size, tmp_path, JOB)
