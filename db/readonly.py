"""Finding a policy at run time: reads a SQLite file only, loads nothing heavy.

An answer is the policy proved for exactly this hardware, software and workload; else the one proved
with nearly the same software, marked unvalidated; else the baseline. Always with the reason.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, TypeVar

from ditune.db.errors import CorruptData, DituneError, StoreFault, UsageFault
from ditune.db.parsing import parse, parse_addressed
from ditune.db.policy import Policy
from ditune.db.records import SCHEMA_VERSION, Evidence, Hardware, Match, Software, Workload
from ditune.db.tunings import TunedLayer

REVISIONS = ("0.1.0", "0.2.0", "0.3.0")  # schemas that the queries below read, the newest last
VERSION_TABLE = "ditune_alembic_version"
# views and triggers, which could stand in for our tables; ditune makes none
PLANTED = "SELECT name FROM sqlite_master WHERE type NOT IN ('table', 'index')"
LOCK_WAIT_S = 5.0
_MAX_VALUE_BYTES = 4 << 20  # no body of ours comes near it
_MAX_CANDIDATES = 1000  # how many stored keys a reason compares with
_LISTED_MOST = 7  # a run's tiers, and the default
_MINOR_MATTERS = ("torch", "diffusers", "transformers")
_DAMAGED = "restore a backup, or move it away to start anew"
Fact = TypeVar("Fact", Hardware, Workload)
Answer = TypeVar("Answer")

_ACTIVE = """
SELECT policy.digest, policy.schema_version, policy.body,
       software.key, software.body, evidence.body,
       evidence.hardware_key, evidence.workload_key
FROM active
JOIN evidence ON evidence.id = active.evidence_id
JOIN policy ON policy.digest = evidence.policy
JOIN software ON software.key = evidence.software_key
WHERE active.hardware_key = ? AND active.workload_key = ? AND active.tier = ?
"""

_TUNINGS = "SELECT body FROM moe_tuning WHERE hardware_key = ? ORDER BY id DESC"


class _Found(NamedTuple):
    """An active row, checked."""

    policy_id: str
    policy: Policy
    software: Software
    evidence: Evidence


def find(
    path: Path,
    hardware: Hardware,
    software: Software,
    workload: Workload,
    tier: str = "default",
) -> Match:
    """Return the policy that is active for a hardware and workload, or the baseline.

    Args:
        path: A SQLite file that `Store` wrote; it may lie on read-only media.
        hardware: What the policy must have been proved on.
        software: What is installed; other patch versions give a match marked "compatible".
        workload: What the policy must have been proved for.
        tier: Which of several stored trade-offs.

    Raises:
        CorruptData: The database is damaged, changed, or of another release.
        UsageFault: The file may not be read.
        StoreFault: Another process locks the file, or the disk fails.
    """
    if not _exists(path):
        return _baseline(f"no policies yet: {path} does not exist")

    def answered(connection: sqlite3.Connection) -> Match:
        found = _active(connection, path, hardware, workload, tier)
        if found is None:
            return _baseline(_why_none(connection, path, hardware, workload, tier))
        return _match(found, software)

    return _read(path, answered)


def find_tunings(path: Path, hardware: Hardware) -> list[TunedLayer]:
    """Return what expert layers were tuned on a hardware, the newest first.

    Args:
        path: As for `find`; a file that is not there, or from before such tunings, has none.
        hardware: What they have to be tuned on.

    Raises:
        CorruptData, UsageFault, StoreFault: As for `find`.
    """
    if not _exists(path):
        return []

    def answered(connection: sqlite3.Connection) -> list[TunedLayer]:
        if not _column(connection, "SELECT 1 FROM sqlite_master WHERE name = 'moe_tuning'", ()):
            return []
        rows = connection.execute(_TUNINGS, (hardware.key,)).fetchmany(_MAX_CANDIDATES)
        return [parse(TunedLayer, body, f"a tuning in {path}") for (body,) in rows]

    return _read(path, answered)


def _read(path: Path, answered: Callable[[sqlite3.Connection], Answer]) -> Answer:
    """Return what a function reads from a file, in one snapshot."""
    try:
        try:
            return _answer(path, "mode=ro", answered)
        except sqlite3.OperationalError as error:
            if _code(error) not in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}:
                raise
        # a WAL database in a folder that cannot be written: readable only as one that never changes
        _require_merged(path)
        return _answer(path, "immutable=1", answered)
    except UnicodeDecodeError as error:  # the damage stands in the very message that names it
        raise CorruptData(f"{path} is damaged (unreadable text): {_DAMAGED}") from error
    except sqlite3.Error as error:
        raise _fault(path, error) from error


def _answer(path: Path, mode: str, answered: Callable[[sqlite3.Connection], Answer]) -> Answer:
    uri = f"{path.absolute().as_uri()}?{mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=LOCK_WAIT_S, isolation_level=None)
    with closing(connection):
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("BEGIN")  # one snapshot for all queries
        _require_our_schema(connection, path)
        return answered(connection)


def _match(found: _Found, software: Software) -> Match:
    differ = [
        f"{name} {theirs or 'none'} (here {ours or 'none'})"
        for (name, theirs), (_, ours) in zip(found.software, software, strict=True)
        if theirs != ours
    ]
    proved = f"proved with {', '.join(differ)}"
    if not differ:
        kind, reason = "exact", "proved on this hardware, workload and software"
    elif all(
        _minor(getattr(found.software, name)) == _minor(getattr(software, name))
        for name in _MINOR_MATTERS
    ):
        kind, reason = "compatible", f"unvalidated here: {proved}"
    else:
        return _baseline(
            f"the policy for this hardware and workload was {proved}: tune again to prove it"
        )
    return Match.model_validate(
        {
            "kind": kind,
            "reason": reason,
            "policy_id": found.policy_id,
            "policy": found.policy,
            "evidence": found.evidence,
        }
    )


def _active(
    connection: sqlite3.Connection, path: Path, hardware: Hardware, workload: Workload, tier: str
) -> _Found | None:
    row = connection.execute(_ACTIVE, (hardware.key, workload.key, tier)).fetchone()
    if row is None:
        return None
    digest, version, policy, software_key, software, evidence, *proved_for = row
    if version != SCHEMA_VERSION:
        raise CorruptData(
            f"{path} has a policy of format {version}, this release reads {SCHEMA_VERSION}: "
            "upgrade ditune or tune again"
        )
    if proved_for != [hardware.key, workload.key]:
        raise CorruptData(f"{path} is damaged: it activates what was proved elsewhere; {_DAMAGED}")
    return _Found(
        digest,
        parse_addressed(Policy, policy, digest, f"a policy in {path}"),
        parse_addressed(Software, software, software_key, f"a software row in {path}"),
        parse(Evidence, evidence, f"a piece of evidence in {path}"),
    )


def _why_none(
    connection: sqlite3.Connection, path: Path, hardware: Hardware, workload: Workload, tier: str
) -> str:
    """Say in one sentence what is stored instead of what was asked for."""
    asked = (hardware.key, workload.key)
    query = "SELECT tier FROM active WHERE hardware_key = ? AND workload_key = ? ORDER BY tier"
    tiers = _column(connection, query, asked)
    if tiers:
        return f"no policy of tier {tier!r} for this hardware and workload, only {_listed(tiers)}"
    workloads = _facts(connection, path, Workload, hardware.key)
    if workloads:
        return "no policy for this workload: the nearest one stored differs in " + _difference(
            workload, workloads
        )
    devices = [
        other
        for other in _facts(connection, path, Hardware, workload.key)
        if other.device_name == hardware.device_name
    ]
    if devices:
        return (
            f"no policy for this hardware: the nearest {hardware.device_name} stored differs in "
            + _difference(hardware, devices)
        )
    return f"no policy for this hardware ({hardware.device_name})"


def _facts(
    connection: sqlite3.Connection, path: Path, model: type[Fact], other_key: str
) -> list[Fact]:
    """Return the hardware with a policy for a workload, or the workloads with one on a hardware."""
    fact, other = ("workload", "hardware") if model is Workload else ("hardware", "workload")
    query = (
        f"SELECT DISTINCT {fact}.key, {fact}.body FROM active "
        f"JOIN {fact} ON {fact}.key = active.{fact}_key "
        f"WHERE active.{other}_key = ? ORDER BY {fact}.key LIMIT {_MAX_CANDIDATES}"
    )
    rows = connection.execute(query, (other_key,)).fetchall()
    return [parse_addressed(model, body, key, f"a {fact} row in {path}") for key, body in rows]


def _difference(wanted: Fact, stored: Sequence[Fact]) -> str:
    """Name the fields in which the nearest of some records differs from the one wanted."""

    def differ(other: Fact) -> list[str]:
        return [
            f"{name} ({theirs}, here {ours})"
            for (name, ours), (_, theirs) in zip(wanted, other, strict=True)
            if ours != theirs
        ]

    differences = [differ(other) for other in stored]
    nearest = min(differences, key=len)
    return ", ".join(nearest)


def _require_our_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse another release's tables, and views or triggers that could stand in for ours."""
    planted = _column(connection, PLANTED, ())
    if planted:
        raise CorruptData(f"{path} was changed: it has {_listed(planted)}, which ditune never made")
    revisions = _column(connection, f"SELECT version_num FROM {VERSION_TABLE}", ())
    if len(revisions) != 1 or revisions[0] not in REVISIONS:
        raise CorruptData(
            f"{path} has the schema {_listed(revisions)}, this release of ditune reads "
            f"{_listed(REVISIONS)}: run tune db upgrade, or upgrade ditune"
        )


def _require_merged(path: Path) -> None:
    """Refuse to read a database as unchanging while changes wait beside it to be merged."""
    log = path.with_name(path.name + "-wal")
    if _exists(log) and log.stat().st_size > 0:
        raise CorruptData(
            f"{path} has changes in {log.name} that cannot be read without writing to its folder: "
            "run tune db check on it where the folder can be written"
        )


def _column(connection: sqlite3.Connection, query: str, values: tuple[str, ...]) -> list[object]:
    return [value for (value,) in connection.execute(query, values).fetchmany(_MAX_CANDIDATES)]


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values[:_LISTED_MOST]) or "none"


def _minor(version: str) -> str:
    """Return major.minor of a version, or all of it where it has none."""
    found = re.match(r"\d+\.\d+", version)
    return found.group() if found else version


def _baseline(reason: str) -> Match:
    return Match(kind="baseline", reason=reason)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder on the way that may not be entered, a name too long
        return False


def _code(error: sqlite3.Error) -> int | None:
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _fault(path: Path, error: sqlite3.Error) -> DituneError:
    match _code(error):
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM | sqlite3.SQLITE_READONLY:
            return UsageFault(f"{path} cannot be read ({error}): check its permissions")
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED | sqlite3.SQLITE_IOERR:
            return StoreFault(f"{path} cannot be read now ({error})")
    detail = " ".join(str(error).split())
    return CorruptData(f"{path} is damaged ({detail}): {_DAMAGED}")
