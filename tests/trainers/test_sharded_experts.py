"""A sharded model whose names are not the checkpoint's is published under the checkpoint's: nothing was gathered."""

from pathlib import Path

import pytest
from runs import commits, read_weights
from safetensors.torch import load_file
from test_sharded import expected, run

import deltawire as dw
from deltawire.weights.tensors import equal

JOB = Path(__file__).parents[1] / "support" / "sharded_experts_job.py"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Everything that two ranks are asked to do, done once."""
    return run("experts,halves,copies,compiled,scalars", 2, tmp_path_factory.mktemp("jobs"), JOB)


@pytest.mark.parametrize(("scenario", "newest"), [("experts", 4), ("halves", 1), ("copies", 2)])
def test_a_run_of_sharded_fused_experts_has_what_save_pretrained_writes_of_the_whole_model(
    scenario, newest, jobs, tmp_path
):
    place = jobs / scenario
    bucket = dw.open_bucket(f"file://{place}/bucket")
    saved = {
        int(path.name.removeprefix("saved-")): load_file(path / "model.safetensors") for path in place.glob("saved-*")
    }
    assert max(saved) == newest
    assert "model.layers.1.mlp.experts.4.up_proj.weight" in saved[newest]
    for version, tensors in saved.items():
        assert equal(read_weights(bucket, version, base=jobs / "experts" / "base"), tensors), version
    dw.materialize(bucket, tmp_path / "out", base=jobs / "experts" / "base")
    assert equal(load_file(tmp_path / "out" / "model.safetensors"), saved[newest])


@pytest.mark.parametrize(("scenario", "files"), [("experts", 2), ("halves", 2), ("copies", 1)])
def test_each_rank_that_owns_elements_wrote_its_own(scenario, files, jobs):
    found = commits(dw.open_bucket(f"file://{jobs / scenario}/bucket"))
    assert {len(commit.payloads) for commit in found if commit.step and commit.parent is not None} == {files}


def test_prefixes_of_torch_compile_are_no_part_of_a_sharded_models_names(jobs):
    bucket = dw.open_bucket(f"file://{jobs / 'compiled'}/bucket")
    versions = expected(jobs / "compiled")
    assert set(versions) == {1, 2, 3}
    for version, bits in versions.items():
        plain = {name.replace("_orig_mod.", ""): value for name, value in bits.items()}
        assert equal(read_weights(bucket, version, base=jobs / "compiled" / "base"), plain), version


def test_single_elements_are_published_only_where_every_rank_has_them_all(jobs):
    weights = read_weights(dw.open_bucket(f"file://{jobs / 'scalars'}/bucket"))
    assert {name: bits.shape for name, bits in weights.items()} == {f"{at}.scale": () for at in range(4)}
