"""Find the policy for a hardware and a workload; loads nothing heavy, never guesses.

Exact key, else a compatible one marked unvalidated, else the baseline, always with a reason.
"""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_data_dir

from ditune.accel.versions import software as installed_software
from ditune.db.errors import UsageFault
from ditune.db.readonly import find
from ditune.db.records import Hardware, Match, Software, Workload

DATABASE_VARIABLE = "DITUNE_DB"


def default_database() -> Path:
    """Return where policies are kept: $DITUNE_DB, else the user's data folder."""
    chosen = os.environ.get(DATABASE_VARIABLE)
    return Path(chosen) if chosen else Path(user_data_dir("ditune")) / "policies.db"


def lookup(
    hardware: Hardware,
    workload: Workload,
    *,
    software: Software | None = None,
    db: str | Path | None = None,
    tier: str = "default",
) -> Match:
    """Return the policy stored for a hardware and a workload, or the baseline, with the reason.

    Args:
        hardware: As `ditune.detect` gives it.
        workload: Likewise, for the call that will be made.
        software: The versions in use; those installed by default.
        db: A SQLite file or `sqlite:///` URL; `$DITUNE_DB` or the user's data folder by default.
        tier: Which of several stored trade-offs.

    Raises:
        CorruptData: The database is damaged or too new.
        UsageFault: `db` names a server: the run time reads files only.
    """
    return find(database_file(db), hardware, software or installed_software(), workload, tier)


def database_file(db: str | Path | None) -> Path:
    """Return the SQLite file that a user's choice names; the default one for None.

    Raises:
        UsageFault: It names a server: the run time reads files only.
    """
    if db is None:
        return default_database()
    text = str(db)
    if text.startswith("sqlite:///"):
        return Path(text.removeprefix("sqlite:///"))
    if "://" in text:
        raise UsageFault(
            f"a lookup reads SQLite files and was given {text.partition('://')[0]}://: "
            "sync the server's policies into a file first (tune policy sync)"
        )
    return Path(text)
