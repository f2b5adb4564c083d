"""Tiles of expert layers in the database, the newest first."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from ditune.db.digest import digest
from ditune.db.parsing import address_of, parse
from ditune.db.records import Hardware, Software
from ditune.db.rows import body, insert_new, now
from ditune.db.schema import HardwareRow, MoeTuningRow, SoftwareRow
from ditune.db.transactions import Transactions
from ditune.db.tunings import TunedLayer


class MoeTunings(Transactions):
    """The tunings that a database holds; `Store.moe`."""

    def save(self, layer: TunedLayer) -> None:
        """Keep a tuning beside older ones."""
        with self._writing() as session:
            session.add(
                MoeTuningRow(
                    hardware_key=_kept(session, HardwareRow, layer.hardware),
                    software_key=_kept(session, SoftwareRow, layer.software),
                    shape=digest(layer.tuning.shape),
                    kernels=layer.kernels,
                    body=body(layer),
                    created_at=now(),
                )
            )

    def of(self, hardware: Hardware) -> list[TunedLayer]:
        """Return what was tuned on a hardware, the newest first."""
        query = (
            select(MoeTuningRow.body)
            .where(MoeTuningRow.hardware_key == hardware.key)
            .order_by(MoeTuningRow.id.desc())
        )
        with self._reading() as session:
            what = f"a tuning of expert layers in {self.where}"
            return [parse(TunedLayer, text, what) for text in session.scalars(query)]


def _kept(
    session: Session, table: type[HardwareRow | SoftwareRow], fact: Hardware | Software
) -> str:
    """Keep a fact under its key and return the key."""
    key = address_of(fact, f"the {table.__tablename__}")
    insert_new(session, table, {"key": key, "body": body(fact)})
    return key
