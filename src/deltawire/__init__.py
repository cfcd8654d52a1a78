"""deltawire ships only the weights that changed: verified sparse deltas, from a trainer to vLLM, through a bucket."""

from deltawire.buckets import open_bucket
from deltawire.changes import Change, Update
from deltawire.delta import Delta
from deltawire.digest import digest
from deltawire.errors import DeltaWireError
from deltawire.manifests import Position
from deltawire.materialize import materialize
from deltawire.names import NameMap
from deltawire.publisher import Publisher
from deltawire.reports import MaterializeReport, PublishReport, UploadReport, VerifyReport
from deltawire.subscriber import Subscriber
from deltawire.tensors import equal
from deltawire.verify import verify
from deltawire.wire import decode, encode

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
