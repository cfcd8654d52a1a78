"""Where versions live: `open_bucket(url)` and the few verbs over a store."""

from deltawire.buckets.base import Bucket, Stat, check_key
from deltawire.buckets.urls import open_bucket
from deltawire.buckets.wrappers import Counting, Prefix, Retry, Traffic, Typed

__all__ = ["Bucket", "Counting", "Prefix", "Retry", "Stat", "Traffic", "Typed", "check_key", "open_bucket"]
