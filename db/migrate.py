"""From an empty or older database to this release's schema; the schema is never changed unasked."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, inspect, text

from ditune.db.engine import (
    STUDY_SCHEMA,
    faults,
    make_engine,
    parse_url,
    require_writable,
    shown,
    sqlite_file,
)
from ditune.db.errors import CorruptData, StoreFault, UsageFault
from ditune.db.files import sync_folder
from ditune.db.readonly import PLANTED, VERSION_TABLE
from ditune.db.schema import Schema

SCRIPTS = Path(__file__).parent / "migrations"
_LOCK = 0x646974756E65  # PostgreSQL: one process at a time creates or migrates


def prepare(engine: Engine) -> None:
    """Create the tables of a new database, or see that an existing one is whole and up to date.

    Raises:
        CorruptData: It is damaged, older than this release, or newer.
        UsageFault: It belongs to another program, cannot be written, or is not there.
    """
    where = shown(engine.url)
    with faults(where, opening=True), engine.begin() as connection:
        require_intact(connection, where)
        revision = revision_of(connection, where)
        if revision is None:
            _migrate(connection)
        elif revision != newest():
            raise CorruptData(
                f"{where} has the schema of ditune {revision}, this release needs {newest()}: "
                "run tune db upgrade, which keeps a copy of it"
            )


def upgrade(text_url: str) -> Path | None:
    """Bring a database to this release's schema, after writing a copy of a SQLite file beside it.

    Returns:
        The copy, or None where nothing had to be changed or a server keeps the data.

    Raises:
        CorruptData: The database is damaged, or newer than this release.
        UsageFault: It cannot be opened or written.
        StoreFault: The disk is full, or another process holds the database; nothing was changed.
    """
    url = parse_url(text_url)
    file = sqlite_file(url)
    if file is not None:
        require_writable(file)
    engine = make_engine(url, foreign_keys=False)
    try:
        with faults(shown(url), opening=True):
            return _upgrade(engine, url)
    finally:
        engine.dispose()


def _upgrade(engine: Engine, url: URL) -> Path | None:
    where, file, kept = shown(url), sqlite_file(url), None
    with engine.connect() as connection:
        require_intact(connection, where)
        revision = revision_of(connection, where)
    if revision == newest():
        return None
    if revision is not None and file is not None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
        kept = file.with_name(f"{file.stem}.before-{newest()}-{stamp}{file.suffix}")
        copy(engine, kept)
    with engine.begin() as connection:
        revision_of(connection, where)  # takes the lock on a server; another may have been first
        _migrate(connection)
        if file is not None and connection.execute(text("PRAGMA foreign_key_check")).first():
            raise CorruptData(f"{where} has rows that point nowhere: nothing was changed")
    return kept


def require_intact(connection: Connection, where: str) -> None:
    """Let SQLite check its own file, and refuse what could run code of others inside it.

    Raises:
        CorruptData: The file is damaged, or has views or triggers, of which we make none.
    """
    if connection.dialect.name != "sqlite":
        return
    planted = connection.execute(text(PLANTED)).scalars().all()
    if planted:
        raise CorruptData(
            f"{where} was changed: it has {', '.join(planted)}, which ditune never made; restore "
            "a backup, or name another database with --db"
        )
    found = connection.execute(text("PRAGMA quick_check(1)")).scalar()
    if found != "ok":
        detail = " ".join(str(found).split())  # SQLite answers in several lines
        raise CorruptData(f"{where} is damaged ({detail}): restore a backup, or move it away")


def revision_of(connection: Connection, where: str) -> str | None:
    """Return the release whose schema a database has, None for an empty one.

    Raises:
        CorruptData: It is newer than this release, or half of our tables are missing.
        UsageFault: It holds another program's tables.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    revisions = context.get_current_heads()
    if not revisions:
        _require_unused(connection, where)
        return None
    known = {script.revision for script in _scripts().walk_revisions()}
    if len(revisions) > 1 or revisions[0] not in known:
        raise CorruptData(
            f"{where} has the schema {', '.join(revisions)}, which this release of ditune does not "
            "know: upgrade ditune"
        )
    return revisions[0]


def newest() -> str:
    """Return the release that brought the newest schema."""
    return str(_scripts().get_current_head())


def copy(engine: Engine, path: Path) -> None:
    """Write a consistent copy of a SQLite database, in one file that read-only media can serve.

    Raises:
        UsageFault: `path` exists or cannot be written.
        StoreFault: The disk is full; no half copy is left.
    """
    require_writable(path)
    if path.exists():
        raise UsageFault(f"{path} exists already: name a new file for the copy")
    half = path.with_name(f".{path.name}.tmp")
    connection = engine.raw_connection()
    try:
        with faults(str(path)), closing(sqlite3.connect(half)) as target:
            source = connection.driver_connection
            assert isinstance(source, sqlite3.Connection)
            source.backup(target)
            target.execute("PRAGMA journal_mode=DELETE")
        half.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise StoreFault(f"{path} could not be written: {error.strerror}") from error
    finally:
        connection.close()
        half.unlink(missing_ok=True)


def _require_unused(connection: Connection, where: str) -> None:
    tables = set(inspect(connection).get_table_names())
    if tables & set(Schema.metadata.tables):
        raise CorruptData(
            f"{where} has tables of ditune but no version of them: restore a backup, or move it "
            "away to start anew"
        )
    # a server's database may be shared; a file with foreign tables was named by mistake
    if tables - {VERSION_TABLE} and connection.dialect.name == "sqlite":
        raise UsageFault(
            f"{where} is a database of another program (it has {', '.join(sorted(tables)[:3])}): "
            "name another file with --db"
        )


def _migrate(connection: Connection) -> None:
    """Run every migration that is missing, inside the connection's transaction."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {STUDY_SCHEMA}"))
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    # '%' begins an interpolation in the parser behind it
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    return config
