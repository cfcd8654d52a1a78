"""A trainer that does not continue from where its run stood is told so, with the figure; a job can insist."""

import warnings

import numpy as np
import pytest
import torch
from cpu_devices import DevicePublisher
from runs import PATIENCE, commits, edit, fresh, model, publishing, read_weights, served

from deltawire import Publisher, open_bucket
from deltawire.errors import NotFound, UnknownTensor, WrongBase
from deltawire.weights.tensors import equal

pytestmark = pytest.mark.usefixtures("quick_retries")
VERSIONS = 30
SHARE = 0.01


def train(bucket, *, versions=VERSIONS, weights=None):
    """A run of versions that each change a hundredth of the weights; the trainer's weights at the end."""
    weights = weights or model()
    with publishing(bucket) as publisher:
        for step in range(versions):
            if step:
                edit(weights, step, share=SHARE)
            publisher.publish(weights, step=step)
            publisher.flush(timeout=PATIENCE)
    return weights


def test_a_trainer_restarted_from_its_base_is_warned_of_with_the_figures_and_published():
    bucket = fresh()
    train(bucket)
    with publishing(bucket) as publisher:
        said = (
            r"changes [\d,]+ of [\d,]+ weights, \d+\.\d times the bytes .* version 0, bit for bit, it is step 0 where"
        )
        with pytest.warns(UserWarning, match=said):
            publisher.publish(model(), step=0)
        edit(weights := model(), 1)
        publisher.publish(weights, step=1)  # one warning, not one for each
    assert equal(read_weights(bucket), served(weights))


def test_a_jump_to_weights_that_are_no_version_is_told_by_its_size():
    bucket = fresh()
    weights = train(bucket, versions=4, weights={"w": np.ones((64, 64), np.float32)})
    edit(weights, 99, share=0.9)
    with publishing(bucket) as publisher, pytest.warns(UserWarning, match=r"\d\.\d times the bytes of a usual version"):
        publisher.publish(weights)


def test_a_jump_from_a_device_is_refused_after_a_first_publish_that_failed_too():
    bucket = fresh()
    held = train(bucket, versions=4, weights={"w": np.ones((64, 64), np.float32), "v": np.ones(8, np.float32)})
    edit(held, 99, share=0.9)
    weights = {name: torch.from_numpy(array) for name, array in held.items()}
    with publishing(bucket, resume="require", baseline="device", cls=DevicePublisher) as publisher:
        with pytest.raises(UnknownTensor):
            publisher.publish({**weights, "none": torch.ones(3)})
        with pytest.raises(WrongBase, match=r"\d\.\d times the bytes of a usual version"):
            publisher.publish(weights)
    assert len(commits(bucket)) == 4


def test_a_trainer_that_goes_on_from_its_checkpoint_hears_nothing_even_where_one_must():
    bucket = fresh()
    weights = train(bucket, versions=4)
    for step in (4, 5):
        with publishing(bucket, resume="require") as publisher, warnings.catch_warnings():
            warnings.simplefilter("error")
            assert publisher.publish(weights, step=step).changed == 0
            edit(weights, step, share=SHARE)
            publisher.publish(weights, step=step + 1)
    assert equal(read_weights(bucket), served(weights))


def test_a_job_that_insists_is_refused_and_nothing_of_its_weights_gets_into_the_bucket():
    bucket = fresh()
    weights = train(bucket)
    before = commits(bucket)
    with publishing(bucket, resume="require") as publisher:
        for _ in range(2):
            with pytest.raises(WrongBase, match="restart it from its checkpoint"):
                publisher.publish(model(), step=0)
        publisher.flush(timeout=PATIENCE)
    assert commits(bucket) == before
    with publishing(bucket, resume="require") as publisher:
        edit(weights, 30, share=SHARE)
        publisher.publish(weights, step=30)
    assert equal(read_weights(bucket), served(weights))


def test_a_job_that_insists_is_told_of_a_bucket_without_a_run(tmp_path):
    with pytest.raises(NotFound, match='resume="require"'):
        Publisher(open_bucket(tmp_path.as_uri()), resume="require")


def test_insisting_on_a_run_and_superseding_it_exclude_each_other():
    with pytest.raises(ValueError, match="require"):
        Publisher(fresh(), resume="require", run="supersede")


def test_a_warning_that_is_made_an_error_loses_nothing():
    bucket = fresh()
    train(bucket, versions=4)
    with publishing(bucket) as publisher, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            publisher.publish(model())
        publisher.publish(model())
    assert equal(read_weights(bucket), served(model()))
