"""Where a database is and how it is opened: URLs, SQLite settings, and errors in our words."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError

from ditune.db.errors import CorruptData, DituneError, StoreFault, StoreLost, UsageFault

BUSY_TIMEOUT_MS = 30_000  # how long a writer waits for the one before it
READS = "ditune_reads"  # execution option: this transaction only reads
STUDY_SCHEMA = "ditune_study"  # PostgreSQL: Optuna's tables, apart from ours
_DRIVERS = {"sqlite", "sqlite+pysqlite", "postgresql", "postgresql+psycopg"}


# --- where ---------------------------------------------------------------------------------------


def parse_url(text: str) -> URL:
    """Return the URL of a database named by a URL or by the path of a SQLite file.

    Raises:
        UsageFault: It is neither, or of a kind that ditune does not use.
    """
    if "://" not in text:
        url = URL.create("sqlite", database=text)
    else:
        try:
            url = make_url(text)
        except (ArgumentError, ValueError):
            raise UsageFault(
                "the database URL cannot be read: write a path, sqlite:///FILE, or "
                "postgresql+psycopg://USER@HOST/NAME"
            ) from None
    if url.drivername not in _DRIVERS:
        raise UsageFault(
            f"ditune keeps its data in SQLite or PostgreSQL and was given {url.drivername}://: "
            "write a path, sqlite:///FILE, or postgresql+psycopg://USER@HOST/NAME"
        )
    name = url.database or ""
    no_file = name in {"", ":memory:"} or name.startswith("file:") or "\0" in name or url.query
    if url.get_backend_name() == "sqlite" and no_file:
        raise UsageFault(f"{text!r} names no file for the database: write a path or sqlite:///FILE")
    return url


def sqlite_file(url: URL) -> Path | None:
    """Return the file of a SQLite database, None for a server."""
    return Path(url.database or "") if url.get_backend_name() == "sqlite" else None


def shown(url: URL) -> str:
    """Return how messages name a database: its path, or its URL without the password."""
    file = sqlite_file(url)
    return str(file) if file is not None else url.render_as_string(hide_password=True)


def study_storage_url(text: str) -> str:
    """Return the URL of Optuna's own storage, which never shares tables with ours.

    It is `NAME.study.db` beside `NAME.db`, or the schema `ditune_study` on the same server. There
    the disk is not waited for: Optuna writes a dozen times for each point, and what a server loses
    when its machine goes down is told again from our tables.

    Raises:
        UsageFault: `text` is not a database URL or path.
    """
    url = parse_url(text)
    file = sqlite_file(url)
    if file is not None:
        url = url.set(database=str(file.with_suffix(".study.db")))
    else:
        before = url.query.get("options", "")
        given = before if isinstance(before, str) else " ".join(before)
        options = f"{given} -csearch_path={STUDY_SCHEMA} -csynchronous_commit=off".strip()
        url = url.update_query_dict({"options": options})
    return url.render_as_string(hide_password=False)


def require_writable(path: Path) -> None:
    """Prove that a SQLite file can be made or changed.

    It asks the system and opens nothing: closing a second handle of a database file would drop the
    locks that SQLite holds on it for this process.

    Raises:
        UsageFault: It cannot; the message says why and what to do.
    """
    folder = path.absolute().parent
    try:
        if not folder.is_dir():
            raise UsageFault(
                f"cannot open the database {path}: the folder {folder} does not exist; "
                "create it first, or name another with --db"
            )
        if path.is_dir():
            raise UsageFault(f"cannot open the database {path}: it is a folder; name a file in it")
        exists = path.exists()
    except OSError as error:
        raise UsageFault(f"cannot open the database {path}: {error.strerror}") from None
    # WAL keeps two more files beside the database, so the folder must be writable as well
    for place, what in ((folder, "the folder"), (path, "the file")):
        if (place is folder or exists) and not _may_write(place):
            raise UsageFault(
                f"cannot write the database {path}: {what} {place} is read-only for this user; "
                "change its permissions, or name another with --db"
            )


def _may_write(place: Path) -> bool:
    return os.access(place, os.R_OK | os.W_OK, effective_ids=os.access in os.supports_effective_ids)


# --- how -----------------------------------------------------------------------------------------


def make_engine(url: URL, *, foreign_keys: bool = True) -> Engine:
    """Return an engine with the settings under which many writers do not lock each other out.

    Args:
        url: As `parse_url` gives it.
        foreign_keys: False only for migrations, which rebuild tables that others point to.

    Raises:
        UsageFault: The driver is not installed.
    """
    try:
        # a server may have been restarted since a connection was last used
        engine = create_engine(url, pool_pre_ping=url.get_backend_name() != "sqlite")
    except ModuleNotFoundError as error:
        raise UsageFault(
            f"{shown(url)} needs the package {error.name}: pip install 'ditune[postgres]'"
        ) from None
    if url.get_backend_name() == "sqlite":

        @event.listens_for(engine, "connect")
        def _settings(connection: Any, _record: object) -> None:
            try:
                _configure(connection, foreign_keys)
            except (sqlite3.Error, UnicodeDecodeError):
                connection.close()
                raise

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            # a deferred BEGIN that writes later fails at once, whatever the timeout, if another
            # process wrote in between: only transactions that never write may use it
            reads = connection.get_execution_options().get(READS, False)
            connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _configure(connection: sqlite3.Connection, foreign_keys: bool) -> None:
    """Take transactions into our hands and set what SQLite forgets between connections.

    `trusted_schema=OFF` is left to the reader: SQLite 3.40 counts `json_valid`, which our tables
    call in their checks, among the functions that it then refuses. Opening a store refuses planted
    views and triggers instead.
    """
    connection.isolation_level = None
    # first: the next one may have to wait
    connection.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}").close()
    _use_wal(connection)
    connection.execute("PRAGMA synchronous=FULL").close()
    connection.execute(f"PRAGMA foreign_keys={'ON' if foreign_keys else 'OFF'}").close()


def _use_wal(connection: sqlite3.Connection) -> None:
    """Let readers and one writer work side by side, waiting while others open the same new file.

    SQLite asks for the lock to switch while it holds one to read; to rule out a deadlock it then
    answers "busy" at once, whatever the timeout is.
    """
    deadline_s = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
        except sqlite3.OperationalError as error:
            busy = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > deadline_s:
                raise
            time.sleep(random.uniform(0.001, 0.02))  # uneven, or the same two meet again
        else:
            return


# --- what went wrong -----------------------------------------------------------------------------


@contextmanager
def faults(where: str, *, opening: bool = False) -> Iterator[None]:
    """Turn what the database libraries raise inside the block into errors of ours.

    Args:
        where: The database, as `shown` names it.
        opening: Whether a server that cannot be reached is the caller's mistake.

    Raises:
        CorruptData: The database is damaged.
        UsageFault: It cannot be opened or written with these rights, or there is no such server.
        StoreFault: It is full or locked; what was committed before is intact.
        StoreLost: The server does not answer, or ended the connection.
    """
    try:
        yield
    except UnicodeDecodeError as error:  # the damage stands in the very message that names it
        raise _damaged(where, "unreadable text") from error
    except (SQLAlchemyError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) and error.orig else error
        detail = str(cause).strip().partition("\n")[0]
        if isinstance(error, IntegrityError):
            raise StoreFault(f"{where} refused a row: {detail}; nothing was changed") from error
        if isinstance(cause, sqlite3.Error):
            raise _sqlite_fault(cause, where, detail) from error
        raise _server_fault(cause, where, detail, opening) from error


def _sqlite_fault(error: sqlite3.Error, where: str, detail: str) -> DituneError:
    code = getattr(error, "sqlite_errorcode", None)
    match code & 0xFF if code is not None else None:
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return UsageFault(
                f"{where} cannot be opened for writing ({detail}): check that its folder exists "
                "and that both are writable"
            )
        case sqlite3.SQLITE_FULL:
            return StoreFault(
                f"{where} cannot grow ({detail}): free some space and run the command again; "
                "what was saved before is intact"
            )
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return StoreFault(
                f"{where} stayed locked by another process for {BUSY_TIMEOUT_MS / 1000:g} s: "
                "end that process or wait for it, then run the command again"
            )
        case sqlite3.SQLITE_IOERR | sqlite3.SQLITE_NOMEM | sqlite3.SQLITE_INTERRUPT:
            return StoreFault(f"{where} could not be read or written: {detail}")
    # not a database, malformed pages, a missing table or column, a text that is no text
    return _damaged(where, detail)


def _damaged(where: str, detail: str) -> CorruptData:
    return CorruptData(
        f"{where} is damaged ({detail}): restore a backup, or move it away to start anew"
    )


def _server_fault(error: BaseException, where: str, detail: str, opening: bool) -> DituneError:
    state = str(getattr(error, "sqlstate", None) or "")
    if state.startswith(("28", "3D", "42501")) or (opening and not state):
        return UsageFault(
            f"{where} cannot be opened ({detail}): check the address, the name and the rights"
        )
    if state.startswith(("42P01", "42703")):
        return CorruptData(
            f"{where} lacks a table or column of ours ({detail}): restore a backup of it"
        )
    if not state or state.startswith(("08", "57P")):  # no connection, or the server shuts down
        return StoreLost(f"{where} does not answer ({detail}); what was saved before is intact")
    return StoreFault(f"{where} failed ({detail}); what was saved before is intact")
