"""The bus key: 32 random bytes that every member of a bus holds, kept in one file only its owner may read.

Everything secret about a bus is derived here, by HKDF-SHA256 (RFC 5869), from that one key: the CURVE pair that
every node answers with (`server`) and the one it introduces itself with (`client`). A member is whoever holds the
key; the key, not an address or a TXT record, is what trust rests on.

Knows files and hashes; knows no sockets and no clock. Secrets never appear in a `repr` or in an error.

Key file: one line of ASCII, mode 0600.

    zmqbus-key-1:<48 characters of base64url><newline>
    the 48 characters carry 36 bytes:  key, 32 bytes | checksum, 4 bytes
    checksum = first 4 bytes of SHA-256("zmqbus-key-1:" + key), so that a typo is told from a wrong key
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from zmqbus.errors import KeyFileError

__all__ = ["KEY_BYTES", "BusKey", "CurvePair", "hkdf_sha256"]

KEY_BYTES = 32  # 256 bits, the strength of Curve25519's own secret keys and then some
PREFIX = "zmqbus-key-1:"  # names the format and its version; a later format gets another number
CHECKSUM_BYTES = 4  # with the key 36 bytes, which base64 carries without padding; misses one typo in 2**32
FILE_BYTES_MAX = 1024  # far above the 62 bytes of a key file: a wrong file is not read into memory whole

SALT = b"zmqbus"  # HKDF wants any constant; it keeps our keys apart from other users of the same bytes


def hkdf_sha256(key: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """`length` bytes (at most 8160) derived from `key`, for the purpose named by `info` (RFC 5869, SHA-256)."""
    if not 0 < length <= 255 * 32:
        raise ValueError(f"HKDF-SHA256 yields 1 to 8160 bytes, not {length}")
    extracted = hmac.digest(salt or bytes(32), key, "sha256")
    block, output = b"", b""
    counter = 0
    while len(output) < length:
        counter += 1
        block = hmac.digest(extracted, block + info + bytes([counter]), "sha256")
        output += block
    return output[:length]


@dataclass(frozen=True, slots=True)
class CurvePair:
    """A CURVE key pair in Z85 text (40 bytes each), as ZeroMQ's socket options take it."""

    public: bytes
    secret: bytes = field(repr=False)


class BusKey:
    """The shared key of one bus. Compare with `==`; show `fingerprint`, which is safe to print, never the key."""

    __slots__ = ("_key", "client", "fingerprint", "server")

    client: CurvePair
    """What every member introduces itself with; the ZAP handler admits this public key and no other."""
    server: CurvePair
    """What every bound socket answers with."""
    fingerprint: str
    """16 hex digits that are the same for everyone who holds this key and tell nothing about it."""

    def __init__(self, key: bytes) -> None:
        """A key from its 32 bytes. Raises ValueError for any other length. See `generate` and `load`."""
        if len(key) != KEY_BYTES:
            raise ValueError(f"a bus key has {KEY_BYTES} bytes, not {len(key)}")
        self._key = bytes(key)
        self.server = self._derive_pair(b"curve server")
        self.client = self._derive_pair(b"curve client")
        self.fingerprint = hkdf_sha256(self._key, SALT, b"fingerprint", 8).hex()

    @classmethod
    def generate(cls) -> BusKey:
        """A new key from the operating system's random source."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BusKey:
        """The key kept in the file at `path`.

        Raises KeyFileError, saying what to do, when the file is missing, unreadable or malformed, when another
        user may read or write it, or when neither we nor root own it.
        """
        line = _read_private(path)
        try:
            packed = _unpack_line(line)
        except ValueError as error:
            raise KeyFileError(path, f"{error}; copy it anew from a working node") from None
        key, checksum = packed[:KEY_BYTES], packed[KEY_BYTES:]
        if not hmac.compare_digest(checksum, _checksum(key)):
            raise KeyFileError(path, "its checksum does not fit (a typo?); copy it anew from a working node")
        return cls(key)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key to a new file, mode 0600 from its first instant, and fsync it and its directory.

        Raises KeyFileError when the file exists (a key is never overwritten: it may be the only copy) or cannot
        be written; then no partial file is left behind.
        """
        line = PREFIX + base64.urlsafe_b64encode(self._key + _checksum(self._key)).decode() + "\n"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise KeyFileError(path, "exists already and is not overwritten; move it away first") from None
        except (OSError, ValueError) as error:
            raise KeyFileError(path, f"cannot be created: {_reason(error)}") from None
        try:
            with open(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o600)  # an odd umask may have taken our own access away
                file.write(line.encode())
                file.flush()
                os.fsync(descriptor)
            _sync_directory(Path(path).parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(path)  # ours for certain: O_EXCL made it
            raise KeyFileError(path, f"cannot be written: {_reason(error)}") from None

    def _derive_pair(self, purpose: bytes) -> CurvePair:
        # Any 32 bytes are a Curve25519 secret key: the curve clamps the bits that it needs fixed.
        secret = z85.encode(hkdf_sha256(self._key, SALT, purpose, 32))
        return CurvePair(public=zmq.curve_public(secret), secret=secret)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BusKey) and hmac.compare_digest(self._key, other._key)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"<BusKey {self.fingerprint}>"


def _checksum(key: bytes) -> bytes:
    return hashlib.sha256(PREFIX.encode() + key).digest()[:CHECKSUM_BYTES]


def _read_private(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file that nobody but us and root can touch. Raises KeyFileError otherwise."""
    try:
        # O_NONBLOCK: opening a FIFO by mistake must not hang. It changes nothing for a regular file.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise KeyFileError(path, f"not found; copy it from another node, or run: zmqbus keygen {path}") from None
    except (OSError, ValueError) as error:
        raise KeyFileError(path, f"cannot be read: {_reason(error)}") from None
    try:
        # Checked on the open file, not on the path: what is checked is what is read.
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise KeyFileError(path, "is not a regular file")
        if status.st_uid not in (0, os.geteuid()):
            raise KeyFileError(path, f"belongs to another user (uid {status.st_uid}); run: chown $USER {path}")
        if mode := status.st_mode & 0o077:
            raise KeyFileError(path, f"is open to other users (mode bits {mode:03o}); run: chmod 600 {path}")
        return os.read(descriptor, FILE_BYTES_MAX)
    except OSError as error:
        raise KeyFileError(path, f"cannot be read: {_reason(error)}") from None
    finally:
        os.close(descriptor)


def _unpack_line(line: bytes) -> bytes:
    """Key and checksum out of a key file's one line. Raises ValueError with what is wrong, without quoting it."""
    prefix = PREFIX.encode()
    if not line.startswith(prefix):
        raise ValueError(f"is not a zmqbus key file (it does not begin with {PREFIX})")
    body = line.removeprefix(prefix).strip()  # tolerant of a missing or a Windows line end
    try:
        packed = base64.b64decode(body, altchars=b"-_", validate=True)
    except binascii.Error:
        packed = b""
    if len(packed) != KEY_BYTES + CHECKSUM_BYTES:
        raise ValueError("is damaged (48 characters of base64url belong after the prefix)")
    return packed


def _reason(error: OSError | ValueError) -> str:
    """Just "Permission denied", without the path and number that the caller's message has already."""
    return getattr(error, "strerror", None) or str(error)


def _sync_directory(path: Path) -> None:
    """Make the file's name durable too; without this a power cut may leave a synced file that nobody finds."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
