"""Short transactions on one engine: what is changed together is kept together, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from ditune.db.engine import READS, faults, shown


class Transactions:
    """What gives sessions of an engine; its owner need not know how they begin and end."""

    def __init__(self, engine: Engine) -> None:
        """Wrap an engine."""
        self.where = shown(engine.url)
        self._engine = engine
        self._reader = engine.execution_options(**{READS: True})

    @contextmanager
    def _writing(self) -> Iterator[Session]:
        """Give a session whose changes are kept together, or not at all."""
        with faults(self.where), Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        """Give a session that sees one state and never waits for writers."""
        with faults(self.where), Session(self._reader) as session:
            yield session
