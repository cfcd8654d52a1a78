"""Versions of a small model, and where a mirror stands that holds one."""

from runs import edit, model, served, table

from deltawire import digest
from deltawire.runlog.records import Position
from deltawire.weights.digest import root

RUN = "0" * 16


def versions(count):
    weights, found = model(), []
    for seed in range(count):
        edit(weights, seed)
        found.append(served(weights))
    return found


def at(weights, version):
    return Position(RUN, version, root(table(weights), digest(weights)))
