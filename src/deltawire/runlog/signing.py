"""Ed25519 signatures over records: who may say what a run's versions are.

A record is signed over its own bytes, with the digits of its `signature` field as zeros; so nothing has to be encoded
again to be checked, and a field that this reader does not know is covered all the same. (FORMAT.md §7)
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltawire.errors import AlreadyExists, BadSignature, FormatError, NotFound

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

UNSIGNED = "0" * 128
"""what stands in the signature's place while a record is signed or checked"""
_FIELD = b'"signature":"%s"'
_KEY_DIGITS = 64
_PRIVATE = "PRIVATE KEY-----"
"""what stands in every private key's PEM, and in no public key: nothing that holds it is ever repeated"""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key. Its repr shows the public half alone."""

    _private: "Ed25519PrivateKey"

    @property
    def public(self) -> str:
        """The public key, 64 hex digits: what a reader is given to trust."""
        return self._private.public_key().public_bytes_raw().hex()

    def __repr__(self) -> str:
        return f"<signing key {self.public}>"

    def sign(self, data: bytes) -> str:
        """The signature, 128 hex digits, over a record whose `signature` is UNSIGNED."""
        return self._private.sign(data).hex()


@dataclass(frozen=True, slots=True)
class Trust:
    """Public keys, 64 hex digits each, whose signatures are believed. Without any, unsigned records are accepted."""

    keys: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.keys)

    def also(self, keys: Iterable[str]) -> "Trust":
        """Trust extended to keys that a trusted record names; nobody is trusted still if nobody was before."""
        return Trust(self.keys | frozenset(keys)) if self.keys else self

    def check(self, data: bytes, signer: str | None, signature: str | None, *, where: str) -> None:
        """Raise BadSignature unless one of our keys signed `data`. Without keys nothing is asked."""
        if not self.keys:
            return
        if signer is None or signature is None:
            raise BadSignature(f"{where} is not signed, and only records signed by {self._names()} are trusted")
        if signer not in self.keys:
            raise BadSignature(f"{where} is signed by {signer[:16]}…, which is not trusted; trusted: {self._names()}")
        field = _FIELD % signature.encode()
        if data.count(field) != 1:
            raise BadSignature(f"{where}: its signature does not stand in it exactly once")
        from deltawire.runlog import ed25519

        if not ed25519.verifies(signer, signature, data.replace(field, _FIELD % UNSIGNED.encode())):
            raise BadSignature(f"{where}: the signature of {signer[:16]}… is wrong: altered since it was signed")

    def _names(self) -> str:
        return ", ".join(f"{key[:16]}…" for key in sorted(self.keys))


def generate_key(path: Path) -> SigningKey:
    """A new private key in a file of its own, PEM (PKCS #8), readable by its owner alone. Raises AlreadyExists."""
    from deltawire.runlog import ed25519

    key = ed25519.generate()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise AlreadyExists(f"{path} exists already; a key is never overwritten, choose another name") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(ed25519.to_pem(key))
    return SigningKey(key)


def read_key(path: Path | str) -> SigningKey:
    """The private key in a file that `generate_key` wrote. Raises NotFound, FormatError."""
    if _PRIVATE in str(path):
        raise FormatError("a signing key is named by its file: what was given is the private key itself")
    if _is_key(str(path)):
        raise FormatError(f"{path} is a public key: records are signed with the file that `deltawire keygen` wrote")
    from deltawire.runlog import ed25519

    try:
        key = ed25519.from_pem(Path(path).read_bytes())
    except OSError as error:
        raise NotFound(f"signing key {path}: {error.strerror}; write one with `deltawire keygen {path}`") from None
    except (ValueError, TypeError):
        raise FormatError(f"{path} is no private key: write one with `deltawire keygen {path}`") from None
    if key is None:
        raise FormatError(f"{path} is a key of another kind; records are signed with Ed25519")
    return SigningKey(key)


def trust(keys: Iterable[str | Path]) -> Trust:
    """Trust in public keys, each given as 64 hex digits or as a file with one key a line ("#" starts a comment).

    Raises FormatError for what is neither, and ImportError where signatures cannot be checked.
    """
    found: set[str] = set()
    for given in keys:
        text = str(given).strip()
        if _PRIVATE in text:
            raise FormatError("this is a private key: trust its public half, which `deltawire keygen` printed")
        found |= {text.lower()} if _is_key(text) else _read_public_keys(Path(text))
    if found:
        from deltawire.runlog import ed25519  # noqa: F401  fails here rather than at the first record
    return Trust(frozenset(found))


def is_public_key(text: str) -> bool:
    """Whether this is a public key as records hold it."""
    return _is_key(text) and text == text.lower()


def _read_public_keys(path: Path) -> set[str]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        raise FormatError(f"{path} is neither a public key (64 hex digits) nor a file of them") from None
    if _PRIVATE in text:
        raise FormatError(f"{path} is a private key: trust its public half, {read_key(path).public}")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    keys = {line.lower() for line in lines if line}
    if not keys or not all(map(_is_key, keys)):
        raise FormatError(f"{path}: a public key is 64 hex digits, one a line")
    return keys


def _is_key(text: str) -> bool:
    return len(text) == _KEY_DIGITS and all(digit in "0123456789abcdefABCDEF" for digit in text)
