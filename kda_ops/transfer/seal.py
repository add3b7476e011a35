"""Handshakes of engines that share a secret: without it, messages are rejected before parsing.

A seal is the HMAC-SHA256 in front of a message. That of an answer also covers the hello, so that an
old answer matches no other hello.
"""

import hashlib
import hmac

from kda_ops.transfer.schema import GeometryError

SEAL = "sha256"
SEAL_BYTES = 32
LEAST_SECRET = 16


def check_secret(secret: bytes) -> bytes:
    """Returns a valid secret.

    Raises:
        ValueError: It is neither empty nor at least 16 bytes long.
    """
    if type(secret) is not bytes or 0 < len(secret) < LEAST_SECRET:
        given = f"{len(secret)} bytes" if type(secret) is bytes else type(secret).__name__
        raise ValueError(f"secret must be empty or at least {LEAST_SECRET} bytes, got {given}")
    return secret


def seal(secret: bytes, message: bytes, hello: bytes = b"") -> bytes:
    """The message with its seal in front; unchanged without a secret.

    Args:
        secret: Shared by all engines that may connect.
        message: A hello, or the answer to one.
        hello: The hello that an answer is for, with its seal.
    """
    return _digest(secret, message, hello) + message if secret else message


def unseal(secret: bytes, sealed: bytes, hello: bytes = b"") -> bytes:
    """The message without its seal.

    Raises:
        GeometryError: The seal does not match the message.
    """
    if not secret:
        return sealed
    message = sealed[SEAL_BYTES:]
    if not hmac.compare_digest(sealed[:SEAL_BYTES], _digest(secret, message, hello)):
        raise GeometryError("message must be sealed with the secret of this engine")
    return message


def _digest(secret: bytes, message: bytes, hello: bytes) -> bytes:
    return hmac.digest(secret, hashlib.sha256(hello).digest() + message, SEAL)
