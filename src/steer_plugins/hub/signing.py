"""Detached ed25519 signatures in minisign's format, so that ``minisign -V`` can check them without this package.

A key is 32 bytes with an id of 8; a signature covers the BLAKE2b-512 of a file ("ED"), and a second one covers the first and a
trusted comment. Secret keys are stored without a password, as ``minisign -W`` does, in a file that only its owner may read.
Format: https://jedisct1.github.io/minisign/
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HubError, SteerError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAX_SIGNATURE_BYTES = 4096
_UNTRUSTED, _TRUSTED = "untrusted comment: ", "trusted comment: "
# Of a secret key: ed25519, no key derivation (no password), BLAKE2b; without a password its checksum is zeros.
_SECRET_HEAD = b"Ed" + b"\0\0" + b"B2"


@dataclass(frozen=True)
class PublicKey:
    """``id``: 8 bytes that find the key; ``raw``: the 32 bytes of ed25519."""

    id: bytes
    raw: bytes

    def __str__(self) -> str:
        return base64.b64encode(b"Ed" + self.id + self.raw).decode()

    @classmethod
    def parse(cls, text: object) -> PublicKey:
        """A key as minisign prints it (``RW...``). Raises HubError."""
        data = _decoded(text, 42) if isinstance(text, str) and len(text) < 100 else None
        if data is None or data[:2] != b"Ed":
            raise HubError(f"{text!r:.80} is not a public key: keys look like RW..., 56 characters long")
        return cls(data[2:10], data[10:])


class SecretKey:
    """What signs. :attr:`public` is what others check with."""

    def __init__(self, id: bytes, seed: bytes) -> None:
        self._seed = seed
        self._key: Ed25519PrivateKey = _ed25519().Ed25519PrivateKey.from_private_bytes(seed)
        self.public = PublicKey(id, self._key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> SecretKey:
        """A new one. Raises HubError without the package ``cryptography``."""
        return cls(secrets.token_bytes(8), secrets.token_bytes(32))

    @classmethod
    def read(cls, path: Path) -> SecretKey:
        """The key in a file of minisign's, without a password. Raises HubError."""
        try:
            lines = path.read_bytes()[:4096].decode("ascii", "replace").splitlines()
        except OSError as error:
            raise HubError(f"cannot read the key {path}: {error.strerror or error}") from None
        data = _decoded(lines[1], 158) if len(lines) > 1 else None
        if data is not None and data[:2] == b"Ed" and data[2:4] != b"\0\0":
            raise HubError(f"the key {path} has a password: make one without, with: minisign -G -W -s FILE")
        if data is None or data[:6] != _SECRET_HEAD:
            raise HubError(f"{path} is not a secret key of minisign: make one with: steer hub key")
        key = cls(data[54:62], data[62:94])
        if key.public.raw != data[94:126]:
            raise HubError(f"the key {path} is damaged: restore it from a copy, or make another with: steer hub key")
        return key

    def write(self, path: Path) -> None:
        """Keep the key in a new file that only its owner may read. Raises HubError."""
        id, raw = self.public.id, self.public.raw
        body = _SECRET_HEAD + bytes(32 + 8 + 8) + id + self._seed + raw + bytes(32)
        text = f"{_UNTRUSTED}minisign secret key {_hex(id)}\n{base64.b64encode(body).decode()}\n"
        new = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                new.unlink()
            raise HubError(f"cannot write the key {path}: {error.strerror or error}") from None

    def sign(self, digest: bytes, comment: str) -> str:
        """The text of a signature file over a BLAKE2b-512 (:func:`blake2b`); ``comment`` is signed too, one line."""
        first = self._key.sign(digest)
        second = self._key.sign(first + comment.encode())
        return (
            f"{_UNTRUSTED}signature from steer-plugins, key {_hex(self.public.id)}\n"
            f"{base64.b64encode(b'ED' + self.public.id + first).decode()}\n"
            f"{_TRUSTED}{comment}\n{base64.b64encode(second).decode()}\n"
        )


def verify(signature: bytes | str, digest: bytes, key: PublicKey, what: str) -> str:
    """Raise HubError, naming ``what``, unless ``signature`` is the key's over that BLAKE2b-512; return the trusted comment."""
    text = signature.decode("utf-8", "replace") if isinstance(signature, bytes) else signature
    lines = text.splitlines()
    if len(text) > MAX_SIGNATURE_BYTES or len(lines) != 4 or not lines[2].startswith(_TRUSTED):
        raise HubError(f"the signature of {what} is none of minisign's")
    first, second = _decoded(lines[1], 74), _decoded(lines[3], 64)
    if first is None or second is None or first[:2] not in (b"ED", b"Ed"):
        raise HubError(f"the signature of {what} is none of minisign's")
    if first[:2] == b"Ed":
        raise HubError(f"the signature of {what} is of minisign's old form: sign with minisign 0.10 or newer")
    if first[2:10] != key.id:
        raise HubError(f"{what} is signed with another key ({_hex(first[2:10])}) than {key}")
    comment = lines[2][len(_TRUSTED) :]
    from cryptography.exceptions import InvalidSignature

    try:
        public = _ed25519().Ed25519PublicKey.from_public_bytes(key.raw)
        public.verify(first[10:], digest)
        public.verify(second, first[10:] + comment.encode())
    except (InvalidSignature, ValueError):
        raise HubError(f"{what} is not what was signed: it was altered, or another key signed it") from None
    return comment


def blake2b(path: Path) -> bytes:
    """BLAKE2b-512 of a file. Raises OSError."""
    digest = hashlib.blake2b(digest_size=64)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _ed25519():  # type: ignore[no-untyped-def]  # a module
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise SteerError("signatures need the package cryptography: install it with: pip install 'steer-plugins[hub]'") from None
    return ed25519


def _decoded(text: str, size: int) -> bytes | None:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if len(data) == size else None


def _hex(id: bytes) -> str:
    """As minisign prints key ids."""
    return id[::-1].hex().upper()
