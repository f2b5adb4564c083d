"""Reading records from JSON that nobody vouches for: a stored row, a file from elsewhere."""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError
from rfc8785 import CanonicalizationError

from ditune.db.errors import CorruptData
from ditune.db.policy import Policy
from ditune.db.record import Record
from ditune.db.records import Hardware, Software, Workload

R = TypeVar("R", bound=Record)
Part = TypeVar("Part", Hardware, Software, Workload, Policy)


def parse(model: type[R], text: str | bytes, what: str) -> R:
    """Return the record that a JSON text holds, checked strictly.

    Args:
        model: The noun that is expected.
        text: JSON, UTF-8.
        what: Where the text came from, for the message.

    Raises:
        CorruptData: The text is not the JSON of such a record.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        at = f" at {where}" if where else ""
        raise CorruptData(
            f"{what} is not a valid {model.__name__}{at}: {first['msg']}; "
            "get an intact copy, or one that this version of ditune can read"
        ) from None


def parse_addressed(model: type[Part], text: str | bytes, address: str, what: str) -> Part:
    """Return a content-addressed record whose digest is `address`.

    Raises:
        CorruptData: The text is no such record, or it was changed after it was stored.
    """
    record = parse(model, text, what)
    found = address_of(record, what)
    if found != address:
        raise CorruptData(
            f"{what} does not match its digest: {address} was stored and {found} was found; "
            "it was changed or damaged, get an intact copy"
        )
    return record


def address_of(record: Hardware | Software | Workload | Policy, what: str) -> str:
    """Return a record's content address.

    Raises:
        CorruptData: It has none: a number lies beyond what canonical JSON can carry.
    """
    try:
        return record.id if isinstance(record, Policy) else record.key
    except CanonicalizationError as error:
        raise CorruptData(f"{what} has a number without a canonical form: {error}") from None
