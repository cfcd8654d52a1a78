"""Puts an object and prints the error that it meets: URL."""

import sys

from deltawire import open_bucket
from deltawire.errors import BucketError

try:
    open_bucket(sys.argv[1]).put("key", bytes(1000))
except BucketError as error:
    print(type(error).__name__, error)
