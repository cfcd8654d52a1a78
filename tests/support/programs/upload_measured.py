"""Uploads a file and prints by how many KiB its memory grew: FILE."""

import resource
import sys
from pathlib import Path

from deltawire import open_bucket

bucket = open_bucket("s3://b")
bucket.put("warm", b"1")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bucket.put_new("large", Path(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
