"""Tiles of expert layers in the database, the newest first."""

from __future__ import annotations

from sqlalchemy import select

from ditune.db.parsing import parse
from ditune.db.records import Hardware
from ditune.db.rows import body, keep_fact
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
                    hardware_key=keep_fact(session, HardwareRow, layer.hardware),
                    software_key=keep_fact(session, SoftwareRow, layer.software),
                    body=body(layer),
                    created_at=layer.created_at,
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
