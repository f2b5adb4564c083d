"""Only one process at a time asks a study for new points: what is told twice is counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout
from sqlalchemy import Engine, text

from ditune.db.digest import digest_bytes
from ditune.db.engine import faults, shown, sqlite_file
from ditune.db.errors import UsageFault


@contextmanager
def sole_asker(engine: Engine, study: str) -> Iterator[Callable[[], None]]:
    """Keep every other process from asking a study; the lock ends with the process that holds it.

    The block gets a function that raises `StoreLost` once the lock is gone, because the server that
    held it was restarted: call it before anything that only one process may do.

    On SQLite it is a lock on a file beside the database, on PostgreSQL one of the server's: neither
    goes by a clock, so that a paused process keeps its own and a killed one leaves none behind.

    Raises:
        UsageFault: Another process holds it.
    """
    file = sqlite_file(engine.url)
    where = shown(engine.url)
    if file is None:
        with _server_lock(engine, study, where) as require_held:
            yield require_held
        return
    folder = file.with_suffix(".locks")
    folder.mkdir(exist_ok=True)
    name = digest_bytes(study.encode()).removeprefix("sha256:")[:16]
    lock = FileLock(folder / f"{name}.lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise _taken(study, where, "SQLite serves one process; workers need PostgreSQL") from None
    try:
        yield lambda: None
    finally:
        lock.release()


@contextmanager
def _server_lock(engine: Engine, study: str, where: str) -> Iterator[Callable[[], None]]:
    key = int(digest_bytes(study.encode()).removeprefix("sha256:")[:15], 16)
    with faults(where):
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            query = text("SELECT pg_try_advisory_lock(:key)")
            if not connection.scalar(query, {"key": key}):
                raise _taken(study, where, "to help it, run tune worker")

            def require_held() -> None:
                with faults(where):  # a connection that broke does not come back by itself
                    connection.scalar(text("SELECT 1"))

            yield require_held
        finally:
            connection.invalidate()  # the server lets go of the lock with the connection
            connection.close()


def _taken(study: str, where: str, advice: str) -> UsageFault:
    return UsageFault(
        f"another process searches {study} in {where}: wait for it or end it; {advice}"
    )
