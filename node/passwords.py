"""Passwords and keys: what is kept instead of them, and whether one that is shown is the one.

A password becomes `scrypt$COST$SALT$HASH` by the standard library's scrypt (RFC 7914) with r = 8, p = 1 and N = 2^COST,
which takes 2^COST KiB of memory; argon2 would be one more dependency for no gain that a guesser would feel. It takes a
good part of a second by intent, so it is done on a worker of its own and never where the log is applied.

The secret of an API key is 256 bits of chance, which nobody guesses: a plain digest is enough.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from base64 import b64decode, b64encode
from typing import Final

from storage.errors import InvalidParameter

CHARS_MIN, CHARS_MAX = 6, 72
SALT_BYTES: Final = 16
COST_MAX: Final = 20
KEY_PREFIX: Final = "ak-"


def check_password(password: str) -> None:
    """Raise InvalidParameter if this may not become a password. Says nothing of what it is."""
    if not CHARS_MIN <= len(password) <= CHARS_MAX:
        raise InvalidParameter(
            f"invalid password: the length of a password must be between {CHARS_MIN} and {CHARS_MAX} characters"
        )


def make(password: str, cost: int) -> str:
    """Return what is kept of a password, another text each time."""
    salt = secrets.token_bytes(SALT_BYTES)
    return f"scrypt${cost}${b64encode(salt).decode()}${b64encode(_scrypt(password, salt, cost)).decode()}"


def is_kept(text: str) -> bool:
    """Return whether `make` could have made this."""
    try:
        kind, cost, salt, digest = text.split("$")
        lengths = len(b64decode(salt, validate=True)), len(b64decode(digest, validate=True))
        return kind == "scrypt" and 1 <= int(cost) <= COST_MAX and min(lengths) >= SALT_BYTES
    except ValueError:
        return False


def matches(password: str, kept: str) -> bool:
    """Return whether `kept` was made of this password; takes as long if not."""
    try:
        kind, cost, salt, digest = kept.split("$")
        if kind != "scrypt" or not 1 <= int(cost) <= COST_MAX:
            return False
        return hmac.compare_digest(_scrypt(password, b64decode(salt), int(cost)), b64decode(digest))
    except ValueError:
        return False


def _scrypt(password: str, salt: bytes, cost: int) -> bytes:
    room = (1 << cost) * 1024 + (1 << 20)
    return hashlib.scrypt(password.encode("utf-8", "surrogatepass"), salt=salt, n=1 << cost, r=8, p=1, maxmem=2 * room)


def new_key() -> tuple[str, str, str]:
    """Return (id, the key as its owner shows it, digest to keep) of a new API key."""
    key_id = secrets.token_hex(8)
    return key_id, *new_secret(key_id)


def new_secret(key_id: str) -> tuple[str, str]:
    """Return (the key as its owner shows it, digest to keep) with another secret."""
    secret = secrets.token_urlsafe(32)
    return f"{KEY_PREFIX}{key_id}-{secret}", digest_of(secret)


def split_key(text: str) -> tuple[str, str]:
    """Return (id, secret) of an API key, both empty if it is none."""
    prefix, _, rest = text.partition("-")
    key_id, _, secret = rest.partition("-")
    return (key_id, secret) if prefix + "-" == KEY_PREFIX else ("", "")


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
