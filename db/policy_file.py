"""Policy files: one policy with its evidence as JSON, to be kept, reviewed and carried elsewhere.

A file is data from anywhere: it is read within limits, field by field, and only if its digest fits.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ditune.db.errors import CorruptData, UsageFault
from ditune.db.files import write_atomically
from ditune.db.parsing import address_of, parse
from ditune.db.records import SCHEMA_VERSION, PolicyFile

MAX_BYTES = 1 << 20
MAX_DEPTH = 16  # of brackets; a policy file has five
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
# A string (closed or not, so that the search stays linear in the size), or one bracket.
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{]|[\]}]', re.DOTALL)


def write(policy_file: PolicyFile, path: Path) -> None:
    """Write a policy file, all of it or nothing.

    Raises:
        UsageFault: The folder does not exist or cannot be written.
        StoreFault: The disk is full; an older file of that name is intact.
    """
    write_atomically(path, (policy_file.model_dump_json(indent=2) + "\n").encode())


def read(path: Path) -> PolicyFile:
    """Return the policy file at `path` after checking size, form, ranges and digest.

    Raises:
        UsageFault: There is no such file, or it cannot be read.
        CorruptData: It is not a policy file of this version, or was changed after it was written.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageFault(
            f"the policy file {path} cannot be read: {reason}; check the path and its permissions"
        ) from error
    return check(data, str(path))


def check(data: bytes, what: str) -> PolicyFile:
    """Return the policy that the bytes of a policy file hold, after the checks of `read`.

    Args:
        data: The whole file.
        what: Where it came from, for messages.

    Raises:
        CorruptData: It is not a policy file of this version, or was changed after it was written.
    """
    if len(data) > MAX_BYTES:
        raise CorruptData(f"{what} is larger than {MAX_BYTES} bytes: this is no policy file")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptData(f"{what} is not UTF-8 text: {error}; this is no policy file") from None
    _require_shallow(text, what)
    _require_plain(text, what)
    found = parse(PolicyFile, text, what)
    for part in (found.hardware, found.software, found.workload):
        address_of(part, what)
    actual = address_of(found.policy, what)
    if actual != found.policy_id:
        raise CorruptData(
            f"{what} does not match its digest: it says {found.policy_id} and holds {actual}; "
            "it was changed or damaged, export it again"
        )
    return found


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of policy files, for editors and other tools."""
    return {"$schema": _DIALECT, **PolicyFile.model_json_schema()}


def _require_shallow(text: str, what: str) -> None:
    """Refuse deep nesting before a parser meets it."""
    depth = 0
    for token in _TOKEN.finditer(text):
        first = token.group()[0]
        depth += (first in "[{") - (first in "]}")
        if depth > MAX_DEPTH:
            raise CorruptData(f"{what} nests deeper than {MAX_DEPTH} levels: no policy file does")


def _require_plain(text: str, what: str) -> None:
    """Refuse a newer format, and equal keys, of which parsers silently take the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CorruptData(f"{what} has the key {twice!r} twice in one object: remove one")
        return seen

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except ValueError as error:  # also numbers with too many digits
        raise CorruptData(f"{what} is not JSON: {error}; export it again") from None
    version = found.get("schema_version", SCHEMA_VERSION) if isinstance(found, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise CorruptData(
            f"{what} has the format {version}, this release reads {SCHEMA_VERSION}: upgrade ditune"
        )
