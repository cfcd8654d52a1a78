"""Who may do what: a user by the token of a request, a bucket by its owner, content by a pass that ends.

A hash opens nothing: content is open to its sender, and to readers of a bucket that lists it. Without users
there is one local user, and everything is open to anyone who reaches the port, which is on loopback.
"""

import base64
import binascii
import hmac
import time
from collections.abc import Callable
from typing import Literal

import msgspec
from starlette.requests import Request

from deltawire.errors import AccessRefused
from deltawire.hub_server.catalog import BucketMissing, Catalog
from deltawire.hub_server.users import User, Users

LIFETIME_SECONDS = 3600
LOCAL = User("me", "")
"""the only user of a server without users"""
Right = Literal["read", "write"]


class Unauthorized(AccessRefused):
    """No token, or one that says nothing here."""


class Forbidden(AccessRefused):
    """The token's user may not do this."""


class Pass(msgspec.Struct, frozen=True):
    """What a content token says: what a user may do with the content of a bucket, until `expires` (s since 1970)."""

    user: str
    bucket: str
    right: Right
    expires: int


class Access:
    """Decides for one server. `secret` signs passes and addresses; its holder may read everything."""

    def __init__(self, users: Users | None, secret: bytes, *, clock: Callable[[], float] = time.time) -> None:
        self._users, self._secret, self._clock = users, secret, clock

    def user(self, request: Request) -> User | None:
        """Whose token the request carries; None without one. Raises Unauthorized for one that nobody has."""
        if self._users is None:
            return LOCAL
        token = _bearer(request)
        if token is None:
            return None
        found = self._users.with_token(token)
        if found is None:
            raise Unauthorized("Invalid credentials in Authorization header")
        return found

    def require_user(self, request: Request) -> User:
        """Whose token the request carries. Raises Unauthorized."""
        found = self.user(request)
        if found is None:
            raise Unauthorized("Invalid username or password.")
        return found

    def check_namespace(self, request: Request, namespace: str) -> None:
        """Raise Unauthorized or Forbidden unless the request may make buckets there."""
        user = self.require_user(request)
        if not self._at_home(user, namespace):
            raise Forbidden(f"You don't have the rights to create a bucket under the namespace {namespace!r}")

    def check_bucket(self, request: Request, catalog: Catalog, bucket: str, right: Right) -> None:
        """Raise BucketMissing, as for one that is not there, where a bucket is private to others; Unauthorized where
        a token might help; Forbidden for writing to somebody else's public bucket."""
        user = self.user(request)
        try:
            visible = not catalog.is_private(bucket)
        except BucketMissing:
            if user is None:
                raise Unauthorized("Invalid username or password.") from None
            raise
        if user is None and (right == "write" or not visible):
            raise Unauthorized("Invalid username or password.")
        if user is None or self._at_home(user, bucket.split("/", maxsplit=1)[0]):
            return
        if not visible:
            raise BucketMissing(f"there is no bucket {bucket}; create it first")
        if right == "write":
            raise Forbidden(f"You don't have the rights to write to bucket {bucket!r}")

    def sees_private(self, user: User | None, namespace: str) -> bool:
        """Whether private buckets appear in a listing of a namespace."""
        return user is not None and self._at_home(user, namespace)

    def knows_namespace(self, namespace: str) -> bool:
        """Whether a user or an organisation has that name, though it may have no bucket yet."""
        return namespace == LOCAL.name if self._users is None else self._users.has_name(namespace)

    def private_by_default(self, namespace: str) -> bool:
        """Whether a bucket made without saying is private."""
        return self._users is not None and self._users.private_by_default(namespace)

    def issue(self, request: Request, bucket: str, right: Right) -> tuple[str, int]:
        """A content token and when it ends, in seconds since 1970."""
        expires = int(self._clock()) + LIFETIME_SECONDS
        if self._users is None:
            return "local", expires
        user = self.user(request)
        body = msgspec.json.encode(Pass(user.name if user else "", bucket, right, expires))
        return f"{_text(body)}.{self._sign(body)}", expires

    def visitor(self, request: Request, right: Right) -> Pass | None:
        """What the content token of a request says; None on a server without users, which asks for none. A pass to
        write also reads. Raises Unauthorized for one that is wrong or has ended, Forbidden for one that only reads."""
        if self._users is None:
            return None
        body, _, signature = (_bearer(request) or "").partition(".")
        data = _bytes(body)
        if not hmac.compare_digest(signature.encode(), self._sign(data).encode()):
            raise Unauthorized("the content token is wrong: ask for a new one")
        found = msgspec.json.decode(data, type=Pass)
        if found.expires <= self._clock():
            raise Unauthorized("the content token has expired: ask for a new one")
        if right == "write" and found.right != "write":
            raise Forbidden("this content token only reads")
        return found

    def holder(self, request: Request) -> str | None:
        """The name that content is held under for a request; None on a server without users."""
        return None if self._users is None else self.require_user(request).name

    def sign_address(self, path: str) -> str:
        """The query that opens a path without a token, for as long as a pass lasts; nothing without users."""
        if self._users is None:
            return ""
        expires = int(self._clock()) + LIFETIME_SECONDS
        return f"?expires={expires}&signature={self._sign(f'{path}?{expires}'.encode())}"

    def check_address(self, request: Request) -> None:
        """Raise Forbidden unless the request's path was signed and its time has not passed."""
        if self._users is None:
            return
        expires, signature = (request.query_params.get(name, "") for name in ("expires", "signature"))
        good = hmac.compare_digest(signature.encode(), self._sign(f"{request.url.path}?{expires}".encode()).encode())
        if not good or int(expires) <= self._clock():
            raise Forbidden("this address has expired or was altered: ask for a new one")

    def _at_home(self, user: User, namespace: str) -> bool:
        return self._users is None or user.belongs_to(namespace)

    def _sign(self, data: bytes) -> str:
        return hmac.new(self._secret, data, "sha256").hexdigest()


def access_of(request: Request) -> Access:
    """The access rules the application was made with."""
    access: Access = request.app.state.access
    return access


def _bearer(request: Request) -> str | None:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" and token.strip() else None


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        return b""
