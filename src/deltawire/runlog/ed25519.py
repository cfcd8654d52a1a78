"""Ed25519 keys and signatures by the `cryptography` library, which only this module imports: it is an extra."""

try:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_pem_private_key,
    )
except ImportError:
    raise ImportError("signed records need cryptography: pip install 'deltawire[sign]'") from None


def generate() -> Ed25519PrivateKey:
    """A new private key."""
    return Ed25519PrivateKey.generate()


def to_pem(key: Ed25519PrivateKey) -> bytes:
    """The key as PEM (PKCS #8), not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def from_pem(data: bytes) -> Ed25519PrivateKey | None:
    """The key in a PEM file; None if it is a key of another kind. Raises ValueError or TypeError for no private key."""
    key = load_pem_private_key(data, password=None)
    return key if isinstance(key, Ed25519PrivateKey) else None


def verifies(public: str, signature: str, data: bytes) -> bool:
    """Whether the owner of this public key signed `data`; key and signature in hex digits."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), data)
    except (InvalidSignature, ValueError):
        return False
    return True
