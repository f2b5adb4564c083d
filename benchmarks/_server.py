"""A PostgreSQL server of a benchmark's own: in a folder, on a socket, gone afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from ditune.db.errors import UsageFault

_PROGRAMS = Path("/usr/lib/postgresql")
_OWNER = "postgres"  # a server refuses to run as root


class Server:
    """A server while it runs; a context manager."""

    def __init__(self) -> None:
        """Find the programs.

        Raises:
            UsageFault: PostgreSQL is not installed.
        """
        found = sorted(_PROGRAMS.glob("*/bin/initdb"))
        if not found:
            raise UsageFault(f"no PostgreSQL server in {_PROGRAMS}: install postgresql")
        self._programs = found[-1].parent
        self._place = Path(tempfile.mkdtemp(prefix="ditune-server-"))
        self._databases = 0

    def __enter__(self) -> Self:
        """Start it."""
        if os.geteuid() == 0:
            shutil.chown(self._place, _OWNER)
        self._do("initdb", "-D", self._data, "-A", "trust", "-U", "ditune")
        self._control("start")
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it and remove its data."""
        self._control("stop", "-m", "immediate")
        shutil.rmtree(self._place)

    def restart(self) -> None:
        """End every connection at once, as a crash does, and start again."""
        self._control("restart", "-m", "immediate")

    def database(self) -> str:
        """Return the URL of a new database."""
        self._databases += 1
        name = f"bench{self._databases}"
        self._do("createdb", "-h", str(self._place), "-U", "ditune", name)
        return f"postgresql+psycopg://ditune@/{name}?host={self._place}"

    @property
    def _data(self) -> str:
        return str(self._place / "data")

    def _control(self, *words: str) -> None:
        options = f"-k {self._place} -c listen_addresses="
        log = str(self._place / "log")
        self._do("pg_ctl", "-D", self._data, "-w", "-l", log, "-o", options, *words)

    def _do(self, program: str, *words: str) -> None:
        as_owner = ["runuser", "-u", _OWNER, "--"] if os.geteuid() == 0 else []
        command = [*as_owner, str(self._programs / program), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")
