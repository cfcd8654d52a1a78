"""Who may use the server: names, tokens and organisations, read from a JSON file that stays on this machine.

{"users": [{"name": "ada", "token": "…", "orgs": [{"name": "lab", "private_by_default": true}]}]}
"""

import hmac
import re
from pathlib import Path

import msgspec

from deltawire.errors import FormatError

MAX_FILE_BYTES = 4 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_RESERVED = ("me",)
"""in a request it stands for the token's user"""


class Organisation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A namespace that several users share. `private_by_default` is for buckets made without saying."""

    name: str
    private_by_default: bool = False


class User(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A user: owns the namespace of that name, and writes to those of its organisations."""

    name: str
    token: str
    orgs: tuple[Organisation, ...] = ()

    def __repr__(self) -> str:
        return f"<user {self.name}>"

    def belongs_to(self, namespace: str) -> bool:
        """Whether the user may see and change what is in a namespace."""
        return namespace == self.name or any(org.name == namespace for org in self.orgs)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    users: tuple[User, ...]


class Users:
    """All users, found by their tokens."""

    def __init__(self, users: tuple[User, ...]) -> None:
        self._users = users

    def with_token(self, token: str) -> User | None:
        """The user whose token this is. Takes as long whichever it is."""
        given = token.encode()
        found = [user for user in self._users if hmac.compare_digest(user.token.encode(), given)]
        return found[0] if found else None

    def has_name(self, namespace: str) -> bool:
        """Whether it is the name of a user or of an organisation."""
        return any(user.belongs_to(namespace) for user in self._users)

    def private_by_default(self, namespace: str) -> bool:
        """Whether an organisation asks for private buckets."""
        return any(org.private_by_default for user in self._users for org in user.orgs if org.name == namespace)


def read_users(path: Path | str) -> Users:
    """The users in a file. Raises FormatError naming the field, never a token; OSError for a file that is not there."""
    data = Path(path).read_bytes()
    if len(data) > MAX_FILE_BYTES:
        raise FormatError(f"{path} has {len(data):,} bytes; {MAX_FILE_BYTES:,} is the most")
    try:
        users = msgspec.json.decode(data, type=_File).users
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{path} is no users file: {error}") from None
    names, tokens = [user.name for user in users], [user.token for user in users]
    for name in [*names, *(org.name for user in users for org in user.orgs)]:
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise FormatError(f"{path}: {name!r} cannot be the name of a user or an organisation")
    if not users:
        raise FormatError(f"{path} names no user")
    for number, token in enumerate(tokens):
        if len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token:
            raise FormatError(f"{path}: the token of {names[number]} must be 8 or more printable ASCII characters")
    if len(set(names)) < len(names) or len(set(tokens)) < len(tokens):
        raise FormatError(f"{path}: two users have the same name or the same token")
    if clash := set(names) & {org.name for user in users for org in user.orgs}:
        raise FormatError(f"{path}: {min(clash)!r} is a user and an organisation")
    return Users(users)
