"""Content addresses: sha256 over the canonical JSON (RFC 8785) of a record."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import rfc8785

if TYPE_CHECKING:
    from pydantic import BaseModel

PREFIX = "sha256:"


def canonical(record: BaseModel) -> bytes:
    """Return the RFC 8785 JSON of a record, absent (None) fields left out.

    Leaving them out keeps a digest stable when a later version adds an optional field.
    """
    body: bytes = rfc8785.dumps(record.model_dump(mode="json", exclude_none=True))
    return body


def digest(record: BaseModel) -> str:
    """Return the content address of a record, "sha256:" and 64 hexadecimal digits."""
    return digest_bytes(canonical(record))


def digest_bytes(data: bytes) -> str:
    """Return the content address of bytes."""
    return PREFIX + hashlib.sha256(data).hexdigest()
