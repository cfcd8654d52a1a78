"""Listings in which somebody left a key that obstore cannot hold ("a/../b", "a//b", a control character).

obstore fails for the whole page then, with what stood before that key on it. boto3 lists the page.
"""

import os
from collections.abc import Iterator
from typing import Any

from deltawire.buckets.base import Stat
from deltawire.buckets.refusals import first_line, from_anything
from deltawire.errors import BucketError


def listed_anyway(url: str, folder: str | None, after: str, error: Exception) -> Iterator[Stat]:
    """The objects of a folder after a key, those that no key can be among them, where `error` is what obstore raised.

    Raises BucketError, which names the key, where the store is not S3 or boto3 is not installed.
    """
    scheme, _, name = url.partition("://")
    where = f"{url}/{folder or ''}"
    try:
        if scheme != "s3":
            raise ImportError
        import boto3
    except ImportError:
        remedy = "; remove that key" + (", or pip install 'deltawire[s3]', which lists it" if scheme == "s3" else "")
        raise BucketError(f"{where}: {first_line(error)}{remedy}") from error
    try:
        yield from _with(boto3, name, f"{folder}/" if folder else "", after)
    except Exception as refused:
        raise from_anything(where, refused) from refused


def _with(boto3: Any, bucket: str, prefix: str, after: str) -> Iterator[Stat]:
    endpoint = None if os.environ.get("AWS_ENDPOINT_URL") else os.environ.get("AWS_ENDPOINT")
    client = boto3.client("s3", region_name=os.environ.get("AWS_REGION"), endpoint_url=endpoint)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, StartAfter=after)
    for page in pages:
        for found in page.get("Contents", []):
            yield Stat(found["Key"], found["Size"], found["ETag"], found["LastModified"].timestamp())
