"""vLLM on a GPU follows a trainer under load, bit for bit, and then equals a server started on the version it serves.

All servers of the chosen scenarios start at once, then each is measured alone; so do the fresh ones. What is measured
is printed as soon as it is known.
"""

import sys
import time
from contextlib import suppress

import pytest
import torch
from follow_scenario import equals_a_fresh_server, updates_under_load
from gpu_scenarios import chosen, launch, make_model

import deltawire as dw

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
SCENARIOS = chosen()
STARTED = time.monotonic()


def saying(name):
    def say(text):
        sys.stdout.write(f"[{time.monotonic() - STARTED:6.1f}] {name}: {text}\n")
        sys.stdout.flush()

    return say


def give_back(device):
    """Leave the device's memory that this process uses no more to the servers."""
    if device != "cpu":
        torch.cuda.empty_cache()


class Fleet:
    """The models, servers and outcomes of every scenario, by name."""

    def __init__(self, folder, device):
        self.folder, self.device = folder, device
        self.models = {name: make_model(one, folder / name, device) for name, one in SCENARIOS.items()}
        give_back(device)
        self.servers = self.started({name: model.folder for name, model in self.models.items()}, "first")
        self.served, self._fresh = {}, None

    def started(self, folders, which):
        """A server of each folder, once all answer or have failed."""
        servers = {}
        for name, folder in folders.items():
            servers[name] = launch(SCENARIOS[name].mode, folder, self.folder / f"{name}.{which}.log", self.device)
        for name, server in servers.items():
            with suppress(AssertionError):  # the test of that scenario says it
                server.wait()
                saying(name)(f"the {which} server answers")
        return servers

    def fresh(self):
        """A server of each version that is served, started the first time this is asked."""
        if self._fresh is None:
            full = {name: self.folder / f"{name}.full" for name in self.served}
            for name, folder in full.items():
                dw.materialize(self.served[name].bucket, folder, base=self.models[name].folder)
            for server in self.servers.values():
                server.stop()
            give_back(self.device)
            self._fresh = self.started(full, "fresh")
        return self._fresh

    def stop(self):
        for server in (*self.servers.values(), *(self._fresh or {}).values()):
            server.stop()


@pytest.fixture(scope="module")
def fleet(device, tmp_path_factory):
    fleet = Fleet(tmp_path_factory.mktemp("gpu"), device)
    try:
        yield fleet
    finally:
        fleet.stop()


@pytest.mark.parametrize("name", SCENARIOS)
def test_updates_under_load_are_bit_for_bit(name, fleet, device, tmp_path):
    model = fleet.models[name]
    fleet.served[name] = updates_under_load(
        fleet.servers[name].wait(),
        model.folder,
        tmp_path,
        SCENARIOS[name].load,
        saying(name),
        device=device,
        masters=model.masters,
        prepare=model.prepare,
    )


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_server_started_on_the_version_holds_and_answers_the_same(name, fleet):
    if name not in fleet.served:
        pytest.skip("its updates failed")
    equals_a_fresh_server(fleet.served[name], fleet.fresh()[name].wait(), saying(name))
