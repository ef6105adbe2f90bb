"""UIDs that follow from content: the same parts give the same UID, so that a repeated run writes the same objects."""

from __future__ import annotations

import hashlib
import uuid

UUID_ROOT = "2.25."
"""The arc of UIDs that are a UUID as one decimal number (PS3.5 B.2, Rec. ITU-T X.667)."""

SEPARATOR = b"\x1f"


def derived_uid(*parts: str) -> str:
    """Return the UID of a list of texts: 2.25 and the UUID (RFC 9562, version 8) made of their SHA-256.

    Parts are told apart: ("ab", "c") and ("a", "bc") give different UIDs.
    """
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(str(len(encoded)).encode() + SEPARATOR + encoded)
    number = int.from_bytes(digest.digest()[:16], "big")
    number = (number & ~(0xF << 76)) | (8 << 76)  # version 8: content defined by the writer
    number = (number & ~(0x3 << 62)) | (2 << 62)  # variant of RFC 9562
    return f"{UUID_ROOT}{uuid.UUID(int=number).int}"
