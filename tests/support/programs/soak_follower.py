"""Keeps a mirror of a bucket under faults: URL FOLDER LOG SEED PAUSE NAME."""

import sys
import time
from pathlib import Path

from deltawire import Subscriber, open_bucket
from deltawire.buckets.faulty import Faulty, seeded
from deltawire.errors import DeltaWireError
from deltawire.format.checkpoint import files
from deltawire.read.mirror import Mirror, held
from deltawire.runlog import heartbeats
from deltawire.runlog.heartbeats import Heartbeat

url, folder, log, seed, pause, name = sys.argv[1:]
folder, seed, pause = Path(folder), int(seed), float(pause)
bucket = Faulty(open_bucket(url), seeded(seed, 0.05))
mirror, subscriber = None, None
while True:
    try:
        if subscriber is None:
            subscriber = Subscriber(bucket)
        target = subscriber.latest()
        if mirror is None and held(folder) is not None:
            mirror = Mirror(folder, subscriber.run.table)
        here = mirror.position if mirror else None
        if here != target and (here is None or target.version > here.version):
            need = here.version if here else 0
            heartbeats.beat(bucket, Heartbeat(name, target.run, here and here.version, need=need))
            change = subscriber.change(here, target.version, anchors=here is None)
            if mirror is None:
                found, at = files(change.anchor.folder), change.anchor_position
                mirror = Mirror.create(folder, found, at, subscriber.run.table)
            if mirror.position != change.position:
                mirror.apply(change.delta, change.position)
            with open(log, "a") as file:
                here = mirror.position
                file.write(f"{here.version} {here.root} {change.payloads} {change.wire_bytes} {time.time()}\n")
            heartbeats.beat(bucket, Heartbeat(name, target.run, mirror.position.version))
    except DeltaWireError:
        subscriber = None
    time.sleep(pause)
