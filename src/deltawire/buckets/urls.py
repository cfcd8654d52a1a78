"""From an address to a bucket: which store a URL means, and which URLs mean none."""

import re
from pathlib import Path
from urllib.parse import unquote

from deltawire.buckets.base import Bucket, check_key
from deltawire.buckets.clouds import CLOUDS, open_cloud
from deltawire.buckets.local import LocalBucket
from deltawire.buckets.objects import open_memory
from deltawire.buckets.wrappers import Prefix
from deltawire.errors import BadUrl, FormatError

_KNOWN = "file:///folder, /folder, ./folder, memory://name, s3://bucket, gs://bucket, az://container, hf://buckets/namespace/name"
_FOLDER = re.compile(r"/.|(~|\.\.?)(/|$)")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def open_bucket(url: str, *, create: bool = False) -> Bucket:
    """The bucket at `url`. What follows the bucket's own name is a prefix of every key.

    `file:///folder` (percent-encoded, as `Path.as_uri` gives it) or a path that begins with `/`, `./`, `../` or `~/`
    (taken as it is written; `bucket.url` is then absolute), `memory://name` (shared by name within the process),
    `s3://bucket`, `gs://bucket`, `az://container` (credentials, region and endpoint from the variables that their own
    tools read) and `hf://buckets/namespace/name` (token and HF_ENDPOINT as `huggingface_hub` reads them).

    Nothing is read or written, unless `create`: then a folder or Hub bucket that does not exist is made.

    Raises BadUrl; ImportError when the store's extra is not installed; with `create` any BucketError.
    """
    if _FOLDER.match(url):
        return _local(Path(url).expanduser(), create=create)
    scheme, name, prefix = _split(url)
    if scheme == "file":
        return _open_folder(url, name, prefix, create=create)
    if scheme == "hf":
        return _open_hub(url, name, prefix, create=create)
    if scheme == "memory":
        return _within(open_memory(name), prefix)
    if scheme not in CLOUDS:
        raise BadUrl(f"{url}: not the address of a bucket; write one of {_KNOWN}")
    if not name:
        raise BadUrl(f"{url}: no bucket is named; write {scheme}://bucket or {scheme}://bucket/prefix")
    return _within(open_cloud(scheme, name), prefix)


def _split(url: str) -> tuple[str, str, str]:
    """Scheme, the part up to the first "/", and the rest without a "/" at its end.

    A URL that may carry a secret is refused and not repeated: a bucket's address ends up in logs and process lists.
    """
    scheme, separator, rest = url.partition("://")
    if "@" in rest.split("/", 1)[0] or ("@" in url and scheme != "file"):
        raise BadUrl("a bucket's address has no '@': credentials belong in the environment, not in the address")
    plain = re.split(r"[?#]", url, maxsplit=1)[0]
    if plain != url:
        raise BadUrl(f"{plain}: a bucket's address ends before the first '?' or '#'")
    if not separator:
        raise BadUrl(f"{url}: not the address of a bucket; for a folder write ./{url}, else one of {_KNOWN}")
    name, _, prefix = rest.partition("/")
    return scheme.lower(), name, prefix.rstrip("/")


def _open_folder(url: str, host: str, path: str, *, create: bool) -> Bucket:
    if host not in ("", "localhost") or not path:
        raise BadUrl(f"{url}: a folder is named by its absolute path: file:///path/of/the/folder")
    return _local(Path("/" + unquote(path)), create=create)


def _local(folder: Path, *, create: bool) -> Bucket:
    bucket = LocalBucket(folder)
    if create:
        bucket.create()
    return bucket


def _open_hub(url: str, kind: str, path: str, *, create: bool) -> Bucket:
    from deltawire.buckets.hub import open_hub

    namespace, _, rest = path.partition("/")
    name, _, prefix = rest.partition("/")
    if kind != "buckets" or not _HUB_NAME.fullmatch(namespace) or not _HUB_NAME.fullmatch(name):
        raise BadUrl(f"{url}: a Hub bucket is named hf://buckets/namespace/name")
    return _within(open_hub(f"{namespace}/{name}", create=create), prefix)


def _within(bucket: Bucket, prefix: str) -> Bucket:
    if not prefix:
        return bucket
    try:
        check_key(prefix)
    except FormatError as error:
        raise BadUrl(f"{bucket.url}/{prefix}: {error}") from None
    return Prefix(bucket, prefix)
