from __future__ import annotations

from functools import partial

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from outbox_server.shared.database.connecting import connect_directly
from outbox_server.shared.database.models import Base


def test_the_migrated_schema_equals_the_models(database_url: str) -> None:
    engine = create_engine(
        "postgresql+psycopg://", creator=partial(connect_directly, database_url), poolclass=NullPool
    )
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, Base.metadata) == []


def test_every_check_of_the_models_is_in_the_schema(database_url: str) -> None:
    engine = create_engine(
        "postgresql+psycopg://", creator=partial(connect_directly, database_url), poolclass=NullPool
    )
    with engine.connect() as connection:
        found = set(
            connection.scalars(text("SELECT conname FROM pg_constraint WHERE contype = 'c'"))
        )
    expected = {
        f"ck_{table.name}_{constraint.name}".replace(f"ck_{table.name}_ck_", "ck_")
        for table in Base.metadata.tables.values()
        for constraint in table.constraints
        if type(constraint).__name__ == "CheckConstraint"
    }
    assert expected <= found
