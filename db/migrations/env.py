"""What Alembic runs to migrate; `ditune.db.migrate` calls it with an open transaction."""

from __future__ import annotations

from alembic import context

from ditune.db.readonly import VERSION_TABLE
from ditune.db.schema import Schema

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Schema.metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,  # SQLite cannot alter a table in place
)
with context.begin_transaction():
    context.run_migrations()
