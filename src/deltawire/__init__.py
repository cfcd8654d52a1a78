"""deltawire ships only the weights that changed: verified sparse deltas, from a trainer to vLLM, through a bucket."""

from deltawire.buckets import open_bucket
from deltawire.errors import DeltaWireError
from deltawire.format.delta_file import decode, encode
from deltawire.prepare.names import NameMap
from deltawire.publish.publisher import Publisher
from deltawire.publish.reports import PublishReport, UploadReport
from deltawire.read.changes import Change, Update
from deltawire.read.subscriber import Subscriber
from deltawire.runlog.records import Position
from deltawire.upkeep.materialize import MaterializeReport, materialize
from deltawire.upkeep.verify import VerifyReport, verify
from deltawire.weights.delta import Delta
from deltawire.weights.digest import digest
from deltawire.weights.tensors import equal

__all__ = [
    "Change",
    "Delta",
    "DeltaWireError",
    "MaterializeReport",
    "NameMap",
    "Position",
    "PublishReport",
    "Publisher",
    "Subscriber",
    "Update",
    "UploadReport",
    "VerifyReport",
    "decode",
    "digest",
    "encode",
    "equal",
    "materialize",
    "open_bucket",
    "verify",
]
__version__ = "0.1.0"
"""the one place that says it: packages, and `deltawire --version`, read it here"""
