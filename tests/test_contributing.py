"""CONTRIBUTING.md leads to files and names that are there."""

import importlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text()
PATHS = sorted(
    path
    for path in set(re.findall(r"`((?:src|tests|docs|scripts)/[\w./]+)`", TEXT))
    if "NAME" not in path and "_N" not in path
)
NAMES = {
    "deltawire.buckets.base": ("Bucket", "check_key", "check_prefix", "Listing", "look_then_put", "watch_by_polling"),
    "deltawire.buckets.atomic": ("replacing",),
    "deltawire.buckets.conformance": ("BucketTests",),
    "deltawire.buckets.objects": ("ObjectBucket",),
    "deltawire.buckets.urls": ("open_bucket", "_KNOWN"),
    "deltawire.cli.printing": ("emit",),
    "deltawire.format.codecs.directory": ("ENCODINGS",),
    "deltawire.format.delta_file": ("VERSIONS", "ENCODINGS"),
    "deltawire.fleet.metrics": ("FollowerMetrics", "PublisherMetrics"),
    "deltawire.follow.engine": ("Engine",),
    "deltawire.follow.follower": ("Follower",),
    "deltawire.live.answers": ("respond",),
    "deltawire.live.worker": ("LiveWorker",),
    "deltawire.runlog.records": ("CODECS", "_check", "read", "write"),
    "deltawire.upkeep.retention": ("_ORDER", "_within"),
    "deltawire.weights.kernels": ("warm_up",),
    "deltawire.weights.speed": ("why_no_numba",),
}
"""what it tells people to use, by the module where it is"""


@pytest.mark.parametrize("path", PATHS)
def test_a_path_it_names_is_there(path):
    assert (REPOSITORY / path).exists()


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_a_name_it_gives_is_there(module, name):
    assert re.search(rf"\b{name}\b", TEXT), f"CONTRIBUTING.md does not name {name} any more"
    assert hasattr(importlib.import_module(module), name)


def test_it_says_how_to_add_each_kind_of_part():
    kinds = re.findall(r"^## How to add an? (\w+)$", TEXT, re.M)
    assert kinds == ["codec", "store", "verb", "engine", "metric", "record", "kernel"]
